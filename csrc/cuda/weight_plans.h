// Plans the weight's gradient over all steps: its tiles, and the parts in which it is summed.
#pragma once

#include "step_plans.h"
#include "weight_gradient_mma.cuh"

namespace snnlstm::cuda {

struct WeightPlan {
  Multiply multiply = Multiply::fma;
  Tiling tiling;
  int splits = 1;
  int64_t share = 0, total = 0;  // of a split, of all: pixels (fma) or tiles (mma)
  int part_rows = 0, part_columns = 0, tap_stride = 0;
  int columns = 64;  // fma: rows of the gradient in a block, columns of its tile
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

  // Whether the columns of x and of mem lie in the same parts.
  bool side_by_side() const { return !x.mma(); }
  int threads() const { return std::max(x.threads(), mem.threads()); }
  // The shared memory on tensor cores: the stages of the larger half, then each thread's totals.
  int totals() const { return std::max(x.stage_bytes(), mem.stage_bytes()); }
  int shared_bytes() const { return totals() + 4 * weight_tile::kSums * threads(); }
};

// Plans one half of the weight's gradient on tensor cores, but for its splits.
inline WeightPlan weight_tiles(const Cell& c, Multiply multiply, bool of_x, int most_rows) {
  const Shape s(c);
  const MmaType type(multiply);
  const Segment in = of_x ? x_segment(c) : mem_segment(c);
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

// The same without tensor cores, of both halves: three blocks for each multiprocessor, of 256
// pixels or more.
inline WeightPlans weight_fma(const Cell& c, const Device& device) {
  const Shape s(c);
  const int64_t rows = 4 * s.Cp, columns = s.taps * (c.Cin + c.C);
  WeightPlan w;
  w.tiling.by_rows = Divisor(std::max<int64_t>(s.Ho, 1));
  w.tiling.by_cols = Divisor(std::max<int64_t>(s.Wo, 1));
  cover(w.tiling, c, c.T * c.N, 1, 1);
  double best = 0;
  for (const fma::TileCost& tile : fma::kTiles) {
    if (tile.columns < (c.dtype == DType::float64 ? 64 : 32)) continue;
    const int64_t part_rows = round_up(rows, tile.columns);
    const int64_t part_columns = round_up(columns, 4096 / tile.columns);
    const double time = double(part_rows) * double(part_columns) * tile.time;
    if (best > 0 && time >= best) continue;
    best = time, w.columns = tile.columns;
    w.part_rows = int(part_rows), w.part_columns = int(part_columns);
  }
  w.total = c.T * c.N * s.pixels;
  const int64_t blocks = int64_t(w.part_rows) * w.part_columns / 4096;
  const int64_t splits =
      std::clamp<int64_t>(std::min(3 * device.multiprocessors / blocks, w.total / 256), 1, 1024);
  w.share = std::max<int64_t>(round_up(ceil_div(w.total, splits), fma::kDepthUnit), 1);
  w.splits = int(std::max<int64_t>(ceil_div(w.total, w.share), 1));
  WeightPlans plans = {w, w};
  plans.x.tap_stride = int(c.Cin), plans.mem.tap_stride = int(c.C);
  return plans;
}

// The time of a block's tile over the time in which a split's part of the gradient is written and
// read again to be added. Tensor cores are taken to do 200 multiplications while memory moves 3
// bytes, as an H100's data sheet says; a sweep over splits would measure the ratio.
constexpr int64_t kPartsPerTile = 24;

// Chooses the number of splits with which the multiprocessors, of one block each, end soonest.
inline void split_tiles(WeightPlans& plan, const Device& device) {
  const int64_t blocks = int64_t(plan.x.column_blocks) * plan.x.row_blocks() +
                         int64_t(plan.mem.column_blocks) * plan.mem.row_blocks();
  const int64_t total = plan.x.total;
  int64_t best = 1, best_time = -1;
  for (int64_t splits = 1; splits <= std::max<int64_t>(total / 4, 1); ++splits) {
    const int64_t waves = ceil_div(blocks * splits, device.multiprocessors);
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
inline WeightPlans plan_weights(const Cell& c, const Device& device, Multiply multiply) {
  for (const int most_rows : {4, 2, 1}) {
    if (multiply == Multiply::fma) break;
    WeightPlans plan = {weight_tiles(c, multiply, true, most_rows),
                        weight_tiles(c, multiply, false, most_rows)};
    if (plan.shared_bytes() > device.shared_bytes || plan.x.total >= int64_t(1) << 30) continue;
    split_tiles(plan, device);
    return plan;
  }
  return weight_fma(c, device);
}

// What a launch for both halves of the weight does, but for the memory of its sources: a block of
// the larger half decides.
inline Work weight_work(const WeightPlans& plans) {
  Work work;
  for (const WeightPlan* w : {&plans.x, &plans.mem}) {
    const bool mma = w->mma();
    const int64_t rows = mma ? 32 * w->warp_rows : w->columns;
    const int64_t taps = mma ? weight_tile::kTaps * w->tap_groups : 1;
    const int64_t columns = mma ? weight_tile::kChannels : 4096 / w->columns;
    const int64_t pixels = w->share * (mma ? weight_tile::kPixels : 1);
    const int64_t blocks = mma ? int64_t(w->column_blocks) * w->row_blocks()
                               : w->part_rows / rows * (w->part_columns / columns);
    const double time = mma ? 1 : fma::time_of(w->columns);
    work.blocks += blocks * w->splits;
    work.warps = mma ? w->threads() / 32 : fma::kThreads / 32;
    work.products = std::max(work.products, double(rows * columns * taps) * double(pixels) * time);
    work.cache_bytes = std::max(work.cache_bytes, 4.0 * double(rows + columns) * double(pixels));
    work.memory += 2.0 * double(w->part_bytes(DType::float32));
    if (plans.side_by_side()) break;
  }
  work.shared_bytes = plans.mem.mma() ? plans.shared_bytes() : 0;
  return work;
}

}  // namespace snnlstm::cuda
