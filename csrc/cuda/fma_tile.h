// The sizes of convolutions without tensor cores (fma.cuh) that plans know, too.
#pragma once

#include "tile.h"

namespace snnlstm::cuda {

namespace fma {

constexpr int kThreads = 128, kDepthUnit = 16;

// The tile of a block of so many columns: 16, 32 or 64.
template <int Columns>
struct Tile {
  static constexpr int kColumns = Columns, kPixels = 4096 / Columns;
  static constexpr int kDepth = Columns == 16 ? 8 : 16;  // of a chunk
  // The pitch of the mem tile. A half warp stores pixel pairs of two channels, to different banks.
  static constexpr int kMemPitch = kPixels + 16;
};

template <class R, class T>
struct GemmShared {
  R vectors[5 * T::kColumns / 4];  // for the epilogue: 5 for a channel, or 1 for a column
  R a[2][T::kDepth][T::kPixels];
  R b[2][T::kDepth][T::kColumns];
  // Row and column of a tap, and the offsets of its channel and of all three: Gemm::locate().
  alignas(16) int where[2][T::kDepth][4];
};

SNNLSTM_BOTH int64_t depth(const Segment& s) {
  const int64_t k = int64_t(s.taps()) * s.channels;
  return (k + kDepthUnit - 1) / kDepthUnit * kDepthUnit;
}

// Of a step backward.
template <class R, class T>
struct StepShared {
  R row_sums[T::kPixels / 64 * T::kColumns];  // of each row of warps
  GemmShared<R, T> gemm;

  // The mem tile takes the place of A and of what comes behind. Four channels lie on other banks.
  static constexpr int kMemPitch = T::kPixels + 4;
  static constexpr size_t bytes(bool with_mem) {
    constexpr size_t before = sizeof(row_sums) + sizeof(gemm.vectors);
    constexpr size_t pooled = before + sizeof(R) * T::kColumns * kMemPitch;
    return with_mem && pooled > sizeof(StepShared) ? pooled : sizeof(StepShared);
  }
};
}  // namespace fma

// Calls f(R{}, fma::Tile<columns>{}), R the compute type of float64 or of other states. Fewest: the
// fewest columns that there are.
template <int Fewest, class F>
void with_tile(DType type, int columns, F&& f) {
  if (type == DType::float64) return f(double{}, fma::Tile<64>{});
  if (columns == 64) return f(float{}, fma::Tile<64>{});
  if (Fewest == 32 || columns == 32) return f(float{}, fma::Tile<32>{});
  if constexpr (Fewest == 16) f(float{}, fma::Tile<16>{});
}

}  // namespace snnlstm::cuda
