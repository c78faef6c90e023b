// The backward pass's part of choose.h.
#pragma once

#include "backward_fma.cuh"
#include "backward_mma.cuh"
#include "choose.h"
#include "weight_grad_mma.cuh"

namespace snnlstm::cuda {

// A convolution with the transposed weights, of d_gates, for the gradient of x or mem.
struct DataPlan : StepPlan {
  int channels() const { return mma() ? 8 * tiles * warps_n : fma::kColumns; }  // of a block
};

// The convolution's source: d_gates, padded and with taps reversed like the forward convolution's.
inline Segment gates_window(const Cell& c, bool of_x) {
  Segment s = state_window(c);
  s.channels = int(4 * Shape(c).Cp);
  if (of_x) s.up_h = SmallDivisor(c.stride_h), s.up_w = SmallDivisor(c.stride_w);
  return s;
}

// Shared memory of a tensor core step, in bytes from its start: the convolution, in whose place
// come the parked accumulators and the mem tile, then the thresholds and their gradients' sums.
struct BackwardShared {
  int mem_tile, mem_pitch, vectors, row_sums, bytes;

  BackwardShared(const DataPlan& plan, const MmaConv& conv, bool with_mem) {
    mem_tile = 8 * plan.tiles * plan.threads() * 4;
    mem_pitch = 32 * plan.warps_m + 2;
    const int epilogue = mem_tile + (with_mem ? plan.channels() * mem_pitch * 4 : 0);
    vectors = int(round_up(std::max(conv.shared_bytes(), epilogue), 128));
    row_sums = vectors + plan.channels() * 4;
    bytes = row_sums + plan.k_groups * plan.warps_m * plan.channels() * 4;
  }
};

struct WeightPlan {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int splits = 1;
  int64_t share = 0, total = 0;  // pixels or tiles
  int part_rows = 0, part_columns = 0, tap_stride = 0;
  // mma
  int warp_rows = 0, tap_groups = 0, column_pitch = 0, column_blocks = 0, buffer_bytes = 0;

  bool mma() const { return multiply != Multiply::fma; }
  int threads() const { return 32 * weight_tile::kWarpColumns * warp_rows * tap_groups; }
  int row_blocks() const { return part_rows / (32 * warp_rows); }
  int stage_bytes() const {
    const MmaType type(multiply);
    return weight_tile::kTableBytes +
           2 * weight_tile::stage_bytes(warp_rows * 32 / (64 / type.element),
                                        weight_tile::kChannels / (64 / type.element), buffer_bytes);
  }
  int64_t part_bytes(DType real) const {
    return int64_t(splits) * part_rows * part_columns * bytes_of(real);
  }
};

struct WeightPlans {
  WeightPlan x, mem;

  int threads() const { return std::max(x.threads(), mem.threads()); }
  // On tensor cores: the stages of either half, then each thread's totals.
  int totals() const { return std::max(x.stage_bytes(), mem.stage_bytes()); }
  int shared_bytes() const { return totals() + 4 * weight_tile::kSums * threads(); }
};

struct BackwardPlan {
  bool spreads = true;  // pooling windows do not cross tiles: the step does it all
  DataPlan to_mem, to_x;
};

// Shares the total out: two blocks for each multiprocessor, each with `least` of it or more.
// blocks: of all column and row blocks of the launch.
inline void split(WeightPlan& w, const Target& target, int64_t blocks, int64_t least,
                  int64_t unit) {
  const int64_t wanted = std::max<int64_t>(2 * target.multiprocessors / blocks, 1);
  const int64_t splits = std::max<int64_t>(std::min({wanted, w.total / least, int64_t(1024)}), 1);
  w.share = std::max<int64_t>(round_up(ceil_div(w.total, splits), unit), 1);
  w.splits = int(std::max<int64_t>(ceil_div(w.total, w.share), 1));
}

// One half of the weight's gradient on tensor cores, but for its splits.
inline WeightPlan weight_tiles(const Cell& c, Multiply multiply, bool of_x, int most_rows) {
  const Shape s(c);
  const MmaType type(multiply);
  const Segment in = of_x ? input_window(c) : state_window(c);
  const MmaDepth depth = of_x ? x_depth(c, multiply) : mem_depth(c, multiply);
  WeightPlan w;
  w.multiply = multiply;
  // Up to 12 warps: all taps of 3x3, or more rows of fewer taps.
  w.tap_groups = int(std::min<int64_t>(ceil_div(depth.taps, weight_tile::kTaps), 3));
  w.warp_rows = most_rows;
  while (w.warp_rows > 1 &&
         (w.threads() > weight_tile::kMaxThreads || 16 * w.warp_rows >= 4 * s.Cp))
    w.warp_rows /= 2;
  choose_tile(c, s.Ho, s.Wo, weight_tile::kPixels, false, w.tiling);
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.total = w.tiling.tiles();
  w.buffer_bytes = int(neighbourhood_bytes(mma_segment(in, type, depth, w.tiling)));
  w.column_pitch = int(round_up(depth.channels, weight_tile::kChannels));
  w.part_rows = int(round_up(4 * s.Cp, 32 * w.warp_rows));
  w.part_columns = int(depth.taps * w.column_pitch);
  w.tap_stride = depth.patches ? in.channels : w.column_pitch;
  w.column_blocks = int(w.column_pitch / weight_tile::kChannels *
                        ceil_div(depth.taps, weight_tile::kTaps * w.tap_groups));
  return w;
}

inline WeightPlan weight_fma(const Cell& c, const Target& target, bool of_x) {
  const Shape s(c);
  const Segment in = of_x ? input_window(c) : state_window(c);
  WeightPlan w;
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.part_rows = int(round_up(4 * s.Cp, 64));
  w.part_columns = int(round_up(s.taps * in.channels, 64));
  w.tap_stride = in.channels;
  w.total = c.T * c.N * s.pixels;
  split(w, target, int64_t(w.part_rows / 64) * (w.part_columns / 64), 256, fma::kDepth);
  return w;
}

// Writing a split's part of the gradient, and reading it again to add it, takes about a 24th of the
// time of a tile for each block: if memory moves 3 bytes for each 200 multiplications that tensor
// cores do (an H100's data sheet; a sweep over splits would measure it).
constexpr int64_t kPartsPerTile = 24;

// Shares the tiles of a tensor core launch out, in so many splits that the multiprocessors, one
// block each, are done soonest.
inline void split_tiles(WeightPlans& plan, const Target& target) {
  const int64_t blocks = int64_t(plan.x.column_blocks) * plan.x.row_blocks() +
                         int64_t(plan.mem.column_blocks) * plan.mem.row_blocks();
  const int64_t total = plan.x.total;
  int64_t best = 1, best_time = -1;
  for (int64_t splits = 1; splits <= std::max<int64_t>(total / 4, 1); ++splits) {
    const int64_t waves = ceil_div(blocks * splits, target.multiprocessors);
    if (splits > 1 && waves > 8) break;
    const int64_t time = kPartsPerTile * waves * ceil_div(total, splits) + splits * blocks;
    if (best_time < 0 || time < best_time) best = splits, best_time = time;
  }
  for (WeightPlan* w : {&plan.x, &plan.mem}) {
    w->share = std::max<int64_t>(ceil_div(total, best), 1);
    w->splits = int(std::max<int64_t>(ceil_div(total, w->share), 1));
  }
}

// Plans both halves of the weight for one launch.
inline WeightPlans plan_weights(const Cell& c, const Target& target) {
  const Multiply multiply = plan_forward(c, target).multiply;
  for (const int most_rows : {4, 2, 1}) {
    if (multiply == Multiply::fma) break;
    WeightPlans plan = {weight_tiles(c, multiply, true, most_rows),
                        weight_tiles(c, multiply, false, most_rows)};
    if (plan.shared_bytes() > target.shared_bytes || plan.x.total >= int64_t(1) << 30) continue;
    split_tiles(plan, target);
    return plan;
  }
  return {weight_fma(c, target, true), weight_fma(c, target, false)};
}

// Chooses the tiles of a data gradient; with `windows` only tiles of whole pooling windows. Returns
// false if there are none.
inline bool plan_data(DataPlan& plan, const Cell& c, const Target& target, bool of_x,
                      bool windows) {
  const int64_t height = of_x ? c.H : c.Ho(), width = of_x ? c.W : c.Wo();
  const int64_t columns = of_x ? c.Cin : c.C, images = of_x ? c.T * c.N : c.N;
  const auto choose_tiling = [&](int pixels) {
    plan.tiling = Tiling();
    if (!choose_tile(c, height, width, pixels, windows, plan.tiling)) return false;
    cover(plan.tiling, c, images, columns, plan.channels());
    return true;
  };
  plan.multiply = plan_forward(c, target).multiply;  // the gates' type is the forward pass's choice
  if (plan.mma()) {
    plan.tiles = columns <= 32 ? 2 : 8;
    const auto fits = [&](const BlockShape& shape) {
      if ((shape.n == 2) != (columns > 16 && columns <= 32) || !choose_tiling(32 * shape.m))
        return false;
      MmaBuilder builder = plan.builder();
      const Segment window = gates_window(c, of_x);
      builder.add(window, MmaDepth(builder.type, window), plan.tiling);
      builder.finish(nullptr, 0, plan.threads());
      return BackwardShared(plan, builder.conv, windows).bytes <= target.shared_bytes;
    };
    if (choose_shape(plan, kDataShapes, of_x ? -1 : target.data_shape, target, fits)) return true;
  }
  const size_t bytes = c.dtype == DType::float64 ? fma::BackwardShared<double>::bytes(windows)
                                                 : fma::BackwardShared<float>::bytes(windows);
  return int64_t(bytes) <= target.shared_bytes && choose_tiling(fma::kPixels);
}

inline int64_t backward_blocks(const Cell& c, const BackwardPlan& plan) {
  const int64_t spreading = c.N * ceil_div(c.C * c.Ho() * c.Wo(), 128);
  return std::max({plan.to_mem.tiling.blocks(), plan.to_x.tiling.blocks(), spreading});
}

inline BackwardPlan plan_backward(const Cell& c, const Target& target) {
  BackwardPlan plan;
  const bool windows = c.pool != Pool::none;
  plan.spreads = plan_data(plan.to_mem, c, target, false, windows);
  if (!plan.spreads) plan_data(plan.to_mem, c, target, false, false);
  plan_data(plan.to_x, c, target, true, false);
  return plan;
}

}  // namespace snnlstm::cuda
