// The weight gradient on tensor cores: see weight_grad.cuh for what it is. M = rows (gate, c), N =
// input channels of one tap, K = pixels.
//
// A block takes 32 * warp rows rows, 32 input channels and 3 taps, and walks over the tiles of its
// share of the sequence. Of a tile it keeps d_gates and the source's neighbourhood in shared
// memory, pixel by pixel as mma_source.cuh lays them out, two buffers each; the taps read the
// neighbourhood shifted. A warp computes 32 rows x 16 channels x 3 taps.
//
// Both operands lie with K (pixels) outermost, the tensor core wants it innermost: 16-bit elements
// come through ldmatrix transposed, floats one by one. Which pixel is which k is free, as long as
// both agree: with every other pixel of 16 (half of them even, half odd) a warp's reads fall on
// different banks for every shift.
//   16-bit: k = 0 .. 7 are pixels 0, 2, .. 14, k = 8 .. 15 pixels 1, 3, .. 15 of a k-step's 16
//   tf32:   k-step s of 2, k = t and t + 4 are pixels 4 t + 2 s and 4 t + 2 s + 1 of 16
#pragma once

#include "mma.cuh"
#include "weight_grad.cuh"

namespace snnlstm::cuda {

struct WeightGradMma {
  WeightGrad grad;  // share and total count tiles
  int column_blocks = 0, row_blocks = 0, splits = 0;
  MmaSegment source[2];  // before the first step or at all times; from t = 1 on
  Multiply multiply = Multiply::tf32;
  int warp_rows = 1;
  int column_pitch = 0;  // of parts: from one tap's columns to the next
  int buffer_bytes = 0;  // of one neighbourhood chunk
};

// Both halves of the weight in one launch.
struct WeightGradJobs {
  WeightGradMma job[2];
};

namespace weight_tile {
constexpr int kPixels = 64, kTaps = 3, kWarpColumns = 2, kChannels = 32;
constexpr int kMaxThreads = 256;
// Of 64 bytes of rows (a plane) of d_gates; planes lie half a line apart.
constexpr int kPlaneBytes = 64 * kPixels + 16 * kPixels / 2 + 64;

// Of one tile's d_gates and neighbourhood.
SNNLSTM_BOTH int stage_bytes(int planes, int chunks, int neighbourhood) {
  return planes * kPlaneBytes + chunks * neighbourhood;
}
}  // namespace weight_tile

template <class Element>
class WeightGemm {
 public:
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kPerPlane = 64 / sizeof(Element);              // rows, or input channels
  static constexpr int kChunks = weight_tile::kChannels / kPerPlane;  // of the neighbourhood
  static constexpr int kSteps = weight_tile::kPixels / (kHalf ? 16 : 8);
  using Accumulators = float[weight_tile::kTaps][2][2][4];

  // index: of the block among the job's: columns fastest, then rows, then splits.
  SNNLSTM_DEVICE WeightGemm(const WeightGradMma& p, int index, unsigned char* shared)
      : p_(p), shared_(shared), source_(p.multiply, p.grad.tiling) {
    const int column = index % p.column_blocks;
    row_ = index / p.column_blocks % p.row_blocks;
    split_ = index / p.column_blocks / p.row_blocks;
    warp_ = int(threadIdx.x) / 32, lane_ = int(threadIdx.x) % 32;
    planes_ = p.warp_rows * 32 / kPerPlane;
    const int groups = (p.source[0].taps + weight_tile::kTaps - 1) / weight_tile::kTaps;
    first_tap_ = column % groups * weight_tile::kTaps;
    channels_ = column / groups;
  }

  SNNLSTM_DEVICE void run(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < weight_tile::kTaps * 16; ++i) (&acc[0][0][0][0])[i] = 0;
    const int64_t begin = split_ * p_.grad.share;
    const int64_t end =
        begin + p_.grad.share < p_.grad.total ? begin + p_.grad.share : p_.grad.total;
#pragma unroll 1
    for (int64_t i = begin - 1; i < end; ++i) {  // computes tile i, fetches tile i + 1
      const int buffer = int(i - begin) & 1;
      if (!fault(Fault::missing_wait, 3)) cp_async_wait<0>();
      if (!fault(Fault::missing_barrier_read, 3)) __syncthreads();
      const bool more = i + 1 < end, computes = i >= begin;
      const Block at = block_of(p_.grad.tiling, unsigned(i + 1));
      const MmaSegment& next = p_.source[more && at.t > 0 && p_.grad.later.present() ? 1 : 0];
      // Elements that are gathered come a few at a time while the tensor cores work.
      const bool in_turns =
          more && computes && (next.feed == Feed::gather || next.feed == Feed::vectors);
      if (more) {
        copy_gates(at, buffer ^ 1);
        source_.move_to({p_.grad.source_time(at.t), at.n, at.y0, at.x0, 0, 0});
#pragma unroll 1
        for (int chunk = 0; chunk < (in_turns ? 1 : kChunks); ++chunk) {
          start(next, buffer ^ 1, chunk);
          if (!in_turns) source_.template finish<kHalf ? 1 : 2>(next);
        }
        cp_async_commit();
      }
      const int lead = next.lead;
      if (!computes) {
        lead_ = lead;
        continue;
      }
#pragma unroll 1
      for (int step = 0; step < kSteps; ++step) {
        if (in_turns) {
          if (step > 0 && step % (kSteps / kChunks) == 0) {
            source_.end(next);
            start(next, buffer ^ 1, step / (kSteps / kChunks));
          }
          source_.turn(next);
          __syncwarp();  // lanes have gone different ways
        }
        multiply(buffer, step, acc);
      }
      if (in_turns) source_.end(next);
      lead_ = lead;
    }
  }

  SNNLSTM_DEVICE void write(const Accumulators& acc) const {
    const int g = lane_ / 4, t = lane_ % 4;
    float* parts = static_cast<float*>(p_.grad.parts) +
                   int64_t(split_) * p_.grad.part_rows * p_.grad.part_columns;
    const int row = (row_ * p_.warp_rows + warp_ / 2) * 32 + g;
    const int column = channels_ * weight_tile::kChannels + warp_ % 2 * 16 + 2 * t;
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (first_tap_ + tap >= p_.source[0].taps) break;
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int nt = 0; nt < 2; ++nt) {
            const auto& v = acc[tap][mi][nt];
            store(parts + int64_t(row + mi * 16 + r * 8) * p_.grad.part_columns +
                      (first_tap_ + tap) * p_.column_pitch + column + nt * 8,
                  make_float2(v[2 * r], v[2 * r + 1]));
          }
    }
  }

 private:
  SNNLSTM_DEVICE unsigned char* gates(int buffer) const {
    return shared_ + buffer * weight_tile::stage_bytes(planes_, kChunks, p_.buffer_bytes);
  }
  SNNLSTM_DEVICE unsigned char* neighbourhood(int buffer, int chunk) const {
    return gates(buffer) + planes_ * weight_tile::kPlaneBytes + chunk * p_.buffer_bytes;
  }

  SNNLSTM_DEVICE void start(const MmaSegment& seg, int buffer, int chunk) {
    const int number = channels_ * kChunks + chunk;
    source_.start(seg, number, neighbourhood(buffer, chunk), true);
  }
  // The tile's d_gates, the block's rows; zeros outside of the image and behind the last row.
  SNNLSTM_DEVICE void copy_gates(const Block& at, int buffer) const {
    const Tiling& tiling = p_.grad.tiling;
    const auto* image = static_cast<const Element*>(image_of(p_.grad.d_gates, at.t, at.n));
    const int units = 4 * planes_, per_unit = 16 / int(sizeof(Element));
    const int first = row_ * p_.warp_rows * 32;
    for (int i = int(threadIdx.x); i < weight_tile::kPixels * units; i += int(blockDim.x)) {
      const int unit = i & (units - 1), m = i / units;
      unsigned y = unsigned(m);
      const int x = int(tiling.by_w.split(y)), row = first + unit * per_unit;
      const bool real = int(y) < tiling.h && at.y0 + int(y) < p_.grad.Ho &&
                        at.x0 + x < p_.grad.Wo && row < p_.grad.rows;
      const int from = ((at.y0 + int(y)) * p_.grad.Wo + at.x0 + x) * p_.grad.rows + row;
      cp_async<16>(gates(buffer) + unit / 4 * weight_tile::kPlaneBytes + mma_tile::row_offset(m) +
                       unit % 4 * 16,
                   real ? image + from : image, real ? 16 : 0);
    }
  }

  // Where pixel m of the tile lies in the neighbourhood, before the tap's shift.
  SNNLSTM_DEVICE int place(int m) const {
    const Tiling& tiling = p_.grad.tiling;
    const int pixels = tiling.h * tiling.w;
    if (m >= pixels) m &= 15;  // its d_gates are zero: any pixel, on the same banks
    unsigned y = unsigned(m < pixels ? m : 0);
    const int x = int(tiling.by_w.split(y));
    return int(y) * p_.source[0].step_h * p_.source[0].pitch + x * p_.source[0].step_w + lead_;
  }
  SNNLSTM_DEVICE int shift(int tap) const {
    const int tap_h = tap / p_.source[0].taps_w, tap_w = tap - tap_h * p_.source[0].taps_w;
    return tap_h * p_.source[0].s.dilation_h * p_.source[0].pitch +
           tap_w * p_.source[0].s.dilation_w;
  }

  SNNLSTM_DEVICE void multiply(int buffer, int step, Accumulators& acc) const {
    if constexpr (kHalf) {
      multiply_half(buffer, step, acc);
    } else {
      multiply_float(buffer, step, acc);
    }
  }

  template <class T>
  SNNLSTM_DEVICE static void multiply_tap(float (&acc)[2][2][4], const uint32_t (&a)[2][4],
                                          const uint32_t (&b0)[2], const uint32_t (&b1)[2]) {
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      mma<T>(acc[mi][0], a[mi], b0);
      mma<T>(acc[mi][1], a[mi], b1);
    }
  }
  SNNLSTM_DEVICE void multiply_half(int buffer, int step, Accumulators& acc) const {
    const int row = lane_ % 8, matrix = lane_ / 8;
    // a: matrices (k, m), (k, m + 8), (k + 8, m), (k + 8, m + 8)
    const int m_a = step * 16 + 2 * row + matrix / 2;
    const unsigned char* a_row = gates(buffer) + warp_ / 2 * weight_tile::kPlaneBytes +
                                 mma_tile::row_offset(m_a) + matrix % 2 * 16;
    uint32_t a[2][4];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) ldmatrix_transposed(a[mi], a_row + mi * 32);
    const bool bf = p_.multiply == Multiply::bf16;  // asked late: the addresses exist once
    // b: matrices (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
    const int at = place(step * 16 + 2 * row + matrix % 2);
    const unsigned char* b_row = neighbourhood(buffer, 0) + warp_ % 2 * 32 + matrix / 2 * 16;
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (first_tap_ + tap >= p_.source[0].taps) break;
      uint32_t b[4];
      ldmatrix_transposed(b, b_row + mma_tile::row_offset(at + shift(first_tap_ + tap)));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      if (bf)
        multiply_tap<bf16>(acc[tap], a, b0, b1);
      else
        multiply_tap<fp16>(acc[tap], a, b0, b1);
    }
  }

  SNNLSTM_DEVICE void multiply_float(int buffer, int step, Accumulators& acc) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const bool parts = p_.multiply == Multiply::tf32x3;
    const int m = step / 2 * 16 + 4 * t + 2 * (step % 2);  // of k = t; k = t + 4 is the next pixel
    const int at[2] = {place(m), place(m + 1)};
    uint32_t a[2][4], a_low[2][4];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const unsigned char* from = gates(buffer) +
                                    (warp_ / 2 * 2 + mi) * weight_tile::kPlaneBytes +
                                    mma_tile::row_offset(m + r / 2) + (g + r % 2 * 8) * 4;
        const uint32_t raw = load<uint32_t>(from);
        a[mi][r] = mma_gemm::high(raw);
        a_low[mi][r] = parts ? mma_gemm::low(raw, a[mi][r]) : 0;
      }
#pragma unroll
    for (int tap = 0; tap < weight_tile::kTaps; ++tap) {
      if (first_tap_ + tap >= p_.source[0].taps) break;
      const int by = shift(first_tap_ + tap);
#pragma unroll
      for (int nt = 0; nt < 2; ++nt) {
        uint32_t b[2], b_low[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t raw = load<uint32_t>(neighbourhood(buffer, warp_ % 2) +
                                              mma_tile::row_offset(at[k] + by) + (nt * 8 + g) * 4);
          b[k] = mma_gemm::high(raw);
          b_low[k] = parts ? mma_gemm::low(raw, b[k]) : 0;
        }
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          if (parts) {
            mma<tf32>(acc[tap][mi][nt], a_low[mi], b);
            mma<tf32>(acc[tap][mi][nt], a[mi], b_low);
          }
          mma<tf32>(acc[tap][mi][nt], a[mi], b);
        }
      }
    }
  }

  const WeightGradMma& p_;
  unsigned char* shared_;
  MmaSource<Element, true> source_;
  int warp_, lane_, planes_, first_tap_, channels_, row_, split_;
  int lead_ = 0;  // of the tile that is computed
};

template <class Element>
__global__ void __launch_bounds__(weight_tile::kMaxThreads, 2)
    weight_grad_mma(const __grid_constant__ WeightGradJobs p) {
  if constexpr (arch::has_mma) {
    const WeightGradMma& first = p.job[0];
    const int blocks = first.column_blocks * first.row_blocks * first.splits;
    const bool second = int(blockIdx.x) >= blocks;
    WeightGemm<Element> gemm(p.job[second ? 1 : 0], int(blockIdx.x) - (second ? blocks : 0),
                             &shared_memory<unsigned char>());
    float acc[weight_tile::kTaps][2][2][4];
    gemm.run(acc);
    gemm.write(acc);
  }
}

}  // namespace snnlstm::cuda
