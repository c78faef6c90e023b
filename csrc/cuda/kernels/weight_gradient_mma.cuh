// The weight gradient (weight_gradient.cuh) on tensor cores: M = rows (gate, c), N = input channels
// of one tap, K = pixels.
//
// A block takes 32 * warp_rows rows, 32 input channels and 3 * tap_groups taps, and walks over the
// tiles of its share of the sequence. It keeps a tile's d_gates and its source's neighbourhood in
// shared memory, pixel by pixel as mma_source.cuh lays them out, in two buffers each; the taps read
// the neighbourhood shifted. A warp computes 32 rows x 16 channels x 3 taps.
//
// Both operands lie with K (pixels) outermost, and the tensor core wants K innermost. So 16-bit
// elements come through ldmatrix_transposed(), and floats as vectors of neighbouring rows or
// channels, each of which goes to another m16 or n8 tile. Any pixel may be any k, if both operands
// agree. In this order a warp's reads fall on different banks for every shift:
//   16-bit: k = 0 .. 7 are pixels 0, 2, .. 14, k = 8 .. 15 pixels 1, 3, .. 15 of a k-step's 16
//   tf32:   k-step s of 2, k = t and t + 4 are pixels 4 t + 2 s and 4 t + 2 s + 1 of 16
//
// Tensor cores truncate their sums. Therefore an accumulator takes at most 128 k-steps, and is then
// added to a total in shared memory, which rounds to nearest.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "weight_gradient.cuh"

namespace snnlstm::cuda {

struct WeightGradientMma {
  WeightGradientJob grad;  // share and total count tiles
  int column_blocks = 0, row_blocks = 0, splits = 0;
  MmaSegment source[2];  // for grad.in.src; for grad.later
  int warp_rows = 1, tap_groups = 1;
  int planes = 1;        // planes of d_gates in a block, of 4 units of 16 bytes each
  int unit_bits = 2;     // log2 of the units of all planes
  int column_pitch = 0;  // columns of parts from one tap to the next
  int buffer_bytes = 0;  // of one chunk of the neighbourhood
  int totals = 0;        // bytes of shared memory before the totals
};

// Element: see MmaSource.
template <class Element>
class WeightGemm {
 public:
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr bool kTf32x3 = std::is_same_v<Element, tf32x3>;
  static constexpr int kPerPlane = 64 / sizeof(Element);              // rows, or input channels
  static constexpr int kChunks = weight_tile::kChannels / kPerPlane;  // of the neighbourhood
  static constexpr int kKBlocks = weight_tile::kPixels / 16;          // of 16 pixels
  // Tiles between two folds: 128 k-steps, or in 3xTF32, where each adds three times, 40.
  static constexpr int kFold = kHalf ? 32 : kTf32x3 ? 5 : 16;

  // index: the block's number in the job. Columns count fastest, then rows, then splits.
  SNNLSTM_DEVICE WeightGemm(const WeightGradientMma& p, int index, unsigned char* shared)
      : p_(p), tables_(*reinterpret_cast<weight_tile::Tables*>(shared)), source_(p.grad.tiling) {
    shared_ = shared + weight_tile::kTableBytes;
    const int column = index % p.column_blocks;
    row_ = index / p.column_blocks % p.row_blocks;
    split_ = index / p.column_blocks / p.row_blocks;
    const int taps_of_block = p.tap_groups * weight_tile::kTaps;
    const int groups = (p.source[0].taps + taps_of_block - 1) / taps_of_block;
    channels_ = column / groups;
    // In a warp's number columns count fastest, then rows, then tap groups.
    const int warp = int(threadIdx.x) / 32;
    lane_ = int(threadIdx.x) % 32;
    warp_column_ = warp % weight_tile::kWarpColumns;
    warp_row_ = warp / weight_tile::kWarpColumns % p.warp_rows;
    const int group = warp / weight_tile::kWarpColumns / p.warp_rows;
    const int first = column % groups * taps_of_block;
    first_tap_ = first + group * weight_tile::kTaps;
    taps_ = p.source[0].taps - first_tap_;
    if (group >= p.tap_groups) taps_ = 0;  // only the other job needs this warp
    first_shifts_ = shifts_ = tables_.shift[0] + group % p.tap_groups * weight_tile::kTaps;
    fill_tables(first);
    address_lane();
  }

  SNNLSTM_DEVICE void run() {
    clear<weight_tile::kSums>(&acc_[0][0][0][0]);
    unrolled<weight_tile::kSums / 4>([&](int i) { store(total(i), make_float4(0, 0, 0, 0)); });
    // If samples have lengths, the splits take tiles round robin, so that all compute about equally
    // many.
    const bool round_robin = p_.grad.lengths != nullptr;
    const int all = int(p_.grad.total), first = split_ * int(p_.grad.share);
    const int end = round_robin ? all : min(first + int(p_.grad.share), all);
    int tile = running_tile(round_robin ? split_ : first, end);
    int folded = 0;  // tiles since the last fold
#pragma unroll 1
    for (int round = -1;; ++round) {  // computes a tile and fetches the next one
      const int buffer = round & 1;
      if (!fault(Fault::no_weight_tile_wait)) cp_async_wait<0>();
      if (!fault(Fault::no_weight_tile_barrier)) __syncthreads();
      const bool more = tile < end;
      const BlockPlace at = block_of(p_.grad.tiling, unsigned(tile));
      const MmaSegment& next = p_.source[more && at.t > 0 && p_.grad.later.present() ? 1 : 0];
      if (more) fetch(next, at, buffer ^ 1);
      if (round >= 0) {
        multiply_tile(next, more, buffer);
        if (++folded == kFold) {
          folded = 0;
          fold();
        }
      }
      if (more) source_.template finish<kHalf ? 1 : 2>(next);
      if constexpr (kCarries<Element>) {
        if (more) lay_down(buffer ^ 1);
      }
      shifts_ = first_shifts_ + next.row_padding * (weight_tile::kMostGroups * weight_tile::kTaps);
      if (!more) break;
      tile = running_tile(tile + (round_robin ? p_.splits : 1), end);
    }
    fold();
  }

  SNNLSTM_DEVICE void write() {
    if (taps_ <= 0) return;
    float* acc = &acc_[0][0][0][0];
    unrolled<weight_tile::kSums / 4>([&](int i) {
      float v[4];
      load_vector(total(i), v);
      unrolled<4>([&](int k) { acc[4 * i + k] = v[k]; });
    });
    const int g = lane_ / 4, t = lane_ % 4;
    float* parts = static_cast<float*>(p_.grad.parts) +
                   int64_t(split_) * p_.grad.part_rows * p_.grad.part_columns;
    const int first_row = (row_ * p_.warp_rows + warp_row_) * 32;
    const int column = channels_ * weight_tile::kChannels + warp_column_ * 16;
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (tap >= taps_) break;
      const int taps_w = p_.source[0].taps_w;
      if (std::is_same_v<Element, bf16> && p_.grad.later.present() &&
          (first_tap_ + tap) % taps_w == taps_w - 1 && fault(Fault::lost_mem_taps))
        clear<16>(&acc_[tap][0][0][0]);
      unrolled<2, 2>([&](int mi, int r) {
        const auto &v = acc_[tap][mi][0], &w = acc_[tap][mi][1];
        const int row = first_row + (kHalf ? mi * 16 + r * 8 + g : 4 * g + 2 * mi + r);
        float* out = parts + int64_t(row) * p_.grad.part_columns +
                     (first_tap_ + tap) * p_.column_pitch + column;
        if constexpr (kHalf) {
          store(out + 2 * t, make_float2(v[2 * r], v[2 * r + 1]));
          store(out + 8 + 2 * t, make_float2(w[2 * r], w[2 * r + 1]));
        } else {
          store(out + 4 * t, make_float4(v[2 * r], w[2 * r], v[2 * r + 1], w[2 * r + 1]));
        }
      });
    }
  }

 private:
  using Sums = float[weight_tile::kTaps][2][2][4];  // [tap][m16 tile][n8 tile]
  // Pieces of 16 bytes that a thread carries: the block has 256 for each of its warp rows, and
  // 64 * tap_groups threads.
  static constexpr int kPieces = kCarries<Element> ? 4 : 1;

  // Returns the split's first tile from i on whose sample is not padded, or at least `end`.
  SNNLSTM_DEVICE int running_tile(int i, int end) const {
    if (p_.grad.lengths != nullptr)
      while (i < end && is_padded(p_.grad.lengths, block_of(p_.grad.tiling, unsigned(i))))
        i += p_.splits;
    return i;
  }
  // Returns the place of totals 4 i ... 4 i + 3 of the thread.
  SNNLSTM_DEVICE float* total(int i) const {
    return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&tables_) + p_.totals) +
           (i * int(blockDim.x) + int(threadIdx.x)) * 4;
  }
  SNNLSTM_DEVICE void fold() {
    float* acc = &acc_[0][0][0][0];
    unrolled<weight_tile::kSums / 4>([&](int i) {
      float v[4];
      load_vector(total(i), v);
      unrolled<4>([&](int k) {
        if (!fault(Fault::lost_totals)) v[k] += acc[4 * i + k];
        if (!fault(Fault::kept_sums)) acc[4 * i + k] = 0;
      });
      store_vector(total(i), v);
    });
  }

  SNNLSTM_DEVICE unsigned char* gates(int buffer) const {
    return shared_ + buffer * weight_tile::stage_bytes(p_.planes, kChunks, p_.buffer_bytes);
  }
  SNNLSTM_DEVICE unsigned char* neighbourhood(int buffer) const {
    return gates(buffer) + p_.planes * weight_tile::kPlaneBytes;
  }

  // Begins to load a tile. Its gathered elements are loaded while another tile is multiplied.
  SNNLSTM_DEVICE void fetch(const MmaSegment& next, const BlockPlace& at, int buffer) {
    copy_gates(at, buffer);
    source_.move_to({p_.grad.source_time(at.t), at.n, at.y0, at.x0, 0, 0});
    const int chunk = fault(Fault::first_input_chunk) ? 0 : channels_ * kChunks;
    source_.start(next, chunk, neighbourhood(buffer), true, p_.buffer_bytes);
    cp_async_commit();
  }

  // Multiplies the tile in a buffer. more: another tile is being loaded, from `next`.
  SNNLSTM_DEVICE void multiply_tile(const MmaSegment& next, bool more, int buffer) {
    Place a = place(gates(buffer) + a_offset_);
    Place b = place(neighbourhood(buffer) + b_offset_);
    __syncwarp();  // lanes have diverged
    unrolled<weight_tile::kTaps>([&](int tap) {
      const int2 shift = load<int2>(&shifts_[tap][0]);
      shift_[tap][0] = !kHalf || lane_ / 8 % 2 == 0 ? shift.x : shift.y;
      if constexpr (!kHalf) shift_[tap][1] = shift.y;
    });
#pragma unroll 1
    for (int k_block = 0; k_block < kKBlocks; ++k_block) {
      if (more) {
        source_.advance(next);
        __syncwarp();
      }
      if (taps_ >= weight_tile::kTaps)
        multiply<true>(a, b, k_block);
      else if (taps_ > 0)
        multiply<false>(a, b, k_block);
      a = a + mma_tile::row_offset(16);
    }
  }

  // Begins to copy the tile's d_gates of the block's rows, with zeros outside the image and after
  // the last row. A thread that carries loads its pieces, and lay_down() stores them.
  SNNLSTM_DEVICE void copy_gates(const BlockPlace& at, int buffer) {
    const auto* image = static_cast<const Element*>(image_of(p_.grad.d_gates, at.t, at.n));
    const int pieces = weight_tile::kPixels << p_.unit_bits;
    if constexpr (kCarries<Element>) {
      unrolled<kPieces>([&](int k) {
        const int i = int(threadIdx.x) + k * int(blockDim.x);
        carried_to_[k] = -1;
        if (i >= pieces) return;
        const auto [target, from, real] = gates_of(at, i);
        carried_to_[k] = target;
        carried_[k] = real ? load<uint4>(image + from) : make_uint4(0, 0, 0, 0);
      });
    } else {
      for (int i = int(threadIdx.x); i < pieces; i += int(blockDim.x)) {
        const auto [target, from, real] = gates_of(at, i);
        cp_async(gates(buffer) + target, image + from, real);
      }
    }
  }
  SNNLSTM_DEVICE void lay_down(int buffer) const {
    unrolled<kPieces>([&](int k) {
      if (carried_to_[k] >= 0) store(gates(buffer) + carried_to_[k], carried_[k]);
    });
  }

  // The target of 16 bytes of d_gates, in bytes, and the source, in elements of the image.
  struct Piece {
    int target, from;
    bool real;
  };
  SNNLSTM_DEVICE Piece gates_of(const BlockPlace& at, int number) const {
    const Tiling& tiling = p_.grad.tiling;
    const int unit = number & ((1 << p_.unit_bits) - 1), m = number >> p_.unit_bits;
    unsigned y = unsigned(m);
    const int x = int(tiling.by_w.split(y));
    const int row = row_ * p_.warp_rows * 32 + unit * (16 / int(sizeof(Element)));
    const bool real = int(y) < tiling.h && at.y0 + int(y) < p_.grad.Ho && at.x0 + x < p_.grad.Wo &&
                      row < p_.grad.rows;
    const int from = ((at.y0 + int(y)) * p_.grad.Wo + at.x0 + x) * p_.grad.rows + row;
    return {unit / 4 * weight_tile::kPlaneBytes + mma_tile::row_offset(m) + unit % 4 * 16,
            real ? from : 0, real};
  }

  // first: the block's first tap.
  SNNLSTM_DEVICE void fill_tables(int first) const {
    const Tiling& tiling = p_.grad.tiling;
    const MmaSegment& s = p_.source[0];
    const int pixels = tiling.h * tiling.w;
    for (int i = int(threadIdx.x); i < weight_tile::kPixels / 2; i += int(blockDim.x)) {
      int m = 2 * i;
      if (m >= pixels) m &= 15;  // its d_gates are 0: any pixel on the same banks
      unsigned y = unsigned(m < pixels ? m : 0);
      const int x = int(tiling.by_w.split(y));
      tables_.pair[i] = mma_tile::row_offset(int(y) * s.step_h * s.pitch + x * s.step_w);
    }
    constexpr int kMost = weight_tile::kMostGroups * weight_tile::kTaps;
    for (int i = int(threadIdx.x); i < 2 * kMost; i += int(blockDim.x)) {
      const int padding = i / kMost, tap = first + i % kMost;
      const int shift =
          tap / s.taps_w * s.s.dilation_h * s.pitch + tap % s.taps_w * s.s.dilation_w + padding;
      store(&tables_.shift[padding][i % kMost][0],
            make_int2(mma_tile::row_offset(shift), mma_tile::row_offset(shift + s.step_w)));
    }
  }

  // Finds where the lane reads in d_gates and in the neighbourhood; k-blocks and taps add offsets.
  SNNLSTM_DEVICE void address_lane() {
    if constexpr (kHalf) {
      // a: matrices (k, m), (k, m + 8), (k + 8, m), (k + 8, m + 8)
      // b: matrices (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
      const int row = lane_ % 8, matrix = lane_ / 8;
      a_offset_ = warp_row_ * weight_tile::kPlaneBytes +
                  mma_tile::row_offset(2 * row + matrix / 2) + matrix % 2 * 16;
      b_offset_ = warp_column_ * 32 + matrix / 2 * 16;
      pairs_ = &tables_.pair[row];
    } else {
      const int g = lane_ / 4, t = lane_ % 4;
      a_offset_ = (warp_row_ * 2 + g / 4) * weight_tile::kPlaneBytes + mma_tile::row_offset(4 * t) +
                  g % 4 * 16;
      b_offset_ = warp_column_ * p_.buffer_bytes + g * 8;
      pairs_ = &tables_.pair[2 * t];
    }
  }

  // Where ldmatrix, or loads of vectors, read.
  using Place = std::conditional_t<kHalf, SharedPlace, const unsigned char*>;
  SNNLSTM_DEVICE static Place place(const unsigned char* p) {
    if constexpr (kHalf)
      return shared_place(p);
    else
      return p;
  }

  // Full: the warp has all of its taps, so that the code needs no branch for fewer.
  template <bool Full>
  SNNLSTM_DEVICE void multiply(Place a, Place b, int k_block) {
    if constexpr (kHalf)
      multiply_half<Full>(a, b, k_block);
    else
      multiply_float<Full>(a, b, k_block);
  }

  // Multiplies one k-step.
  template <bool Full>
  SNNLSTM_DEVICE void multiply_half(SharedPlace a_row, SharedPlace b_row, int k_block) {
    uint32_t a[2][4];
    unrolled<2>([&](int mi) { ldmatrix_transposed(a[mi], a_row + mi * 32); });
    b_row = b_row + pairs_[k_block * 8];
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (!Full && tap >= taps_) break;
      uint32_t b[4];
      ldmatrix_transposed(b, b_row + shift_[tap][0]);
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      unrolled<2>([&](int mi) {
        mma<Element>(acc_[tap][mi][0], a[mi], b0);
        mma<Element>(acc_[tap][mi][1], a[mi], b1);
      });
    }
  }

  // Multiplies two k-steps. A lane has rows 4 g .. 4 g + 3 of the warp's 32, and channels 2 g, 2 g
  // + 1 of its 16.
  template <bool Full>
  SNNLSTM_DEVICE void multiply_float(const unsigned char* a_row, const unsigned char* b_column,
                                     int k_block) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[8], a_small[8];  // m16 tile mi has 4 from 4 mi on
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // k = t and t + 4
        const uint4 v = load<uint4>(a_row + mma_tile::row_offset(2 * step) + 64 * k);
        a[2 * k] = v.x;
        a[2 * k + 1] = v.y;
        a[2 * k + 4] = v.z;
        a[2 * k + 5] = v.w;
      }
      const unsigned char* b_row = b_column + pairs_[k_block * 8 + step];
      uint32_t b[weight_tile::kTaps][4],
          b_small[weight_tile::kTaps][4];  // n8 tile nt: 2 nt, 2 nt + 1
      uint32_t of_a = take(a, a_small), of_b = 0;
#pragma unroll
      for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
        if (!Full && tap >= taps_) break;
        unrolled<2>([&](int k) {
          const uint2 v = load<uint2>(b_row + shift_[tap][k]);
          b[tap][k] = v.x;
          b[tap][2 + k] = v.y;
        });
        of_b |= take(b[tap], b_small[tap]);
        add(acc_[tap], a, b[tap]);
      }
      if constexpr (kTf32x3) {
        if (mma_gemm::may_be_infinite(of_a | of_b)) {
          mma_gemm::mend_rests(a, a_small);
          unrolled<weight_tile::kTaps>([&](int tap) {
            if (Full || tap < taps_) mma_gemm::mend_rests(b[tap], b_small[tap]);
          });
        }
        const bool both = __any_sync(full_warp, (of_b << 1) != 0);  // spikes have no small parts
#pragma unroll
        for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
          if (!Full && tap >= taps_) break;
          add(acc_[tap], a_small, b[tap]);
          if (both) add(acc_[tap], a, b_small[tap]);
        }
      }
    }
  }

  // Rounds numbers to tf32. In 3xTF32 `small` becomes the rests; returns the bits that are set in
  // any.
  template <int N>
  SNNLSTM_DEVICE static uint32_t take(uint32_t (&v)[N], uint32_t (&small)[N]) {
    uint32_t seen = 0;
    unrolled<N>([&](int i) {
      const float number = detail::float_of(v[i]);
      v[i] = mma_gemm::rounds_to_tf32(v[i]);
      if constexpr (kTf32x3) {
        small[i] = detail::bits_of(number - detail::float_of(v[i] & mma_gemm::kTf32Bits));
        seen |= small[i];
      }
    });
    return seen;
  }

  SNNLSTM_DEVICE static void add(float (&acc)[2][2][4], const uint32_t (&a)[8],
                                 const uint32_t (&b)[4]) {
    unrolled<2, 2>([&](int mi, int nt) {
      const uint32_t left[4] = {a[4 * mi], a[4 * mi + 1], a[4 * mi + 2], a[4 * mi + 3]};
      const uint32_t right[2] = {b[2 * nt], b[2 * nt + 1]};
      mma<tf32>(acc[mi][nt], left, right);
    });
  }

  const WeightGradientMma& p_;
  weight_tile::Tables& tables_;
  unsigned char* shared_;
  MmaSource<Element, true, kChunks> source_;
  int lane_, warp_row_, warp_column_, channels_, row_, split_;
  int taps_, first_tap_;     // taps from the warp's first one on; that tap
  int a_offset_, b_offset_;  // the lane's
  const int* pairs_;
  const int (*first_shifts_)[2],
      (*shifts_)[2];  // of the warp's taps: without row padding; the tile's
  int shift_[weight_tile::kTaps][kHalf ? 1 : 2];  // the lane's
  Sums acc_;
  uint4 carried_[kPieces];
  int carried_to_[kPieces];  // bytes from the buffer's start; -1: nothing
};

struct WeightGradientsMma : Jobs<WeightGradientMma> {
  int blocks = 0;  // of the weight
  SumGates bias;
};

template <class Element>
__global__ void __launch_bounds__(weight_tile::kMaxThreads, 1)
    weight_gradient_mma(const __grid_constant__ WeightGradientsMma p) {
  if constexpr (arch::has_mma<Element>) {
    const WeightGradientMma& first = p.job[0];
    const int blocks = first.column_blocks * first.row_blocks * first.splits;
    int index = int(blockIdx.x);
    if (index >= p.blocks) return sum_gates<float>(p.bias, index - p.blocks);
    const WeightGradientMma& job = job_of(p.job, blocks, index);
    WeightGemm<Element> gemm(job, index, &shared_memory<unsigned char>());
    gemm.run();
    gemm.write();
  } else {
    trap_without_mma();
  }
}

}  // namespace snnlstm::cuda
