// What follows from a cell and a device before any address is known: how the kernels of a step
// multiply, their tiles, the order of the packed weights, and the parts of the weight's gradient.
// Packed weights, saved tensors and workspaces always fit together.
#pragma once

#include <algorithm>
#include <string>

#include "gemm.h"
#include "images.h"
#include "pass.h"

namespace snnlstm::cuda {

// ---- tiles --------------------------------------------------------------------------------------

// Cuts images of this size into tiles of at most `pixels` pixels: full rows, or up to 32 columns.
void cut(Tiling& tiling, int64_t height, int64_t width, int64_t pixels);
// Covers the images with blocks, each of which has some of the columns.
void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int64_t per_block);

// ---- convolutions -------------------------------------------------------------------------------

// The two halves of the gates' convolution, of x and of mem, without their data.
Segment x_segment(const Cell& c);
Segment mem_segment(const Cell& c);
// The transposed convolution's source, d_gates; padding is the forward convolution's.
Segment gates_segment(const Cell& c, bool is_x);

// How tensor cores walk through a segment, for tiles of this kind.
MmaSegment mma_segment(const Segment& s, Multiply multiply, const Tiling& tiling);
// The convolution over up to two segments, without its weight.
MmaConv mma_conv(std::initializer_list<MmaSegment> segments);

// ---- steps --------------------------------------------------------------------------------------

// The blocks of a convolution with its epilogue: those of a forward step, or of a gradient.
struct StepBlocks {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int channels = 0;  // of a block

  bool mma() const { return multiply != Multiply::fma; }
};

// Plans a forward step.
StepBlocks forward_blocks(const Cell& c, const Device& device, Matrix matrix);
// Plans the convolution of d_gates with the transposed weights: the gradient of x or of mem.
StepBlocks data_blocks(const Cell& c, const Device& device, Matrix matrix, bool is_x);

// ---- packed weights -----------------------------------------------------------------------------

// The use of a packed weight. The backward pass reverses the taps.
enum class Use : int {
  x_to_gates,    // columns: (channel, gate)   K channels: Cin
  mem_to_gates,  // columns: (channel, gate)   K channels: C
  gates_to_x,    // columns: Cin               K channels: (gate, channel), a gate has Cp
  gates_to_mem,  // columns: C                 K channels: (gate, channel), a gate has Cp
};

// Tells where the packed weight of one convolution lies. Each block of columns has the order in
// which the kernel walks (fma.cuh, mma.cuh).
struct PackedPart {
  Use use = Use::x_to_gates;
  Multiply multiply = Multiply::fma;
  int64_t start = 0;               // bytes from the packed weight's start to the first block
  int64_t pitch = 0;               // bytes from one block to the next
  int64_t blocks = 0;              // of columns
  int chunks = 0, tail_steps = 0;  // mma: as in MmaSegment; fma: chunks of K

  bool mma() const { return multiply != Multiply::fma; }
  SNNLSTM_BOTH bool forward() const { return use == Use::x_to_gates || use == Use::mem_to_gates; }
  SNNLSTM_BOTH int pairs() const { return forward() ? 4 : 1; }  // mma: of n-tiles, in a block
  const char* in(const void* packed) const { return static_cast<const char*>(packed) + start; }
  Segment with_weight(Segment s, const void* packed) const {
    s.weight = in(packed);
    s.weight_pitch = pitch;
    return s;
  }
};

// x: for the sums over x, or for their gradient.
struct Packed {
  PackedPart x, mem;
  int64_t bytes = 0;
};
// On tensor cores a block has the k-steps of x, then those of mem.
Packed packed_forward(const Cell& c, const StepBlocks& step);
Packed packed_backward(const Cell& c, const StepBlocks& to_x, const StepBlocks& to_mem);

// ---- the weight's gradient ----------------------------------------------------------------------

// One half of the gradient, of x or of mem.
struct WeightHalf {
  int part_rows = 0, part_columns = 0;  // of a part
  int tap_stride = 0;                   // columns of a part from one tap to the next
  int64_t blocks = 0;                   // of a split
};

struct WeightBlocks {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int splits = 1;
  int64_t share = 0, total = 0;  // of a split, of all: pixels (fma) or tiles (mma)
  WeightHalf x, mem;             // fma: their columns lie side by side in the same parts
  int buffer_bytes = 0;          // mma: of a chunk of a neighbourhood

  bool mma() const { return multiply != Multiply::fma; }
  int64_t part_bytes(const WeightHalf& half, DType real) const {
    return int64_t(splits) * half.part_rows * half.part_columns * bytes_of(real);
  }
};

WeightBlocks weight_blocks(const Cell& c, const Device& device, Matrix matrix);

}  // namespace snnlstm::cuda
