// The weight gradient (weight_gradient.cuh) on tensor cores: M = rows (gate, c), N = input channels
// of one tap, K = pixels.
//
// A block takes 64 rows, 32 input channels and 3 taps, and walks over the tiles of its share of the
// sequence. It keeps a tile's d_gates and its source's neighbourhood in shared memory, pixel by
// pixel as mma.cuh lays them out; the taps read the neighbourhood shifted. Each of its 2 x 2 warps
// computes 32 rows x 16 channels x 3 taps.
//
// Both operands lie with K (pixels) outermost, and the tensor core wants K innermost. So 16-bit
// elements come through ldmatrix_transposed(), and floats as vectors of neighbouring rows or
// channels, each of which goes to another m16 or n8 tile. Any pixel may be any k, if both operands
// agree. In this order a warp's reads within a row fall on different banks for every shift:
//   16-bit: k = 0 .. 7 are pixels 0, 2, .. 14, k = 8 .. 15 pixels 1, 3, .. 15 of a k-step's 16
//   tf32:   k-step s of 2, k = t and t + 4 are pixels 4 t + 2 s and 4 t + 2 s + 1 of 16
//
// Tensor cores truncate their sums. Therefore an accumulator takes at most 128 k-steps, and is then
// added to a total, which rounds to nearest.
#pragma once

#include "mma.cuh"
#include "weight_gradient.cuh"

namespace snnlstm::cuda {

struct WeightGradientMma {
  WeightGradientJob grad;  // share and total count tiles
  MmaSegment source[2];    // for grad.in.src; for grad.later
  int splits = 0;
  int column_pitch = 0;  // columns of parts from one tap to the next
  int buffer_bytes = 0;  // of a chunk of the neighbourhood

  SNNLSTM_BOTH int row_blocks() const { return grad.part_rows / weight_tile::kRows; }
  SNNLSTM_BOTH int channel_blocks() const { return column_pitch / weight_tile::kChannels; }
  SNNLSTM_BOTH int tap_blocks() const {
    return (grad.in.taps() + weight_tile::kTaps - 1) / weight_tile::kTaps;
  }
  SNNLSTM_BOTH int blocks() const {
    return tap_blocks() * channel_blocks() * row_blocks() * splits;
  }
};

// Element: see MmaElement.
template <class Element>
class WeightGemm {
  using E = MmaElement<Element>;
  static constexpr bool kHalf = E::kHalf;
  static constexpr int kChunks = weight_tile::chunks(sizeof(Element));
  static constexpr int kUnits = 4 * weight_tile::planes(sizeof(Element));  // of 16 bytes of d_gates
  static constexpr int kFold = kHalf ? 32 : 16;  // tiles between two folds: 128 k-steps
  static constexpr int kSums = weight_tile::kTaps * 16;

 public:
  // index: the block's number in the job. Taps count fastest, then channels, rows and splits.
  SNNLSTM_DEVICE WeightGemm(const WeightGradientMma& p, int index, unsigned char* shared)
      : p_(p), table_(*reinterpret_cast<weight_tile::Table*>(shared)) {
    gates_ = shared + sizeof(weight_tile::Table);
    neighbourhood_ = gates_ + weight_tile::planes(sizeof(Element)) * weight_tile::kPlaneBytes;
    first_tap_ = index % p.tap_blocks() * weight_tile::kTaps;
    index /= p.tap_blocks();
    channels_ = index % p.channel_blocks();
    index /= p.channel_blocks();
    row_ = index % p.row_blocks();
    split_ = index / p.row_blocks();
    taps_ = p.grad.in.taps() - first_tap_;
    const int warp = int(threadIdx.x) / 32;
    lane_ = int(threadIdx.x) % 32;
    warp_column_ = warp % 2;
    warp_row_ = warp / 2;
    fill_table();
  }

  SNNLSTM_DEVICE void run() {
    clear<kSums>(&acc_[0][0][0][0]);
    clear<kSums>(&total_[0][0][0][0]);
    // If samples have lengths, the splits take tiles round robin, so that all compute about equally
    // many.
    const bool round_robin = p_.grad.lengths != nullptr;
    const int all = int(p_.grad.total), first = split_ * int(p_.grad.share);
    const int end = round_robin ? all : min(first + int(p_.grad.share), all);
    int folded = 0;  // tiles since the last fold
#pragma unroll 1
    for (int tile = round_robin ? split_ : first; tile < end; tile += round_robin ? p_.splits : 1) {
      const BlockPlace at = block_of(p_.grad.tiling, unsigned(tile));
      if (is_padded(p_.grad.lengths, at)) continue;
      __syncthreads();  // nobody reads the tile before
      load_tile(at);
      if (!fault(Fault::no_weight_tile_wait)) cp_async_wait<0>();
      if (!fault(Fault::no_weight_tile_barrier)) __syncthreads();
#pragma unroll 1
      for (int k = 0; k < weight_tile::kPixels; k += 16) {
        if constexpr (kHalf)
          multiply_half(k);
        else
          multiply_float(k);
      }
      if (++folded == kFold) {
        folded = 0;
        fold();
      }
    }
    fold();
  }

  SNNLSTM_DEVICE void write() const {
    const int g = lane_ / 4, t = lane_ % 4;
    float* parts = static_cast<float*>(p_.grad.parts) +
                   int64_t(split_) * p_.grad.part_rows * p_.grad.part_columns;
    const int first_row = row_ * weight_tile::kRows + warp_row_ * 32;
    const int column = channels_ * weight_tile::kChannels + warp_column_ * 16;
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (tap >= taps_) break;
      const bool last_column = (first_tap_ + tap + 1) % p_.grad.in.taps_w == 0;
      if (std::is_same_v<Element, bf16> && last_column && fault(Fault::lost_taps)) continue;
      unrolled<2, 2>([&](int mi, int r) {
        const auto &v = total_[tap][mi][0], &w = total_[tap][mi][1];
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

  SNNLSTM_DEVICE void fold() {
    unrolled<kSums>([&](int i) {
      float& sum = (&acc_[0][0][0][0])[i];
      if (!fault(Fault::lost_totals)) (&total_[0][0][0][0])[i] += sum;
      sum = 0;
    });
  }

  // Pixels after the tile's last one have d_gates of 0, and any place.
  SNNLSTM_DEVICE void fill_table() const {
    const Tiling& tiling = p_.grad.tiling;
    const MmaSegment& s = p_.source[0];
    for (int m = int(threadIdx.x); m < weight_tile::kPixels; m += int(blockDim.x)) {
      const int y = m / tiling.w, x = m % tiling.w;
      const bool real = y < tiling.h;
      table_.place[m] = real ? y * s.s.step_h * s.halo_w + x * s.s.step_w : 0;
      table_.y[m] = real ? y : p_.grad.Ho;
      table_.x[m] = x;
    }
    __syncthreads();
  }

  // Begins to load a tile: d_gates of the block's rows, with zeros outside the image and after the
  // last row, and the neighbourhood.
  SNNLSTM_DEVICE void load_tile(const BlockPlace& at) const {
    const auto* image = static_cast<const Element*>(image_of(p_.grad.d_gates, at.t, at.n));
#pragma unroll 1
    for (int i = int(threadIdx.x); i < weight_tile::kPixels * kUnits; i += int(blockDim.x)) {
      const int unit = i % kUnits, m = i / kUnits;
      const int y = at.y0 + table_.y[m], x = at.x0 + table_.x[m];
      const int row = row_ * weight_tile::kRows + unit * E::kPerGroup;
      const bool real = y < p_.grad.Ho && x < p_.grad.Wo && row < p_.grad.rows;
      const int from = real ? (y * p_.grad.Wo + x) * p_.grad.rows + row : 0;
      cp_async(
          gates_ + unit / 4 * weight_tile::kPlaneBytes + mma_tile::row_offset(m) + unit % 4 * 16,
          image + from, real);
    }
    const MmaSegment& source = p_.source[at.t > 0 && p_.grad.later.present() ? 1 : 0];
    BlockPlace of_source = at;
    of_source.t = p_.grad.source_time(at.t);
    const int first = fault(Fault::first_input_chunk) ? 0 : channels_ * kChunks;
    unrolled<kChunks>([&](int k) {
      E::load_chunk(source, of_source, first + k, neighbourhood_ + k * p_.buffer_bytes);
    });
  }

  // Returns the bytes from the neighbourhood's start to the pixel that pixel m meets at a tap.
  SNNLSTM_DEVICE int row_of(int m, int tap) const {
    const MmaSegment& s = p_.source[0];
    tap += first_tap_;
    return mma_tile::row_offset(table_.place[m] + tap / s.s.taps_w * s.s.dilation_h * s.halo_w +
                                tap % s.s.taps_w * s.s.dilation_w);
  }

  // Multiplies the k-step of pixels k .. k + 15.
  SNNLSTM_DEVICE void multiply_half(int k) {
    // a: matrices (k, m), (k, m + 8), (k + 8, m), (k + 8, m + 8)
    // b: matrices (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
    const int row = lane_ % 8, matrix = lane_ / 8;
    uint32_t a[2][4];
    unrolled<2>([&](int mi) {
      ldmatrix_transposed(a[mi], gates_ + warp_row_ * weight_tile::kPlaneBytes +
                                     mma_tile::row_offset(k + 2 * row + matrix / 2) +
                                     matrix % 2 * 16 + mi * 32);
    });
    const int m = k + 2 * row + matrix % 2;
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (tap >= taps_) break;
      uint32_t b[4];
      ldmatrix_transposed(b, neighbourhood_ + row_of(m, tap) + warp_column_ * 32 + matrix / 2 * 16);
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      unrolled<2>([&](int mi) {
        mma<Element>(acc_[tap][mi][0], a[mi], b0);
        mma<Element>(acc_[tap][mi][1], a[mi], b1);
      });
    }
  }

  // Multiplies the two k-steps of pixels k .. k + 15. A lane has rows 4 g .. 4 g + 3 of the warp's
  // 32, and channels 2 g, 2 g + 1 of its 16.
  SNNLSTM_DEVICE void multiply_float(int k) {
    const int g = lane_ / 4, t = lane_ % 4;
    const unsigned char* gates =
        gates_ + (warp_row_ * 2 + g / 4) * weight_tile::kPlaneBytes + g % 4 * 16;
    const unsigned char* source = neighbourhood_ + warp_column_ * p_.buffer_bytes + g * 8;
#pragma unroll 1
    for (int m = k + 4 * t; m < k + 4 * t + 4; m += 2) {
      uint32_t a[2][4];
      unrolled<2>([&](int i) {  // k = t and t + 4
        const auto v = load<uint4>(gates + mma_tile::row_offset(m + i));
        a[0][2 * i] = rounds_to_tf32(v.x);
        a[0][2 * i + 1] = rounds_to_tf32(v.y);
        a[1][2 * i] = rounds_to_tf32(v.z);
        a[1][2 * i + 1] = rounds_to_tf32(v.w);
      });
#pragma unroll
      for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
        if (tap >= taps_) break;
        uint32_t b[2][2];
        unrolled<2>([&](int i) {
          const auto v = load<uint2>(source + row_of(m + i, tap));
          b[0][i] = rounds_to_tf32(v.x);
          b[1][i] = rounds_to_tf32(v.y);
        });
        unrolled<2, 2>([&](int mi, int nt) { mma<tf32>(acc_[tap][mi][nt], a[mi], b[nt]); });
      }
    }
  }

  const WeightGradientMma& p_;
  weight_tile::Table& table_;
  unsigned char *gates_, *neighbourhood_;
  int lane_, warp_row_, warp_column_, channels_, row_, split_;
  int taps_, first_tap_;  // taps from the block's first one on; that tap
  Sums acc_, total_;
};

struct WeightGradientsMma : Jobs<WeightGradientMma> {
  int blocks = 0;  // of the weight
  SumGates bias;
};

template <class Element>
__global__ void __launch_bounds__(kThreads, 2)
    weight_gradient_mma(const __grid_constant__ WeightGradientsMma p) {
  if constexpr (arch::has_mma) {
    int index = int(blockIdx.x);
    if (index >= p.blocks) return sum_gates<float>(p.bias, index - p.blocks);
    const WeightGradientMma& job = job_of(p.job, p.job[0].blocks(), index);
    WeightGemm<Element> gemm(job, index, &shared_memory<unsigned char>());
    gemm.run();
    gemm.write();
  } else {
    trap_without_mma();
  }
}

}  // namespace snnlstm::cuda
