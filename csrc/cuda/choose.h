// Which kernels run a cell, and their tiles: decided from the cell and the target alone, so that
// packed weights, saved tensors and workspaces of one cell always fit together.
#pragma once

#include "forward_fma.cuh"
#include "plan_mma.h"

namespace snnlstm::cuda {

inline const char* name_of(Multiply m) {
  constexpr const char* names[] = {"fma", "mma-fp16", "mma-bf16", "mma-tf32", "mma-3xtf32"};
  return names[int(m)];
}

inline Multiply wanted_multiply(const Cell& cell, const Target& target) {
  const bool possible = target.compute_capability >= 80 && target.algorithm != Algorithm::fma;
  if (!possible || cell.dtype == DType::float64) return Multiply::fma;
  if (cell.dtype == DType::float16) return Multiply::fp16;
  if (cell.dtype == DType::bfloat16) return Multiply::bf16;
  switch (target.matrix) {
    case Matrix::tf32:
      return Multiply::tf32;
    case Matrix::tf32x3:
      return Multiply::tf32x3;
    case Matrix::float16:
      return Multiply::fp16;
    case Matrix::bfloat16:
      return Multiply::bf16;
    default:
      return Multiply::fma;
  }
}

// The two halves of the gates' convolution, without their data.
inline Segment input_window(const Cell& c) {
  Segment s;
  s.channels = int(c.Cin), s.height = int(c.H), s.width = int(c.W);
  s.taps_h = c.kernel_h, s.taps_w = c.kernel_w;
  s.dilation_h = c.dilation_h, s.dilation_w = c.dilation_w;
  s.pad_h = int(c.pad_h()), s.pad_w = int(c.pad_w());
  s.step_h = c.stride_h, s.step_w = c.stride_w;
  return s;
}
inline Segment state_window(const Cell& c) {
  Segment s = input_window(c);
  s.channels = int(c.C), s.height = int(c.Ho()), s.width = int(c.Wo());
  s.step_h = s.step_w = 1;
  return s;
}

// Blocks of a step on tensor cores, the largest first: warps along pixels, along channels, and
// along K.
struct BlockShape {
  int m, n, k;
  std::string name() const {
    std::string text = std::to_string(m) + "x" + std::to_string(n);
    return k > 1 ? text + "x" + std::to_string(k) : text;
  }
};
constexpr BlockShape kForwardShapes[] = {{4, 2, 1}, {4, 1, 1}, {2, 2, 1}, {2, 1, 1}};
constexpr BlockShape kDataShapes[] = {{2, 2, 1}, {4, 1, 1}, {2, 1, 2}};

// A convolution with its epilogue.
struct StepPlan {
  Multiply multiply = Multiply::fma;
  Tiling tiling;                            // of one launch
  int tiles = 0, warps_m = 0, warps_n = 0;  // mma: n-tiles of a warp; warps
  int k_groups = 1;                         // of so many warps each, which share K among them

  bool mma() const { return multiply != Multiply::fma; }
  int threads() const { return mma() ? 32 * warps_m * warps_n * k_groups : fma::kThreads; }
  MmaBuilder builder() const { return MmaBuilder(multiply, warps_n, tiles); }
};

// On tensor cores a warp has 8 n-tiles (16 channels) or 4 (8 channels).
struct ForwardPlan : StepPlan {
  bool fires = true;    // the step fires, else a kernel behind it
  int64_t hoisted = 0;  // steps whose input half comes first, in one launch; 0: each its own

  int held() const { return mma() ? tiles / 2 : 1; }  // channels of a thread
  int channels() const { return mma() ? 2 * tiles * warps_n : fma::kChannels; }  // of a block
  int mem_pitch() const { return 32 * warps_m + (tiles == 8 ? 2 : 4); }
};

inline MmaDepth x_depth(const Cell& c, Multiply m) {
  return MmaDepth(MmaType(m), input_window(c), true);
}
inline MmaDepth mem_depth(const Cell& c, Multiply m) {
  return MmaDepth(MmaType(m), state_window(c));
}

// Bytes of shared memory of a tensor core step: of the convolution, or of what takes its place.
inline int64_t forward_shared_bytes(const ForwardPlan& plan, const MmaConv& conv, bool pools) {
  int64_t epilogue = int64_t(8 * plan.held()) * plan.threads() * 4;
  if (pools) epilogue += int64_t(plan.channels()) * plan.mem_pitch() * 4;
  return round_up(std::max<int64_t>(conv.shared_bytes(), epilogue), 128);
}

inline void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int channels) {
  tiling.images = images;
  tiling.by_batch = Divisor(std::max<int64_t>(c.N, 1));
  tiling.by_columns = Divisor(ceil_div(columns, channels));
}

inline bool choose_tiling(ForwardPlan& plan, const Cell& c, int pixels) {
  const bool windows = c.pool != Pool::none;
  plan.tiling = Tiling();
  plan.fires = !c.inhibition && choose_tile(c, c.Ho(), c.Wo(), pixels, windows, plan.tiling);
  if (!plan.fires) choose_tile(c, c.Ho(), c.Wo(), pixels, false, plan.tiling);
  cover(plan.tiling, c, c.N, c.C, plan.channels());
  return plan.fires || c.inhibition || !windows;
}

// Hoisting the input half out of the sequence costs 8 numbers a neuron and step to be written and
// read. It pays where a step leaves multiprocessors idle, so that its time is that of one block:
// the block's work shrinks, and the input half runs on all of them.
// Returns of how many steps at once: so few that the numbers are still in the cache when their step
// comes, and that the workspace does not grow with T.
inline int64_t steps_to_hoist(const ForwardPlan& plan, const Cell& c, const Target& target) {
  constexpr int64_t most_bytes = 32 << 20, most_steps = 16, fewest_steps = 4;
  if (plan.tiling.blocks() > target.multiprocessors || 3 * c.Cin < c.C) return 0;
  const int64_t bytes = Shape(c).gates() * (c.dtype == DType::float64 ? 8 : 4);
  const int64_t most = std::min(most_bytes / std::max<int64_t>(bytes, 1), most_steps);
  if (most < fewest_steps || c.T < fewest_steps) return 0;
  return ceil_div(c.T, ceil_div(c.T, most));  // chunks of nearly equal length
}

// Chooses among the blocks that fit(shape) says can be: the first that gives each multiprocessor
// one, since large ones fetch less. wanted: the row that is asked for, or -1. Returns whether there
// is any.
template <class Plan, size_t count, class Fits>
bool choose_shape(Plan& plan, const BlockShape (&shapes)[count], int wanted, const Target& target,
                  Fits&& fits) {
  Plan best;
  for (const BlockShape& shape : shapes) {
    if (wanted >= 0 && &shape != shapes + wanted) continue;
    plan.warps_m = shape.m, plan.warps_n = shape.n, plan.k_groups = shape.k;
    if (!fits(shape)) continue;
    best = plan;
    if (plan.tiling.blocks() >= target.multiprocessors) break;
  }
  plan = best;
  return plan.mma();
}

inline ForwardPlan plan_step(const Cell& c, const Target& target) {
  ForwardPlan plan;
  plan.multiply = wanted_multiply(c, target);
  if (plan.mma()) {
    plan.tiles = c.C <= 8 ? 4 : 8;
    const auto fits = [&](const BlockShape& shape) {
      if (shape.n == 2 && c.C <= 16) return false;
      choose_tiling(plan, c, 32 * shape.m);
      MmaBuilder builder = plan.builder();
      builder.add(input_window(c), x_depth(c, plan.multiply), plan.tiling);
      builder.add(state_window(c), mem_depth(c, plan.multiply), plan.tiling);
      builder.finish(nullptr, 0, plan.threads());
      return forward_shared_bytes(plan, builder.conv, c.pool != Pool::none) +
                 5 * plan.channels() * 4 <=
             target.shared_bytes;
    };
    if (choose_shape(plan, kForwardShapes, target.forward_shape, target, fits)) return plan;
    if (target.algorithm == Algorithm::mma)
      throw std::runtime_error("the neighbourhood of a tile does not fit in " +
                               std::to_string(target.shared_bytes) +
                               " bytes of shared memory: algorithm mma cannot run this cell");
  } else if (target.algorithm == Algorithm::mma) {
    throw std::runtime_error("algorithm mma needs compute capability 8.0 and a matrix type; got " +
                             std::to_string(target.compute_capability) + " and matrix " +
                             std::to_string(int(target.matrix)));
  }
  choose_tiling(plan, c, fma::kPixels);
  return plan;
}

// The blocks of the largest launch.
inline int64_t forward_blocks(const Cell& c, const ForwardPlan& plan) {
  const int64_t firing = c.N * ceil_div(c.C * c.Ho() * c.Wo(), 256);
  return std::max(plan.tiling.blocks() * std::max<int64_t>(plan.hoisted, 1), firing);
}

inline ForwardPlan plan_forward(const Cell& c, const Target& target) {
  ForwardPlan plan = plan_step(c, target);
  plan.hoisted = steps_to_hoist(plan, c, target);
  return plan;
}

}  // namespace snnlstm::cuda
