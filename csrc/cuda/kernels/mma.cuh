// Implicit GEMM on tensor cores: M = pixels of a tile, N = columns, K = taps x channels.
//
// A block keeps the tile's neighbourhood in shared memory, 64 bytes of channels (a chunk) at a
// time, and walks over all taps of the chunk by shifting the rows that it reads. So there is no
// im2col, and a block fetches every source pixel once. Weights come in the order in which the
// tensor cores take them, in units of one tap and one k-step of 8 words. mma_pipeline.cuh brings
// both.
//
// A warp computes 32 pixels x NT n-tiles of 8 columns. Row r of an m16 tile is pixel 2 r for r < 8
// and 2 (r - 8) + 1 for the others: a thread's rows g and g + 8 are the neighbours 2g and 2g + 1.
// If n-tiles come in pairs (a, b) of 16 channels, columns 2t, 2t + 1 of a are channels 4t, 4t + 1,
// and those of b are 4t + 2, 4t + 3: a thread holds 2 pixels x 4 neighbouring channels.
#pragma once

#include <type_traits>

#include "mma_pipeline.cuh"

namespace snnlstm::cuda {

namespace mma_gemm {
constexpr int kWarpPixels = 32;
constexpr uint32_t kTf32Bits = 0xffffe000u;  // the bits of a float that the tensor core uses

// Rounds a float for the tensor core, which drops all but the first 10 bits of the mantissa, by
// adding about half a unit of the last of these bits. That takes one instruction (cvt.rna: two or
// three). NaN, infinity and numbers that are exact in tf32 keep their values. The error is at most
// 0.71 units, and 0 on average over mantissas.
SNNLSTM_DEVICE uint32_t rounds_to_tf32(uint32_t bits) {
  const float x = detail::float_of(bits);
  return detail::bits_of(fmaf(x, 3.4526698e-4f, x));  // 2^-11.5
}

// Splits floats into two tf32 numbers each. The tensor core itself truncates `v` after the first 10
// bits of its mantissa. `small` becomes the rest, of which the tensor core drops at most two bits:
// 7.5e-8 of the number on average, towards zero. Returns the bits that are set in any rest.
template <int N>
SNNLSTM_DEVICE uint32_t split_tf32x3(const uint32_t (&v)[N], uint32_t (&small)[N]) {
  uint32_t seen = 0;
  unrolled<N>([&](int i) {
    small[i] = detail::bits_of(detail::float_of(v[i]) - detail::float_of(v[i] & kTf32Bits));
    seen |= small[i];
  });
  return seen;
}

// Returns whether a rest, in any lane, may be an infinity's: NaN, which should be 0. Other rests
// have such an exponent only if the number is above 2^11. The whole warp calls this.
SNNLSTM_DEVICE bool may_be_infinite(uint32_t seen) {
  return __any_sync(full_warp, (seen & uint32_t(kept(0x40000000))) != 0);
}
// Sets the rests of infinities to 0; the rest of a NaN stays NaN.
template <int N>
SNNLSTM_DEVICE void mend_rests(const uint32_t (&v)[N], uint32_t (&small)[N]) {
  unrolled<N>([&](int i) {
    if ((v[i] & 0x7fffffffu) == 0x7f800000u) small[i] = 0;
  });
}
}  // namespace mma_gemm

// Element, AnyCopy: see MmaSource. NT: n-tiles of a warp. Strided: the convolution may be the
// transpose of one with stride.
template <class Element, int NT, bool AnyCopy, bool Strided = false>
class MmaGemm {
 public:
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr bool kTf32x3 = std::is_same_v<Element, tf32x3>;
  static constexpr int kPairBytes = (kTf32x3 ? 2 : 1) * mma_gemm::kPairBytes;  // in a unit
  using Accumulators = float[2][NT][4];

  SNNLSTM_DEVICE MmaGemm(const MmaConv& p, unsigned char* shared, const Tiling& tiling,
                         const BlockPlace& block)
      : p_(p), tiling_(tiling), block_(block), pipeline_(p, shared, tiling, block) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    warp_column_ = warp % p.warp_columns;
    warp_row_ = warp / p.warp_columns;
    if constexpr (!AnyCopy) {
      k_group_ = warp_row_ / rows();
      warp_row_ %= rows();
    }
    const int column = fault(Fault::wrong_warp_column) ? 0 : warp_column_;
    fragments_ = shared_place(pipeline_.stages() + column * (NT / 2 * kPairBytes) + lane * 16 +
                              k_group_ * p.unit_bytes);
  }

  // Returns the first of the 2 neighbouring pixels that the thread holds in m16 tile mi.
  SNNLSTM_DEVICE int pixel(int mi) const {
    return warp_row_ * mma_gemm::kWarpPixels + mi * 16 + 2 * (int(threadIdx.x) % 32 / 4);
  }
  SNNLSTM_DEVICE int warp_column() const { return warp_column_; }
  SNNLSTM_DEVICE int rows() const {  // warps along pixels, in a group
    return int(blockDim.x) / 32 / p_.warp_columns / p_.k_groups;
  }
  SNNLSTM_DEVICE int k_group() const { return k_group_; }
  SNNLSTM_DEVICE static int quad() { return int(threadIdx.x) % 4; }

  // Tensor cores truncate their sums. In 3xTF32 each k-step adds three times, therefore a chunk's
  // sums are added to totals, which round to nearest.
  SNNLSTM_DEVICE void run(Accumulators& acc) {
    constexpr int kSums = 2 * NT * 4;
    float *sum = &acc[0][0][0], total[kTf32x3 ? kSums : 1];
    clear<kSums>(sum);
    if constexpr (kTf32x3) clear<kSums>(total);
    fill_tables();
#pragma unroll 1
    for (pipeline_.start(); pipeline_.working(); pipeline_.end_chunk()) {
      pipeline_.begin_chunk();
      multiply_chunk(acc);
      if constexpr (kTf32x3)
        unrolled<kSums>([&](int i) {
          total[i] += sum[i];
          sum[i] = 0;
        });
    }
    if constexpr (kTf32x3) unrolled<kSums>([&](int i) { sum[i] = total[i]; });
    pipeline_.finish();
  }

 private:
  SNNLSTM_DEVICE static bool is_strided(const MmaSegment& seg) {
    return Strided && (seg.s.dgrad_stride_h.value > 1 || seg.s.dgrad_stride_w.value > 1);
  }

  // Writes for each tap and k-step the bytes from a pixel's row to the row that the pixel reads:
  // for an even pixel, and for an odd one.
  SNNLSTM_DEVICE void fill_tables() {
#pragma unroll 1
    for (int k = 0; k < p_.segments; ++k) {
      const MmaSegment& seg = p_.segment[AnyCopy ? k : 0];
      int* table = pipeline_.table(k);
      for (int i = int(threadIdx.x); i < 4 * seg.taps && !is_strided(seg); i += int(blockDim.x)) {
        const int tap = i / 4;
        const int step = i / 2 % 2;
        const int odd = i % 2;
        const int shift =
            tap / seg.taps_w * seg.s.dilation_h * seg.pitch + tap % seg.taps_w * seg.s.dilation_w;
        table[i] = mma_tile::row_offset(odd + shift) - mma_tile::row_offset(odd) + 32 * step;
      }
    }
  }

  // Adds the chunk's products, of all taps and k-steps, to acc. Two groups of warps take a tap's
  // two k-steps at once; if a tap has one k-step, the second group has nothing to do.
  SNNLSTM_DEVICE void multiply_chunk(Accumulators& acc) {
    const MmaSegment& seg = pipeline_.segment();
    const bool strided = is_strided(seg);
    SharedPlace row[2];
    int pixel = 0, tap_h = 0, tap_w = 0;
    unrolled<2>([&](int mi) {
      unsigned y;
      int x;
      pixel = pixel_of_lane(seg, mi, y, x);  // odd in both tiles, or even in both
      row[mi] = row_of(pixel);
    });
    const int steps = pipeline_.steps();
    const bool works = AnyCopy || k_group_ < steps;
    // Steps that are taken at once; from a step to the next in the table, and in the weights.
    int at_once = 1;
    int stride = 3 - steps;
    int bytes = p_.unit_bytes;
    if constexpr (!AnyCopy) {
      if (p_.k_groups > 1) {
        at_once = steps;
        stride = 2;
      }
      stride = kept(stride);
      bytes = kept(at_once * bytes);
    }
    const int* entry = pipeline_.table() + 2 * k_group_ + (pixel & 1);
#pragma unroll 1
    for (int left = kept(seg.taps * steps / at_once), step = k_group_; left > 0; --left) {
      pipeline_.begin_step();
      int at = step % 2 * 32;
      if (!strided) {
        at = *entry;
        entry += 2 * stride;
      } else {
        if (stride > 1 || step % 2 == 0) {
          unrolled<2>([&](int mi) { row[mi] = row_of_transposed(seg, mi, tap_h, tap_w); });
          __syncwarp();  // lanes have diverged
          if (++tap_w == seg.taps_w) {
            tap_w = 0;
            ++tap_h;
          }
        }
        step += stride;
      }
      if (works) multiply(row, at, acc);
      pipeline_.end_step(bytes);
    }
  }

  // Returns the pixel of the neighbourhood that the lane hands to ldmatrix for m16 tile mi at tap
  // 0, 0.
  SNNLSTM_DEVICE int pixel_of_lane(const MmaSegment& seg, int mi, unsigned& y, int& x) const {
    const int lane = int(threadIdx.x) % 32;
    const int odd = fault(Fault::wrong_fragment_row) ? 0 : lane >> 3 & 1;
    int m = warp_row_ * mma_gemm::kWarpPixels + mi * 16 + 2 * (lane % 8) + odd;
    const int pixels = tiling_.h * tiling_.w;
    if (m >= pixels) m &= 15;  // any pixel on the same banks
    y = unsigned(m < pixels ? m : m & 1);
    x = int(tiling_.by_w.split(y));
    return int(y) * seg.step_h * seg.pitch + x * seg.step_w + seg.row_padding +
           (fault(Fault::wrong_mma_halo) ? 1 : 0);
  }

  // Returns the place of what the lane reads of a pixel of the neighbourhood.
  SNNLSTM_DEVICE SharedPlace row_of(int pixel) const {
    return shared_place(pipeline_.chunk() + mma_tile::row_offset(pixel) +
                        (int(threadIdx.x) % 32 >> 4) * 16);
  }

  // The same for the transpose of a convolution with stride, where not every pixel has a source.
  SNNLSTM_DEVICE SharedPlace row_of_transposed(const MmaSegment& seg, int mi, int tap_h,
                                               int tap_w) const {
    const Segment& s = seg.s;
    unsigned y;
    int x;
    pixel_of_lane(seg, mi, y, x);
    const int v = block_.y0 + int(y) - s.pad_h + tap_h * s.dilation_h;
    const int u = block_.x0 + x - s.pad_w + tap_w * s.dilation_w;
    unsigned source_y = unsigned(v), source_x = unsigned(u);
    const bool real = v >= 0 && u >= 0 && s.dgrad_stride_h.split(source_y) == 0 &&
                      s.dgrad_stride_w.split(source_x) == 0;
    const int p = (int(source_y) - pipeline_.source().origin_h(s)) * seg.pitch + int(source_x) -
                  pipeline_.source().origin_w(s) + seg.row_padding;
    return real ? row_of(p) : shared_place(pipeline_.zeros());
  }

  // Adds the products of one k-step to acc. Pairs of n-tiles are kPairBytes apart.
  SNNLSTM_DEVICE void multiply(const SharedPlace (&row)[2], int at, Accumulators& acc) const {
    uint32_t a[2][4];
    unrolled<2>([&](int mi) { ldmatrix(a[mi], row[mi] + at); });
    const SharedPlace b = fragments_ + pipeline_.weights();
    if constexpr (kTf32x3)
      multiply_tf32x3(a, b, acc);
    else
      multiply_with<std::conditional_t<kHalf, Element, tf32>>(a, b, acc);
  }

  template <class T>
  SNNLSTM_DEVICE static void multiply_with(uint32_t (&a)[2][4], SharedPlace b, Accumulators& acc) {
    if constexpr (!kHalf)
      unrolled<2, 4>([&](int mi, int r) { a[mi][r] = mma_gemm::rounds_to_tf32(a[mi][r]); });
    unrolled<NT / 2>(
        [&](int pair) { add_pair<T>(acc, pair, a, load<uint4>(b + pair * kPairBytes)); });
  }

  // Adds a w to acc for one pair of n-tiles.
  template <class T>
  SNNLSTM_DEVICE static void add_pair(Accumulators& acc, int pair, const uint32_t (&a)[2][4],
                                      const uint4& w) {
    const uint32_t w0[2] = {w.x, w.y}, w1[2] = {w.z, w.w};
    unrolled<2>([&](int mi) {
      mma<T>(acc[mi][2 * pair], a[mi], w0);
      mma<T>(acc[mi][2 * pair + 1], a[mi], w1);
    });
  }

  // a b = a_big b_big + a_big b_small + a_small b_big; a_small b_small, 2^-22 of it, is skipped. b:
  // for each pair the big parts, then the small ones.
  SNNLSTM_DEVICE static void multiply_tf32x3(uint32_t (&a)[2][4], SharedPlace b,
                                             Accumulators& acc) {
    uint32_t small[2][4], seen = 0;
    unrolled<2>([&](int mi) { seen |= mma_gemm::split_tf32x3(a[mi], small[mi]); });
    if (mma_gemm::may_be_infinite(seen))
      unrolled<2>([&](int mi) { mma_gemm::mend_rests(a[mi], small[mi]); });
    // Spikes have no small parts.
    const bool both = !AnyCopy || __any_sync(full_warp, (seen << 1) != 0);
    unrolled<NT / 2>([&](int pair) {
      const uint4 w = load<uint4>(b + pair * kPairBytes);
      if (both) add_pair<tf32>(acc, pair, small, w);
      add_pair<tf32>(acc, pair, a, load<uint4>(b + pair * kPairBytes + mma_gemm::kPairBytes));
      add_pair<tf32>(acc, pair, a, w);
    });
  }

  const MmaConv& p_;
  const Tiling& tiling_;
  const BlockPlace& block_;
  int warp_column_, warp_row_, k_group_ = 0;
  SharedPlace fragments_;  // the lane's, of the first unit in the ring of weights
  MmaPipeline<Element, AnyCopy> pipeline_;
};

}  // namespace snnlstm::cuda
