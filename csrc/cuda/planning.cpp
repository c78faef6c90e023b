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
  std::vector<TileSize> sizes;
  if (only.h > 0) {
    if (only.h * only.w <= pixels && only.h % unit_h == 0 && only.w % unit_w == 0)
      sizes.push_back({only.h, only.w, 0});
    return sizes;
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
      sizes.push_back({int(h), int(w), rows * columns * (4 * pixels + read)});
    }
  }
  const auto less = [](const TileSize& a, const TileSize& b) { return a.cost < b.cost; };
  std::stable_sort(sizes.begin(), sizes.end(), less);
  while (!sizes.empty() && sizes.back().cost >= 2 * sizes.front().cost) sizes.pop_back();
  return sizes;
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

// The best step so far, by rules::busiest().
template <class Step>
struct Best {
  std::optional<Step> step;
  double least = 0;

  void offer(const Device& device, const Step& other) {
    const int64_t outputs = int64_t(other.pixels()) * other.channels();
    const double load = rules::busiest(
        device, {other.tiling.blocks(), outputs, other.threads(), other.shared_bytes});
    if (!step || load < rules::kClearly * least) {
      step = other;
      least = load;
    }
  }
};

// Offers every tile of the step's blocks that fits. fits(any) tests the step. any: whether rows may
// meet the same banks, which is tried if no tile fits otherwise.
template <class Step, class Fits>
void offer_tiles(Best<Step>& best, const Device& device, Step& step,
                 const std::vector<TileSize>& sizes, const Cell& c, int64_t height, int64_t width,
                 Fits&& fits) {
  bool fitted = false;
  for (const bool any : {false, true}) {
    for (const TileSize& size : sizes) {
      cut(step.tiling, c, height, width, size);
      if (!fits(any)) continue;
      best.offer(device, step);
      fitted = true;
    }
    if (fitted) return;
  }
}

}  // namespace

int64_t forward_shared_bytes(const ForwardBlocks& step, const MmaConv& conv, bool pools) {
  int64_t epilogue = int64_t(8 * step.channels_per_thread()) * step.threads() * 4;
  if (pools) epilogue += int64_t(step.channels()) * step.mem_pitch() * 4;
  return round_up(std::max<int64_t>(conv.shared_bytes(), epilogue), 128);
}

ForwardBlocks forward_blocks(const Cell& c, const Device& device, Matrix matrix,
                             const BlockChoice& only) {
  const bool pools = c.pool != Pool::none;
  ForwardBlocks step;
  Best<ForwardBlocks> best;
  const auto offer = [&](auto&& fits) {
    std::vector<TileSize> sizes = tile_sizes(c, c.Ho(), c.Wo(), step.pixels(), pools, only);
    step.fires = !sizes.empty();
    if (!step.fires) sizes = tile_sizes(c, c.Ho(), c.Wo(), step.pixels(), false, only);
    cover(step.tiling, c, c.N, c.C, step.channels());
    offer_tiles(best, device, step, sizes, c, c.Ho(), c.Wo(), fits);
  };
  step.multiply = wanted_multiply(c, device, matrix);
  if (step.mma()) {
    step.tiles = c.C <= 8 ? 4 : 8;
    for (const BlockShape& block : kForwardShapes) {
      step.shape = int(&block - kForwardShapes);
      if ((only.shape >= 0 && only.shape != step.shape) || (block.n == 2 && c.C <= 16)) continue;
      step.warps_m = block.m;
      step.warps_n = block.n;
      step.k_groups = block.k;
      offer([&](bool any) {
        MmaBuilder builder = step.builder();
        builder.add(x_segment(c), x_depth(c, step.multiply), step.tiling);
        builder.add(mem_segment(c), mem_depth(c, step.multiply), step.tiling);
        builder.finish(nullptr, 0, step.threads());
        step.shared_bytes =
            forward_shared_bytes(step, builder.conv, pools) + 5 * step.channels() * 4;
        return step.shared_bytes <= device.shared_bytes && (any || builder.fits_banks);
      });
    }
    if (best.step) return *best.step;
    step = ForwardBlocks();
  }
  for (const int columns : {64, 32}) {
    if (c.dtype == DType::float64 && columns < 64) continue;
    step.columns = columns;
    offer([](bool) { return true; });
  }
  return planned(best.step, only);
}

BackwardLayout::BackwardLayout(const DataBlocks& step, const MmaConv& conv, bool with_mem) {
  mem_tile = 8 * step.tiles * step.threads() * 4;
  mem_pitch = 32 * step.warps_m + 2;
  const int epilogue = mem_tile + (with_mem ? step.channels() * mem_pitch * 4 : 0);
  vectors = int(round_up(std::max(conv.shared_bytes(), epilogue), 128));
  row_sums = vectors + step.channels() * 4;
  bytes = row_sums + step.k_groups * step.warps_m * step.channels() * 4;
}

std::optional<DataBlocks> data_blocks(const Cell& c, const Device& device, Multiply multiply,
                                      bool is_x, bool windows, const BlockChoice& only) {
  const int64_t height = is_x ? c.H : c.Ho();
  const int64_t width = is_x ? c.W : c.Wo();
  const int64_t columns = is_x ? c.Cin : c.C;
  const int64_t images = is_x ? c.T * c.N : c.N;
  DataBlocks step;
  Best<DataBlocks> best;
  const auto offer = [&](auto&& fits) {
    cover(step.tiling, c, images, columns, step.channels());
    offer_tiles(best, device, step, tile_sizes(c, height, width, step.pixels(), windows, only), c,
                height, width, fits);
  };
  step.multiply = multiply;
  if (step.mma()) {
    // A warp reads its pixels once for all its tiles. A product takes 384 bytes of shared memory
    // with 2 tiles, 256 with 4 and 192 with 8.
    step.tiles = columns <= 16 ? 2 : columns <= 32 ? 4 : 8;
    const Segment segment = gates_segment(c, is_x);
    for (const BlockShape& block : kDataShapes) {
      step.shape = int(&block - kDataShapes);
      if (only.shape >= 0 && only.shape != step.shape) continue;
      step.warps_m = block.m;
      step.warps_n = block.n;
      step.k_groups = block.k;
      offer([&](bool any) {
        MmaBuilder builder = step.builder();
        builder.add(segment, MmaDepth(builder.type, segment), step.tiling);
        builder.finish(nullptr, 0, step.threads());
        step.shared_bytes = BackwardLayout(step, builder.conv, windows).bytes;
        return step.shared_bytes <= device.shared_bytes && (any || builder.fits_banks);
      });
    }
    if (best.step) return best.step;
    step = DataBlocks();
  }
  for (const int tile : {64, 32, 16}) {
    if (c.dtype == DType::float64 && tile < 64) continue;
    step.columns = tile;
    with_tile<16>(c.dtype, step.columns, [&](auto real, auto size) {
      step.shared_bytes = int64_t(fma::StepShared<decltype(real), decltype(size)>::bytes(windows));
    });
    if (step.shared_bytes <= device.shared_bytes) offer([](bool) { return true; });
  }
  return best.step;
}

// ---- packed weights -----------------------------------------------------------------------------

namespace {

// columns: of all blocks.
PackedPart packed_fma(const Cell& c, const StepBlocks& step, const Segment& segment, Use use,
                      int64_t columns) {
  PackedPart part;
  part.use = use;
  part.columns = step.columns;
  part.pitch = fma::depth(segment) * part.columns * std::max(bytes_of(c.dtype), 4);
  part.blocks = ceil_div(columns, part.columns);
  return part;
}

PackedPart packed_mma(const StepBlocks& step, const MmaDepth& depth, Use use, int64_t blocks) {
  PackedPart part;
  part.use = use;
  part.multiply = step.multiply;
  part.depth = depth;
  part.tiles = step.tiles;
  part.warps_n = step.warps_n;
  part.unit_bytes = step.builder().conv.unit_bytes;
  part.blocks = blocks;
  part.pitch = depth.units() * part.unit_bytes;
  return part;
}

PackedPart packed_transposed(const Cell& c, const DataBlocks& step, Use use) {
  const bool is_x = use == Use::gates_to_x;
  const int64_t columns = is_x ? c.Cin : c.C;
  if (!step.mma()) return packed_fma(c, step, gates_segment(c, is_x), use, columns);
  const MmaDepth depth(MmaType(step.multiply), gates_segment(c, is_x));
  return packed_mma(step, depth, use, ceil_div(columns, step.channels()));
}

}  // namespace

// On tensor cores a block has the units of x, then those of mem.
Packed packed_forward(const Cell& c, const ForwardBlocks& step) {
  Packed p;
  if (!step.mma()) {
    p.x = packed_fma(c, step, x_segment(c), Use::x_to_gates, 4 * c.C);
    p.mem = packed_fma(c, step, mem_segment(c), Use::mem_to_gates, 4 * c.C);
    p.mem.start = p.x.bytes();
    p.bytes = p.x.bytes() + p.mem.bytes();
    return p;
  }
  const int64_t blocks = ceil_div(c.C, step.channels());
  p.x = packed_mma(step, x_depth(c, step.multiply), Use::x_to_gates, blocks);
  p.mem = packed_mma(step, mem_depth(c, step.multiply), Use::mem_to_gates, blocks);
  p.mem.start = p.x.pitch;
  p.x.pitch = p.mem.pitch = p.x.pitch + p.mem.pitch;
  p.bytes = p.x.bytes();
  return p;
}

Packed packed_backward(const Cell& c, const DataBlocks& to_x, const DataBlocks& to_mem) {
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
int64_t blocks_of(const WeightBlocks& w) {
  return w.mma() ? int64_t(w.column_blocks) * w.row_blocks()
                 : int64_t(w.part_rows) * w.part_columns / 4096;
}

// Plans one half of the weight's gradient on tensor cores, except its splits.
WeightBlocks weight_tiles(const Cell& c, Multiply multiply, bool is_x, int most_rows,
                          const TileSize& size) {
  const Shape s(c);
  const MmaType type(multiply);
  const Segment in = is_x ? x_segment(c) : mem_segment(c);
  const MmaDepth depth = is_x ? x_depth(c, multiply) : mem_depth(c, multiply);
  WeightBlocks w;
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
WeightBlocks weight_fma(const Cell& c, int columns) {
  const Shape s(c);
  WeightBlocks w;
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

int BothWeightBlocks::totals() const {
  const MmaType type(x.multiply);
  const int planes_of_warp = 32 / (64 / type.element);
  const auto bytes = [&](const WeightBlocks& w) {
    return weight_tile::kTableBytes +
           2 * weight_tile::stage_bytes(w.warp_rows * planes_of_warp,
                                        weight_tile::kChannels / (64 / type.element),
                                        w.buffer_bytes);
  };
  return std::max(bytes(x), bytes(mem));
}

BothWeightBlocks both_weight_blocks(const Cell& c, const Device& device, Multiply multiply) {
  const auto with_splits = [&](BothWeightBlocks both) {
    const int64_t blocks = blocks_of(both.x) + (both.side_by_side() ? 0 : blocks_of(both.mem));
    const int64_t unit = both.x.mma() ? 1 : fma::kDepthUnit;
    const int64_t pixels = both.x.mma() ? weight_tile::kPixels : fma::kDepthUnit;
    const int64_t splits = rules::splits(device, blocks, ceil_div(both.x.total, unit) * pixels);
    for (WeightBlocks* w : {&both.x, &both.mem}) {
      // A share is a multiple of a tile (mma), or of a chunk of pixels (fma).
      w->share = std::max<int64_t>(ceil_div(ceil_div(w->total, unit), splits), 1) * unit;
      w->splits = int(std::max<int64_t>(ceil_div(w->total, w->share), 1));
    }
    return both;
  };
  const auto sizes = tile_sizes(c, c.Ho(), c.Wo(), weight_tile::kPixels, false);
  for (const bool any : {false, true})
    for (const TileSize& size : sizes)
      for (const int most_rows : {4, 2, 1}) {
        if (multiply == Multiply::fma) break;
        const BothWeightBlocks both = {weight_tiles(c, multiply, true, most_rows, size),
                                       weight_tiles(c, multiply, false, most_rows, size)};
        if (both.shared_bytes() <= device.shared_bytes && both.x.total < int64_t(1) << 30 &&
            (any || (both.x.fits_banks && both.mem.fits_banks)))
          return with_splits(both);
      }
  // The tiles add the fewest rows and columns. Of equal tiles the widest wins.
  std::optional<WeightBlocks> best;
  for (const int columns : {64, 32}) {
    const WeightBlocks w = weight_fma(c, columns);
    if (!best || (c.dtype != DType::float64 && blocks_of(w) < blocks_of(*best))) best = w;
  }
  BothWeightBlocks both = {*best, *best};
  both.x.tap_stride = int(c.Cin);
  both.mem.tap_stride = int(c.C);
  return with_splits(both);
}

}  // namespace snnlstm::cuda
