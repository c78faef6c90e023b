// The sizes and arguments of the convolution kernels that passes need, too.
#pragma once

#include "tile.h"

namespace snnlstm::cuda {

// The threads of a block, and the pixels of its tile.
constexpr int kThreads = 128, kTilePixels = 128;

// ---- without tensor cores: fma.cuh --------------------------------------------------------------

namespace fma {

constexpr int kColumns = 32;  // of a block
constexpr int kDepth = 16;    // of a chunk of K

SNNLSTM_BOTH int64_t depth(const Segment& s) {
  const int64_t k = int64_t(s.taps()) * s.channels;
  return (k + kDepth - 1) / kDepth * kDepth;
}
}  // namespace fma

// ---- on tensor cores: mma.cuh -------------------------------------------------------------------

// How the convolutions multiply.
enum class Multiply : int { fma, fp16, bf16, tf32 };
constexpr const char* kMultiplyNames[] = {"fma", "mma-fp16", "mma-bf16", "mma-tf32"};

// Returns the type of the numbers in shared memory, from which tf32 is rounded when it is read.
SNNLSTM_BOTH DType operand_type(Multiply m) {
  return m == Multiply::fp16   ? DType::float16
         : m == Multiply::bf16 ? DType::bfloat16
                               : DType::float32;
}

namespace mma_tile {
constexpr int kGroups = 4;       // groups of a chunk of channels
constexpr int kGroupBytes = 16;  // a k-step takes two groups
constexpr int kPairBytes = 512;  // of packed weight: B fragments of two n-tiles, one k-step
constexpr int kChannels = 16;    // of a block, forward and backward: a pair of n-tiles
constexpr int kVectors = 80;     // of a step's block: a bias for each gate, and a threshold
constexpr int kSums = 64;        // of the threshold's gradient, a channel of each warp

// Returns the bytes from the first pixel's row to pixel p's.
SNNLSTM_BOTH int row_offset(int p) { return 64 * p + 16 * (p >> 1); }
}  // namespace mma_tile

// A convolution's source, and the walk through its K: chunks of channels, taps in a chunk, k-steps
// in a tap.
struct MmaSegment {
  Segment s;
  int chunks = 0, tail_steps = 0;  // k-steps (1 or 2) of the last chunk
  int halo_h = 0, halo_w = 0;      // the tile's neighbourhood
  bool asynchronous = false;       // the source can be copied in groups, as it is

  SNNLSTM_BOTH int steps(int chunk) const { return chunk + 1 < chunks ? 2 : tail_steps; }
  SNNLSTM_BOTH int64_t units() const {  // k-steps of all taps and chunks
    return s.taps() * (2 * int64_t(chunks - 1) + tail_steps);
  }
};

struct MmaConv {
  MmaSegment segment[2];
  int segments = 0;
  const void* weight = nullptr;  // first k-step of the first column block
  int64_t weight_pitch = 0;      // bytes from one column block to the next
  int buffer_bytes = 0;          // of the neighbourhood, in shared memory

  int shared_bytes() const { return buffer_bytes + 4 * (mma_tile::kVectors + mma_tile::kSums); }
};

// ---- the weight's gradient on tensor cores: weight_gradient_mma.cuh -----------------------------

namespace weight_tile {
constexpr int kPixels = 64, kTaps = 3, kRows = 64, kChannels = 32;  // of a block
// A plane has 64 bytes of rows of d_gates for each pixel. Planes begin half a line of banks apart.
constexpr int kPlaneBytes = 64 * kPixels + 16 * kPixels / 2 + 64;

// Where the tile's pixels lie: their place in the neighbourhood, their row and their column.
struct Table {
  int place[kPixels], y[kPixels], x[kPixels];
};

// Planes of d_gates, and chunks of the neighbourhood. element: bytes of a number.
SNNLSTM_BOTH constexpr int planes(int element) { return kRows * element / 64; }
SNNLSTM_BOTH constexpr int chunks(int element) { return kChannels * element / 64; }
// neighbourhood: bytes of a chunk.
SNNLSTM_BOTH int shared_bytes(int element, int neighbourhood) {
  return int(sizeof(Table)) + planes(element) * kPlaneBytes + chunks(element) * neighbourhood;
}
}  // namespace weight_tile

}  // namespace snnlstm::cuda
