// A convolution on tensor cores, as kernels take it: its sources and its weights.
#pragma once

#include "tile.h"

namespace snnlstm::cuda {

// How the convolutions multiply. tf32x3: float32 as the sum of two tf32 numbers, in three products.
enum class Multiply : int { fma, fp16, bf16, tf32, tf32x3, fp16_sm75 };

SNNLSTM_BOTH bool is_half(Multiply m) {
  return m == Multiply::fp16 || m == Multiply::bf16 || m == Multiply::fp16_sm75;
}
SNNLSTM_BOTH DType half_type(Multiply m) {
  return m == Multiply::bf16 ? DType::bfloat16 : DType::float16;
}

// How a segment's source comes into shared memory.
enum class Feed : int {
  async,    // 16 bytes of channels, as they are
  vectors,  // 4 channels at a time, converted on the way
  gather,   // element by element: contiguous images, odd channel counts, anything
  patches,  // few channels: each pixel gets K = (tap, channel), and the walk has one tap
};

namespace mma_tile {
constexpr int kGroups = 4;  // 16-byte groups of a chunk
constexpr int kGroupBytes = 16;

// Returns the bytes from the first pixel's row to pixel p's.
SNNLSTM_BOTH int row_offset(int p) { return 64 * p + 16 * (p >> 1); }
}  // namespace mma_tile

struct MmaSegment {
  Segment s;
  Feed feed = Feed::gather;
  int taps = 1, taps_w = 1;        // of the walk through shared memory
  int chunks = 0, tail_steps = 0;  // k-steps (1 or 2) of the last chunk
  int halo_h = 0, halo_w = 0;      // the neighbourhood
  int lead = 0;                    // unused pixels before a row
  int pitch = 0;                   // pixels from one of its rows to the next, in shared memory
  int step_h = 1, step_w = 1;      // neighbourhood pixels from a tile pixel to the next
  SmallDivisor by_halo_w;
  // gather: threads take pixels in such an order that a warp starts at a sector
  bool whole_rows = false;      // the neighbourhood's rows are the image's: runs pass row ends
  int align = 8;                // elements of a sector
  SmallDivisor by_run, by_col;  // threads of a group of channels, of a row
  int turns = 1;                // turns that a thread does in one call of turn()
  SmallDivisor by_channels, by_taps_w;  // patches: s.channels, s.taps_w

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
  int k_groups = 1;  // groups of warps, 1 or 2 (2 without AnyFeed): one takes the odd k-steps
  int unit_bytes = 0, stage_units = 1;
  int buffer_bytes = 0;  // of one neighbourhood buffer

  SNNLSTM_BOTH int stage_bytes() const { return stage_units * unit_bytes; }
  SNNLSTM_BOTH int shared_bytes() const {
    int taps = 0;
    for (int k = 0; k < segments; ++k) taps += segment[k].taps;
    return 2 * buffer_bytes + mma_gemm::kStages * stage_bytes() + 64 + 16 * taps;
  }
};

}  // namespace snnlstm::cuda
