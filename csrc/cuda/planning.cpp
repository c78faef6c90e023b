#include "planning.h"

namespace snnlstm::cuda {

DType gate_type(DType states, Matrix matrix) {
  if (states != DType::float32) return states;
  return matrix == Matrix::float16    ? DType::float16
         : matrix == Matrix::bfloat16 ? DType::bfloat16
                                      : states;
}

int64_t padded_channels(int64_t C) {
  Cell cell;
  cell.C = C;
  return Shape(cell).Cp;
}

Matrix full_precision(const Device& device) {
  return rules::three_products_beat_one(device.compute_capability) ? Matrix::tf32x3 : Matrix::exact;
}

std::vector<TileSize> tile_sizes(const Cell& c, int64_t height, int64_t width, int pixels,
                                 bool windows, const BlockChoice& only) {
  const int64_t unit_h = windows ? c.pool_h : 1;
  const int64_t unit_w = windows && c.pool_w % 2 ? 2 * int64_t(c.pool_w) : windows ? c.pool_w : 2;
  const int64_t halo = std::min<int64_t>(2 * c.pad_h(), 1 << 16);
  const auto count = [](int64_t all, int64_t size) {
    return ceil_div(std::max<int64_t>(all, 1), size);
  };
  std::vector<TileSize> found;
  if (only.h > 0) {
    if (only.h * only.w <= pixels && only.h % unit_h == 0 && only.w % unit_w == 0)
      found.push_back({only.h, only.w, 0});
    return found;
  }
  for (int64_t w = unit_w; unit_h * w <= pixels; w += unit_w) {
    const int64_t columns = count(width, w);
    const bool fits_banks = w % 16 == 0 && w < width;
    if (w > unit_w && count(width, w - unit_w) == columns && !fits_banks) continue;
    for (int64_t h = unit_h; h * w <= pixels; h += unit_h) {
      const int64_t rows = count(height, h);
      if (h > unit_h && count(height, h - unit_h) == rows) continue;
      // In sectors of 8 numbers. A row that continues beyond the tile costs one more at each end.
      const int64_t read = (h + halo) * (ceil_div(w, 8) + (w < width ? 2 : 0)) * 8;
      found.push_back({int(h), int(w), rows * columns * (4 * pixels + read)});
    }
  }
  const auto less = [](const TileSize& a, const TileSize& b) { return a.cost < b.cost; };
  std::stable_sort(found.begin(), found.end(), less);
  while (!found.empty() && found.back().cost >= 2 * found.front().cost) found.pop_back();
  return found;
}

void cut(Tiling& tiling, const Cell& c, int64_t height, int64_t width, const TileSize& size) {
  const int64_t w = size.w, h = size.h;
  tiling.h = size.h, tiling.w = size.w;
  tiling.by_w = SmallDivisor(w);
  tiling.by_rows = Divisor(std::max<int64_t>(ceil_div(height, h), 1));
  tiling.by_cols = Divisor(std::max<int64_t>(ceil_div(width, w), 1));
  tiling.by_window = SmallDivisor(std::max<int64_t>(w / c.pool_w, 1));
  tiling.by_windows = SmallDivisor(std::max<int64_t>(h / c.pool_h * (w / c.pool_w), 1));
}

void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int channels) {
  tiling.images = images;
  tiling.by_batch = Divisor(std::max<int64_t>(c.N, 1));
  tiling.by_columns = Divisor(ceil_div(columns, channels));
}

// ---- steps --------------------------------------------------------------------------------------

namespace {

Multiply wanted_multiply(const Cell& cell, const Device& device, Matrix matrix) {
  if (device.compute_capability < 75 || cell.dtype == DType::float64) return Multiply::fma;
  if (device.compute_capability < 80) {
    const bool fp16 =
        cell.dtype == DType::float16 || (cell.dtype == DType::float32 && matrix == Matrix::float16);
    return fp16 ? Multiply::fp16_sm75 : Multiply::fma;
  }
  if (cell.dtype == DType::float16) return Multiply::fp16;
  if (cell.dtype == DType::bfloat16) return Multiply::bf16;
  constexpr Multiply by_matrix[] = {Multiply::fma, Multiply::tf32, Multiply::tf32x3, Multiply::fp16,
                                    Multiply::bf16};
  return by_matrix[int(matrix)];
}

// The best plan so far, by rules::busiest().
template <class Plan>
struct Best {
  std::optional<Plan> plan;
  double load = 0;

  void offer(const Device& device, const Plan& other) {
    const int64_t outputs = int64_t(other.pixels()) * other.channels();
    const double its = rules::busiest(
        device, {other.tiling.blocks(), outputs, other.threads(), other.shared_bytes});
    if (!plan || its < rules::kClearly * load) plan = other, load = its;
  }
};

// Offers every tile of the plan's blocks that fits. fits(any) tests the plan. any: whether rows may
// meet the same banks, which is tried if no tile fits otherwise.
template <class Step, class Fits>
void offer_tiles(Best<Step>& best, const Device& device, Step& plan,
                 const std::vector<TileSize>& sizes, const Cell& c, int64_t height, int64_t width,
                 Fits&& fits) {
  bool found = false;
  for (const bool any : {false, true}) {
    for (const TileSize& size : sizes) {
      cut(plan.tiling, c, height, width, size);
      if (!fits(any)) continue;
      best.offer(device, plan);
      found = true;
    }
    if (found) return;
  }
}

}  // namespace

int64_t forward_shared_bytes(const ForwardPlan& plan, const MmaConv& conv, bool pools) {
  int64_t epilogue = int64_t(8 * plan.channels_per_thread()) * plan.threads() * 4;
  if (pools) epilogue += int64_t(plan.channels()) * plan.mem_pitch() * 4;
  return round_up(std::max<int64_t>(conv.shared_bytes(), epilogue), 128);
}

ForwardPlan plan_forward(const Cell& c, const Device& device, Matrix matrix,
                         const BlockChoice& only) {
  const bool pools = c.pool != Pool::none;
  ForwardPlan plan;
  Best<ForwardPlan> best;
  const auto offer = [&](auto&& fits) {
    std::vector<TileSize> sizes;
    if (!c.inhibition) sizes = tile_sizes(c, c.Ho(), c.Wo(), plan.pixels(), pools, only);
    plan.fires = !sizes.empty();
    if (!plan.fires) sizes = tile_sizes(c, c.Ho(), c.Wo(), plan.pixels(), false, only);
    cover(plan.tiling, c, c.N, c.C, plan.channels());
    offer_tiles(best, device, plan, sizes, c, c.Ho(), c.Wo(), fits);
  };
  plan.multiply = wanted_multiply(c, device, matrix);
  if (plan.mma()) {
    plan.tiles = c.C <= 8 ? 4 : 8;
    for (const BlockShape& block : kForwardShapes) {
      plan.shape = int(&block - kForwardShapes);
      if ((only.shape >= 0 && only.shape != plan.shape) || (block.n == 2 && c.C <= 16)) continue;
      plan.warps_m = block.m, plan.warps_n = block.n, plan.k_groups = block.k;
      offer([&](bool any) {
        MmaBuilder builder = plan.builder();
        builder.add(x_segment(c), x_depth(c, plan.multiply), plan.tiling);
        builder.add(mem_segment(c), mem_depth(c, plan.multiply), plan.tiling);
        builder.finish(nullptr, 0, plan.threads());
        plan.shared_bytes =
            forward_shared_bytes(plan, builder.conv, pools) + 5 * plan.channels() * 4;
        return plan.shared_bytes <= device.shared_bytes && (any || builder.fits_banks);
      });
    }
    if (best.plan) return *best.plan;
    plan = ForwardPlan();
  }
  for (const int columns : {64, 32}) {
    if (c.dtype == DType::float64 && columns < 64) continue;
    plan.columns = columns;
    offer([](bool) { return true; });
  }
  return planned(best.plan, only);
}

BackwardLayout::BackwardLayout(const DataPlan& plan, const MmaConv& conv, bool with_mem) {
  mem_tile = 8 * plan.tiles * plan.threads() * 4;
  mem_pitch = 32 * plan.warps_m + 2;
  const int epilogue = mem_tile + (with_mem ? plan.channels() * mem_pitch * 4 : 0);
  vectors = int(round_up(std::max(conv.shared_bytes(), epilogue), 128));
  row_sums = vectors + plan.channels() * 4;
  bytes = row_sums + plan.k_groups * plan.warps_m * plan.channels() * 4;
}

std::optional<DataPlan> plan_data(const Cell& c, const Device& device, Multiply multiply, bool is_x,
                                  bool windows, const BlockChoice& only) {
  const int64_t height = is_x ? c.H : c.Ho(), width = is_x ? c.W : c.Wo();
  const int64_t columns = is_x ? c.Cin : c.C, images = is_x ? c.T * c.N : c.N;
  DataPlan plan;
  Best<DataPlan> best;
  const auto offer = [&](auto&& fits) {
    cover(plan.tiling, c, images, columns, plan.channels());
    offer_tiles(best, device, plan, tile_sizes(c, height, width, plan.pixels(), windows, only), c,
                height, width, fits);
  };
  plan.multiply = multiply;
  if (plan.mma()) {
    // A warp reads its pixels once for all its tiles. A product takes 384 bytes of shared memory
    // with 2 tiles, 256 with 4 and 192 with 8.
    plan.tiles = columns <= 16 ? 2 : columns <= 32 ? 4 : 8;
    const Segment segment = gates_segment(c, is_x);
    for (const BlockShape& block : kDataShapes) {
      plan.shape = int(&block - kDataShapes);
      if (only.shape >= 0 && only.shape != plan.shape) continue;
      plan.warps_m = block.m, plan.warps_n = block.n, plan.k_groups = block.k;
      offer([&](bool any) {
        MmaBuilder builder = plan.builder();
        builder.add(segment, MmaDepth(builder.type, segment), plan.tiling);
        builder.finish(nullptr, 0, plan.threads());
        plan.shared_bytes = BackwardLayout(plan, builder.conv, windows).bytes;
        return plan.shared_bytes <= device.shared_bytes && (any || builder.fits_banks);
      });
    }
    if (best.plan) return best.plan;
    plan = DataPlan();
  }
  for (const int tile : {64, 32, 16}) {
    if (c.dtype == DType::float64 && tile < 64) continue;
    plan.columns = tile;
    with_tile<16>(c.dtype, plan.columns, [&](auto real, auto size) {
      plan.shared_bytes = int64_t(fma::StepShared<decltype(real), decltype(size)>::bytes(windows));
    });
    if (plan.shared_bytes <= device.shared_bytes) offer([](bool) { return true; });
  }
  return best.plan;
}

// ---- packed weights -----------------------------------------------------------------------------

namespace {

// columns: of all blocks.
PackedPart packed_fma(const Cell& c, const StepPlan& plan, const Segment& segment, Use use,
                      int64_t columns) {
  PackedPart part;
  part.use = use, part.columns = plan.columns;
  part.pitch = fma::depth(segment) * part.columns * std::max(bytes_of(c.dtype), 4);
  part.blocks = ceil_div(columns, part.columns);
  return part;
}

PackedPart packed_mma(const StepPlan& plan, const MmaDepth& depth, Use use, int64_t blocks) {
  PackedPart part;
  part.use = use, part.multiply = plan.multiply;
  part.depth = depth;
  part.tiles = plan.tiles, part.warps_n = plan.warps_n;
  part.unit_bytes = plan.builder().conv.unit_bytes;
  part.blocks = blocks;
  part.pitch = depth.units() * part.unit_bytes;
  return part;
}

PackedPart packed_transposed(const Cell& c, const DataPlan& plan, Use use) {
  const bool is_x = use == Use::gates_to_x;
  const int64_t columns = is_x ? c.Cin : c.C;
  if (!plan.mma()) return packed_fma(c, plan, gates_segment(c, is_x), use, columns);
  const MmaDepth depth(MmaType(plan.multiply), gates_segment(c, is_x));
  return packed_mma(plan, depth, use, ceil_div(columns, plan.channels()));
}

}  // namespace

// On tensor cores a block has the units of x, then those of mem.
Packed packed_forward(const Cell& c, const ForwardPlan& plan) {
  Packed p;
  if (!plan.mma()) {
    p.x = packed_fma(c, plan, x_segment(c), Use::x_to_gates, 4 * c.C);
    p.mem = packed_fma(c, plan, mem_segment(c), Use::mem_to_gates, 4 * c.C);
    p.mem.start = p.x.bytes();
    p.bytes = p.x.bytes() + p.mem.bytes();
    return p;
  }
  const int64_t blocks = ceil_div(c.C, plan.channels());
  p.x = packed_mma(plan, x_depth(c, plan.multiply), Use::x_to_gates, blocks);
  p.mem = packed_mma(plan, mem_depth(c, plan.multiply), Use::mem_to_gates, blocks);
  p.mem.start = p.x.pitch;
  p.x.pitch = p.mem.pitch = p.x.pitch + p.mem.pitch;
  p.bytes = p.x.bytes();
  return p;
}

Packed packed_backward(const Cell& c, const DataPlan& to_x, const DataPlan& to_mem) {
  Packed p;
  p.x = packed_transposed(c, to_x, Use::gates_to_x);
  p.mem = packed_transposed(c, to_mem, Use::gates_to_mem);
  p.mem.start = p.x.bytes();
  p.bytes = p.x.bytes() + p.mem.bytes();
  return p;
}

// ---- the weight's gradient ----------------------------------------------------------------------

namespace {

// Returns the blocks of a split.
int64_t blocks_of(const WeightPlan& w) {
  return w.mma() ? int64_t(w.column_blocks) * w.row_blocks()
                 : int64_t(w.part_rows) * w.part_columns / 4096;
}

// Plans one half of the weight's gradient on tensor cores, except its splits.
WeightPlan weight_tiles(const Cell& c, Multiply multiply, bool is_x, int most_rows,
                        const TileSize& size) {
  const Shape s(c);
  const MmaType type(multiply);
  const Segment in = is_x ? x_segment(c) : mem_segment(c);
  const MmaDepth depth = is_x ? x_depth(c, multiply) : mem_depth(c, multiply);
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
  w.tap_stride = depth.im2col ? in.channels : w.column_pitch;
  w.column_blocks = int(w.column_pitch / weight_tile::kChannels *
                        ceil_div(depth.taps, weight_tile::kTaps * w.tap_groups));
  return w;
}

// The same without tensor cores, of both halves. columns: of a tile.
WeightPlan weight_fma(const Cell& c, int columns) {
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

}  // namespace

int WeightPlans::totals() const {
  const MmaType type(x.multiply);
  const int planes_of_warp = 32 / (64 / type.element);
  const auto bytes = [&](const WeightPlan& w) {
    return weight_tile::kTableBytes +
           2 * weight_tile::stage_bytes(w.warp_rows * planes_of_warp,
                                        weight_tile::kChannels / (64 / type.element),
                                        w.buffer_bytes);
  };
  return std::max(bytes(x), bytes(mem));
}

WeightPlans plan_weights(const Cell& c, const Device& device, Multiply multiply) {
  const auto with_splits = [&](WeightPlans plans) {
    const int64_t blocks = blocks_of(plans.x) + (plans.side_by_side() ? 0 : blocks_of(plans.mem));
    const int64_t unit = plans.x.mma() ? 1 : fma::kDepthUnit;
    const int64_t pixels = plans.x.mma() ? weight_tile::kPixels : fma::kDepthUnit;
    const int64_t splits = rules::splits(device, blocks, ceil_div(plans.x.total, unit) * pixels);
    for (WeightPlan* w : {&plans.x, &plans.mem}) {
      // A share is a multiple of a tile (mma), or of a chunk of pixels (fma).
      w->share = std::max<int64_t>(ceil_div(ceil_div(w->total, unit), splits), 1) * unit;
      w->splits = int(std::max<int64_t>(ceil_div(w->total, w->share), 1));
    }
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
  // The tiles add the fewest rows and columns. Of equal tiles the widest wins.
  std::optional<WeightPlan> best;
  for (const int columns : {64, 32}) {
    const WeightPlan w = weight_fma(c, columns);
    if (!best || (c.dtype != DType::float64 && blocks_of(w) < blocks_of(*best))) best = w;
  }
  WeightPlans plans = {*best, *best};
  plans.x.tap_stride = int(c.Cin), plans.mem.tap_stride = int(c.C);
  return with_splits(plans);
}

}  // namespace snnlstm::cuda
