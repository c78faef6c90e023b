// Plans the weight's gradient over all steps: its tiles, and the parts in which it is summed.
#pragma once

#include "step_plans.h"
#include "weight_tile.h"

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
  bool fits_banks = true;

  bool mma() const { return multiply != Multiply::fma; }
  int threads() const { return 32 * weight_tile::kWarpColumns * warp_rows * tap_groups; }
  int row_blocks() const { return part_rows / (32 * warp_rows); }
  int64_t blocks() const {  // of a split
    return mma() ? int64_t(column_blocks) * row_blocks() : int64_t(part_rows) * part_columns / 4096;
  }
  // What a split's share is a multiple of: fma a chunk of pixels, mma a tile.
  int64_t unit() const { return mma() ? 1 : fma::kDepthUnit; }
  int64_t units() const { return ceil_div(total, unit()); }
  // Splits into so many shares, or fewer if these are enough.
  void split(int64_t wanted) {
    share = std::max<int64_t>(ceil_div(units(), wanted), 1) * unit();
    splits = int(std::max<int64_t>(ceil_div(total, share), 1));
  }
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
inline WeightPlan weight_tiles(const Cell& c, Multiply multiply, bool of_x, int most_rows,
                               const TileSize& size) {
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
  cut(w.tiling, c, s.Ho, s.Wo, size);
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.total = w.tiling.tiles();
  const MmaSegment source = mma_segment(in, type, depth, w.tiling);
  w.buffer_bytes = int(neighbourhood_bytes(source));
  w.fits_banks = rows_fit_banks(source, w.tiling.w);
  w.column_pitch = int(round_up(depth.channels, weight_tile::kChannels));
  w.part_rows = int(round_up(4 * s.Cp, 32 * w.warp_rows));
  w.part_columns = int(depth.taps * w.column_pitch);
  w.tap_stride = depth.patches ? in.channels : w.column_pitch;
  w.column_blocks = int(w.column_pitch / weight_tile::kChannels *
                        ceil_div(depth.taps, weight_tile::kTaps * w.tap_groups));
  return w;
}

// The same without tensor cores, of both halves. columns: of a tile.
inline WeightPlan weight_fma(const Cell& c, int columns) {
  const Shape s(c);
  WeightPlan w;
  w.tiling.by_rows = Divisor(std::max<int64_t>(s.Ho, 1));
  w.tiling.by_cols = Divisor(std::max<int64_t>(s.Wo, 1));
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.columns = columns;
  w.part_rows = int(round_up(4 * s.Cp, columns));
  w.part_columns = int(round_up(s.taps * (c.Cin + c.C), 4096 / columns));
  w.total = c.T * c.N * s.pixels;
  return w;
}

// Plans both halves of the weight for one launch: the most rows and the tile that fit first, on
// tensor cores if there are any, with rows that meet the same banks only if no others fit.
inline WeightPlans plan_weights(const Cell& c, const Device& device, Multiply multiply) {
  const auto with_splits = [&](WeightPlans plans) {
    const int64_t blocks = plans.x.blocks() + (plans.side_by_side() ? 0 : plans.mem.blocks());
    const int64_t pixels = plans.x.mma() ? weight_tile::kPixels : fma::kDepthUnit;
    const int64_t splits = rules::splits(device, blocks, plans.x.units() * pixels);
    for (WeightPlan* w : {&plans.x, &plans.mem}) w->split(splits);
    return plans;
  };
  const auto sizes = tile_sizes(c, c.Ho(), c.Wo(), weight_tile::kPixels, false);
  for (const bool any : {false, true})
    for (const TileSize& size : sizes)
      for (const int most_rows : {4, 2, 1}) {
        if (multiply == Multiply::fma) break;
        const WeightPlans plans = {weight_tiles(c, multiply, true, most_rows, size),
                                   weight_tiles(c, multiply, false, most_rows, size)};
        if (plans.shared_bytes() <= device.shared_bytes && plans.x.total < int64_t(1) << 30 &&
            (any || (plans.x.fits_banks && plans.mem.fits_banks)))
          return with_splits(plans);
      }
  // The fewest rows and columns that the tiles add: of equals the widest.
  std::optional<WeightPlan> best;
  for (const int columns : {64, 32}) {
    const WeightPlan w = weight_fma(c, columns);
    if (!best || (c.dtype != DType::float64 && w.blocks() < best->blocks())) best = w;
  }
  WeightPlans plans = {*best, *best};
  plans.x.tap_stride = int(c.Cin), plans.mem.tap_stride = int(c.C);
  return with_splits(plans);
}

}  // namespace snnlstm::cuda
