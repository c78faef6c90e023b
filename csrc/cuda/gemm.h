// The sizes and arguments of the convolution kernels that passes need, too.
#pragma once

#include "tile.h"

namespace snnlstm::cuda {

// ---- without tensor cores: fma.cuh --------------------------------------------------------------

namespace fma {

constexpr int kThreads = 128, kDepthUnit = 16;

// The tile of a block with 16, 32 or 64 columns.
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

// The shared memory of a backward step.
template <class R, class T>
struct StepShared {
  R row_sums[T::kPixels / 64 * T::kColumns];  // of each row of warps
  GemmShared<R, T> gemm;

  // The mem tile overwrites A and what follows it. Four channels lie on different banks.
  static constexpr int kMemPitch = T::kPixels + 4;
  static constexpr size_t bytes(bool with_mem) {
    constexpr size_t before = sizeof(row_sums) + sizeof(gemm.vectors);
    constexpr size_t pooled = before + sizeof(R) * T::kColumns * kMemPitch;
    return with_mem && pooled > sizeof(StepShared) ? pooled : sizeof(StepShared);
  }
};
}  // namespace fma

// Calls f(R{}, fma::Tile<columns>{}), where R is the compute type. Fewest is the smallest number of
// columns that occurs.
template <int Fewest, class F>
void with_tile(DType type, int columns, F&& f) {
  if (type == DType::float64) return f(double{}, fma::Tile<64>{});
  if (columns == 64) return f(float{}, fma::Tile<64>{});
  if (Fewest == 32 || columns == 32) return f(float{}, fma::Tile<32>{});
  if constexpr (Fewest == 16) f(float{}, fma::Tile<16>{});
}

// ---- on tensor cores: mma.cuh -------------------------------------------------------------------

// How the convolutions multiply. tf32x3: float32 as the sum of two tf32 numbers, in three products.
enum class Multiply : int { fma, fp16, bf16, tf32, tf32x3, fp16_sm75 };
constexpr const char* kMultiplyNames[] = {"fma",      "mma-fp16",   "mma-bf16",
                                          "mma-tf32", "mma-3xtf32", "mma-fp16"};

SNNLSTM_BOTH bool is_half(Multiply m) {
  return m == Multiply::fp16 || m == Multiply::bf16 || m == Multiply::fp16_sm75;
}
SNNLSTM_BOTH DType half_type(Multiply m) {
  return m == Multiply::bf16 ? DType::bfloat16 : DType::float16;
}

// How a segment's source is copied to shared memory.
enum class GlobalCopy : int {
  cp_async,    // 16 bytes of channels, as they are
  vectorized,  // 4 channels at a time, converted on the way
  gather,      // element by element: contiguous images, odd channel counts, anything
  im2col,      // few channels: each pixel gets K = (tap, channel), and the walk has one tap
};

namespace mma_tile {
constexpr int kGroups = 4;  // 16-byte groups of a chunk
constexpr int kGroupBytes = 16;

// Returns the bytes from the first pixel's row to pixel p's.
SNNLSTM_BOTH int row_offset(int p) { return 64 * p + 16 * (p >> 1); }
}  // namespace mma_tile

struct MmaSegment {
  Segment s;
  GlobalCopy copy = GlobalCopy::gather;
  int taps = 1, taps_w = 1;        // of the walk through shared memory
  int chunks = 0, tail_steps = 0;  // k-steps (1 or 2) of the last chunk
  int halo_h = 0, halo_w = 0;      // the neighbourhood
  int row_padding = 0;             // unused pixels before a row
  int pitch = 0;                   // pixels from one of its rows to the next, in shared memory
  int step_h = 1, step_w = 1;      // neighbourhood pixels from a tile pixel to the next
  SmallDivisor by_halo_w;
  // gather: threads take pixels in an order in which each warp starts at a sector
  bool whole_rows = false;      // the neighbourhood's rows are the image's, and runs pass row ends
  int align = 8;                // elements of a sector
  SmallDivisor by_run, by_col;  // threads of a group of channels, of a row
  int accesses = 1;             // of a thread in one call of advance()
  SmallDivisor by_channels, by_taps_w;  // im2col: s.channels, s.taps_w

  SNNLSTM_BOTH int steps(int chunk) const { return chunk + 1 < chunks ? 2 : tail_steps; }
};

namespace mma_gemm {
constexpr int kStages = 4;
constexpr int kPairBytes = 512;  // B fragments of two n-tiles, one k-step
// Pieces of 16 bytes of a stage that a thread carries in registers, if it carries (kCarries).
constexpr int kCarried = 2;
}  // namespace mma_gemm

struct MmaConv {
  MmaSegment segment[2];
  int segments = 0;
  int units = 0;                 // of all segments together
  const void* weight = nullptr;  // first unit of the first column block
  int64_t weight_pitch = 0;      // bytes from one column block to the next
  int warp_columns = 1;
  int k_groups = 1;  // groups of warps, 1 or 2 (2 without AnyCopy): one takes the odd k-steps
  int unit_bytes = 0, stage_units = 1;
  int buffer_bytes = 0;  // of one neighbourhood buffer

  SNNLSTM_BOTH int stage_bytes() const { return stage_units * unit_bytes; }
  SNNLSTM_BOTH int shared_bytes() const {
    int taps = 0;
    for (int k = 0; k < segments; ++k) taps += segment[k].taps;
    return 2 * buffer_bytes + mma_gemm::kStages * stage_bytes() + 64 + 16 * taps;
  }
};

// ---- the weight's gradient on tensor cores: weight_gradient_mma.cuh -----------------------------

namespace weight_tile {
constexpr int kPixels = 64, kTaps = 3, kWarpColumns = 2, kChannels = 32;
constexpr int kMaxThreads = 384;   // each has 168 registers
constexpr int kSums = kTaps * 16;  // sums of a thread
// A plane has 64 bytes of rows of d_gates for each pixel. Planes begin half a line of banks apart.
constexpr int kPlaneBytes = 64 * kPixels + 16 * kPixels / 2 + 64;
constexpr int kMostGroups = 3;

// Offsets into the neighbourhood, in bytes. They lie at the start of shared memory.
struct Tables {
  // The offset of the tile's pixel 2 i. Its place is even, so that a tap's shift can be added.
  int pair[kPixels / 2];
  // [row_padding][tap]: what a tap adds for the first and second pixel of a pair.
  int shift[2][kMostGroups * kTaps][2];
};
constexpr int kTableBytes = (sizeof(Tables) + 127) / 128 * 128;

// Bytes of one tile's d_gates and neighbourhood.
SNNLSTM_BOTH int stage_bytes(int planes, int chunks, int neighbourhood) {
  return planes * kPlaneBytes + chunks * neighbourhood;
}
}  // namespace weight_tile

}  // namespace snnlstm::cuda
