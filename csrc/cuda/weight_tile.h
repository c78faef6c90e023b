// The sizes of the weight gradient on tensor cores (weight_gradient_mma.cuh) that plans know, too.
#pragma once

#include "half.cuh"

namespace snnlstm::cuda {

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
  // [lead][tap]: what a tap adds for the first and for the second pixel of a pair.
  int shift[2][kMostGroups * kTaps][2];
};
constexpr int kTableBytes = (sizeof(Tables) + 127) / 128 * 128;

// Bytes of one tile's d_gates and neighbourhood.
SNNLSTM_BOTH int stage_bytes(int planes, int chunks, int neighbourhood) {
  return planes * kPlaneBytes + chunks * neighbourhood;
}
}  // namespace weight_tile

}  // namespace snnlstm::cuda
