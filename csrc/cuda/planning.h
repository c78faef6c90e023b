// What follows from a cell and a device before any address is known: how the kernels of a step
// multiply, their tiles and blocks, the order of the packed weights, and the parts of the weight's
// gradient. Packed weights, saved tensors and workspaces always fit together. rules.cpp chooses.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "gemm.h"
#include "images.h"
#include "pass.h"

namespace snnlstm::cuda {

namespace rules {

bool three_products_beat_one(int compute_capability);

struct Load {
  int64_t blocks, outputs, threads, shared_bytes;  // all but the first of a block
};
double busiest(const Device& device, const Load& load);

// The largest blocks, and the tiles that read the least, come first. Another choice must leave the
// busiest multiprocessor 15 % less to do, because smaller blocks read more weights.
constexpr double kClearly = 0.85;

int64_t splits(const Device& device, int64_t blocks, int64_t pixels);
Algorithm algorithm(const Cell& c, const Device& device, Matrix matrix, bool fma, bool tf32x3,
                    double share, bool backward);

}  // namespace rules

// The pixels of a tile. cost: the pixels that all tiles of an image compute and read.
struct TileSize {
  int h, w;
  int64_t cost;
};

// Returns tiles of at most `pixels` pixels, the cheapest first and none at twice its cost. With
// `windows` they have whole pooling windows, and there may be none. Widths are even, because
// threads hold pairs of pixels. Of the sizes that give equally many tiles along an axis it takes
// the smallest, and multiples of 16 columns. only: the one tile that is wanted, if any.
std::vector<TileSize> tile_sizes(const Cell& c, int64_t height, int64_t width, int pixels,
                                 bool windows, const BlockChoice& only = {});

// Cuts images into tiles of that size.
void cut(Tiling& tiling, const Cell& c, int64_t height, int64_t width, const TileSize& size);
void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int channels);

// ---- convolutions -------------------------------------------------------------------------------

// The two halves of the gates' convolution, of x and of mem, without their data.
Segment x_segment(const Cell& c);
Segment mem_segment(const Cell& c);
// The transposed convolution's source, d_gates; padding is the forward convolution's.
Segment gates_segment(const Cell& c, bool is_x);

// Sizes that follow from what the tensor cores multiply.
struct MmaType {
  Multiply multiply;
  int element;  // bytes of a number in shared memory

  explicit MmaType(Multiply m) : multiply(m), element(is_half(m) ? 2 : 4) {}
  DType type() const { return is_half(multiply) ? half_type(multiply) : DType::float32; }
  int pair_bytes() const {  // of a unit of the packed weight, see MmaGemm
    return (multiply == Multiply::tf32x3 ? 2 : 1) * mma_gemm::kPairBytes;
  }
  int per_group() const { return mma_tile::kGroupBytes / element; }
  int per_step() const { return 2 * per_group(); }
  int per_chunk() const { return mma_tile::kGroups * per_group(); }
};

// The walk through a segment's K: chunks of channels, taps in a chunk, k-steps in a tap.
struct MmaDepth {
  bool im2col = false;
  int64_t channels = 0, taps = 1, chunks = 0;  // of the walk; im2col makes taps channels
  int tail_steps = 0;

  MmaDepth() = default;
  // may_im2col: im2col is allowed if it makes fewer units.
  MmaDepth(const MmaType& type, const Segment& segment, bool may_im2col = false);
  int64_t units() const { return taps * (2 * (chunks - 1) + tail_steps); }
};
MmaDepth x_depth(const Cell& c, Multiply m);
MmaDepth mem_depth(const Cell& c, Multiply m);

// How far a tile's neighbourhood reaches, and how it is read.
MmaSegment mma_segment(const Segment& s, const MmaType& type, const MmaDepth& depth,
                       const Tiling& tiling);
// Returns whether the rows of a tile of w columns, one after the other, lie on the shared memory's
// banks as one long row would: then a warp's reads of 8 pixels meet no bank twice.
bool rows_fit_banks(const MmaSegment& m, int w);
// Returns a neighbourhood's bytes, at most 2^28: an int counts several of them.
int64_t neighbourhood_bytes(const MmaSegment& m);
// Returns the accesses of all threads together for a full chunk.
int64_t chunk_accesses(const MmaSegment& m, const MmaType& type);

// Builds a convolution from its segments.
struct MmaBuilder {
  MmaType type;
  MmaConv conv;
  bool fits_banks = true;  // of all segments

  // tiles: n-tiles of a warp
  MmaBuilder(Multiply multiply, int warp_columns, int tiles);
  void add(const Segment& s, const MmaDepth& depth, const Tiling& tiling);
  // Cuts the weights into stages. weight: the first unit of the first column block; pitch: bytes
  // from one block to the next.
  void finish(const void* weight, int64_t pitch, int threads);
};

// ---- steps --------------------------------------------------------------------------------------

// The blocks of a step on tensor cores: warps along pixels, along channels and along K. The largest
// come first.
struct BlockShape {
  int m, n, k;
  const char* name;
};
constexpr BlockShape kForwardShapes[] = {
    {4, 2, 1, "4x2"}, {4, 1, 1, "4x1"}, {2, 2, 1, "2x2"}, {2, 1, 1, "2x1"}};
constexpr BlockShape kDataShapes[] = {{4, 1, 1, "4x1"}, {2, 1, 2, "2x1x2"}};

// A convolution with its epilogue.
struct StepBlocks {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int tiles = 0;                 // mma: n-tiles of a warp
  int warps_m = 0, warps_n = 0;  // mma: warps along pixels, along channels
  int k_groups = 1;              // groups of warps_m * warps_n warps, which share K among them
  int shape = -1;                // mma: the row of kForwardShapes or kDataShapes
  int64_t shared_bytes = 0;      // of a block
  int columns = 64;              // fma: of a tile

  bool mma() const { return multiply != Multiply::fma; }
  int threads() const { return mma() ? 32 * warps_m * warps_n * k_groups : fma::kThreads; }
  int pixels() const { return mma() ? 32 * warps_m : 4096 / columns; }  // of a tile
  MmaBuilder builder() const { return MmaBuilder(multiply, warps_n, tiles); }
};

// On tensor cores a warp has 8 n-tiles (16 channels) or 4 (8 channels).
struct ForwardBlocks : StepBlocks {
  bool fires = true;  // false: a kernel after the step fires

  int channels_per_thread() const { return mma() ? tiles / 2 : 1; }  // channels that a thread holds
  int channels() const { return mma() ? 2 * tiles * warps_n : columns / 4; }  // of a block
  int mem_pitch() const { return 32 * warps_m + (tiles == 8 ? 2 : 4); }
};

// Plans a step. only: the blocks that may be chosen.
ForwardBlocks forward_blocks(const Cell& c, const Device& device, Matrix matrix,
                             const BlockChoice& only);
// Bytes of shared memory of a tensor core step. The epilogue takes the convolution's place.
int64_t forward_shared_bytes(const ForwardBlocks& step, const MmaConv& conv, bool pools);

// The convolution of d_gates with the transposed weights: the gradient of x or of mem.
struct DataBlocks : StepBlocks {
  int channels() const { return mma() ? 8 * tiles * warps_n : columns; }  // of a block
};

// Plans the gradient of x or of mem like a forward step, and with `windows` in tiles of whole
// pooling windows; returns nothing if there are none. multiply: the forward pass's, which decides
// the gates' type. only: the blocks that may be chosen.
std::optional<DataBlocks> data_blocks(const Cell& c, const Device& device, Multiply multiply,
                                      bool is_x, bool windows, const BlockChoice& only = {});

// The shared memory of a tensor core step, in bytes from its start. It begins with the convolution,
// which the parked accumulators and the mem tile overwrite. The thresholds (vectors) and the sums
// of their gradients (row_sums) follow.
struct BackwardLayout {
  int mem_tile, mem_pitch, vectors, row_sums, bytes;

  BackwardLayout(const DataBlocks& step, const MmaConv& conv, bool with_mem);
};

template <class Step>
Step planned(const std::optional<Step>& best, const BlockChoice& only) {
  if (best) return *best;
  throw std::runtime_error("no block has tiles of " + std::to_string(only.h) + "x" +
                           std::to_string(only.w) + " pixels");
}

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
  int64_t start = 0;   // bytes from the packed weight's start to the first block
  int64_t pitch = 0;   // bytes from one block to the next
  int64_t blocks = 0;  // of columns
  int columns = 0;     // fma: of a block
  // mma
  MmaDepth depth;
  int unit_bytes = 0;
  int tiles = 0, warps_n = 0;  // n-tiles of a warp; warps along channels

  bool mma() const { return multiply != Multiply::fma; }
  // The bytes of all blocks, including what other parts have between them.
  int64_t bytes() const { return blocks * pitch; }
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
Packed packed_forward(const Cell& c, const ForwardBlocks& step);
Packed packed_backward(const Cell& c, const DataBlocks& to_x, const DataBlocks& to_mem);

// ---- the weight's gradient ----------------------------------------------------------------------

struct WeightBlocks {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int splits = 1;
  int64_t share = 0, total = 0;  // of a split, of all: pixels (fma) or tiles (mma)
  int part_rows = 0, part_columns = 0, tap_stride = 0;
  int columns = 64;  // fma: rows of the gradient in a block, columns of its tile
  // mma
  int warp_rows = 0, tap_groups = 0, column_pitch = 0, column_blocks = 0, buffer_bytes = 0;
  bool fits_banks = true;

  bool mma() const { return multiply != Multiply::fma; }
  int threads() const { return 32 * weight_tile::kWarpColumns * warp_rows * tap_groups; }
  int row_blocks() const { return part_rows / (32 * warp_rows); }
  int64_t part_bytes(DType real) const {
    return int64_t(splits) * part_rows * part_columns * bytes_of(real);
  }
};

struct BothWeightBlocks {
  WeightBlocks x, mem;

  // Whether the columns of x and of mem lie in the same parts.
  bool side_by_side() const { return !x.mma(); }
  int threads() const { return std::max(x.threads(), mem.threads()); }
  // The shared memory on tensor cores: the stages of the larger half, then each thread's totals.
  int totals() const;
  int shared_bytes() const { return totals() + 4 * weight_tile::kSums * threads(); }
};

// Plans both halves of the weight for one launch. On tensor cores it tries tiles without bank
// conflicts first; among them the cheapest tile, then the most rows.
BothWeightBlocks both_weight_blocks(const Cell& c, const Device& device, Multiply multiply);

}  // namespace snnlstm::cuda
