// Chooses how the kernels of one step multiply, their tiles and their blocks, from the cell, the
// device and the matrix type: packed weights, saved tensors and workspaces always fit together.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "backward.cuh"
#include "forward.cuh"
#include "mma_segments.h"
#include "rules.h"

namespace snnlstm::cuda {

inline const char* name_of(Multiply m) {
  constexpr const char* names[] = {"fma",      "mma-fp16",   "mma-bf16",
                                   "mma-tf32", "mma-3xtf32", "mma-fp16"};
  return names[int(m)];
}

inline Multiply wanted_multiply(const Cell& cell, const Device& device, Matrix matrix) {
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

// The pixels of a tile. cost: the pixels that all tiles of an image compute and read.
struct TileSize {
  int h, w;
  int64_t cost;
};

// Returns tiles of at most `pixels` pixels, and with `windows` those of whole pooling windows, of
// which there may be none; the least cost comes first, and none has twice that. The width is even,
// since threads hold pairs of pixels. Of the tiles that are as many along an axis it takes the
// smallest, and those of 16 columns or a multiple. only: the one tile that is wanted, if any.
inline std::vector<TileSize> tile_sizes(const Cell& c, int64_t height, int64_t width, int pixels,
                                        bool windows, const BlockChoice& only = {}) {
  const int64_t unit_h = windows ? c.pool_h : 1;
  const int64_t unit_w = windows && c.pool_w % 2 ? 2 * int64_t(c.pool_w) : windows ? c.pool_w : 2;
  const int64_t halo = std::min<int64_t>(2 * c.pad_h(), 1 << 16);
  const auto count = [](int64_t all, int64_t of) {
    return ceil_div(std::max<int64_t>(all, 1), of);
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
      // In sectors of 8 numbers. A row that goes on beyond the tile costs one more at each end.
      const int64_t read = (h + halo) * (ceil_div(w, 8) + (w < width ? 2 : 0)) * 8;
      found.push_back({int(h), int(w), rows * columns * (4 * pixels + read)});
    }
  }
  const auto less = [](const TileSize& a, const TileSize& b) { return a.cost < b.cost; };
  std::stable_sort(found.begin(), found.end(), less);
  while (!found.empty() && found.back().cost >= 2 * found.front().cost) found.pop_back();
  return found;
}

// Cuts images into tiles of that size.
inline void cut(Tiling& tiling, const Cell& c, int64_t height, int64_t width,
                const TileSize& size) {
  const int64_t w = size.w, h = size.h;
  tiling.h = size.h, tiling.w = size.w;
  tiling.by_w = SmallDivisor(w);
  tiling.by_rows = Divisor(std::max<int64_t>(ceil_div(height, h), 1));
  tiling.by_cols = Divisor(std::max<int64_t>(ceil_div(width, w), 1));
  tiling.by_window = SmallDivisor(std::max<int64_t>(w / c.pool_w, 1));
  tiling.by_windows = SmallDivisor(std::max<int64_t>(h / c.pool_h * (w / c.pool_w), 1));
}

// The best plan so far, by rules::busiest().
template <class Plan>
struct Best {
  std::optional<Plan> plan;
  double load = 0;

  void offer(const Device& device, const Plan& other) {
    const double its = rules::busiest(device, other);
    if (!plan || its < rules::kClearly * load) plan = other, load = its;
  }
};

template <class Step>
Step planned(const std::optional<Step>& best, const BlockChoice& only) {
  if (best) return *best;
  throw std::runtime_error("no block has tiles of " + std::to_string(only.h) + "x" +
                           std::to_string(only.w) + " pixels");
}

// The two halves of the gates' convolution, of x and of mem, without their data.
inline Segment x_segment(const Cell& c) {
  Segment s;
  s.channels = int(c.Cin), s.height = int(c.H), s.width = int(c.W);
  s.taps_h = c.kernel_h, s.taps_w = c.kernel_w;
  s.dilation_h = c.dilation_h, s.dilation_w = c.dilation_w;
  s.pad_h = int(c.pad_h()), s.pad_w = int(c.pad_w());
  s.step_h = c.stride_h, s.step_w = c.stride_w;
  return s;
}
inline Segment mem_segment(const Cell& c) {
  Segment s = x_segment(c);
  s.channels = int(c.C), s.height = int(c.Ho()), s.width = int(c.Wo());
  s.step_h = s.step_w = 1;
  return s;
}

// The blocks of a step on tensor cores: warps along pixels, along channels and along K. The largest
// come first.
struct BlockShape {
  int m, n, k;
  std::string name() const {
    std::string text = std::to_string(m) + "x" + std::to_string(n);
    return k > 1 ? text + "x" + std::to_string(k) : text;
  }
};
constexpr BlockShape kForwardShapes[] = {{4, 2, 1}, {4, 1, 1}, {2, 2, 1}, {2, 1, 1}};
constexpr BlockShape kDataShapes[] = {{4, 1, 1}, {2, 1, 2}};

// A convolution with its epilogue.
struct StepPlan {
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
struct ForwardPlan : StepPlan {
  bool fires = true;  // false: a kernel behind the step fires

  int held() const { return mma() ? tiles / 2 : 1; }  // channels that a thread holds
  int channels() const { return mma() ? 2 * tiles * warps_n : columns / 4; }  // of a block
  int mem_pitch() const { return 32 * warps_m + (tiles == 8 ? 2 : 4); }
};

inline MmaDepth x_depth(const Cell& c, Multiply m) {
  return MmaDepth(MmaType(m), x_segment(c), true);
}
inline MmaDepth mem_depth(const Cell& c, Multiply m) {
  return MmaDepth(MmaType(m), mem_segment(c));
}

// Bytes of shared memory of a tensor core step. The epilogue takes the convolution's place.
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

// Offers every tile of the plan's blocks that fits. fits(any) is of the plan. any: whether rows may
// meet the same banks; that is asked if none fits.
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

// Plans a step. only: the blocks that may be chosen.
inline ForwardPlan plan_forward(const Cell& c, const Device& device, Matrix matrix,
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
    for (const BlockShape& of : kForwardShapes) {
      plan.shape = int(&of - kForwardShapes);
      if ((only.shape >= 0 && only.shape != plan.shape) || (of.n == 2 && c.C <= 16)) continue;
      plan.warps_m = of.m, plan.warps_n = of.n, plan.k_groups = of.k;
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

// Blocks of the largest launch of the forward pass.
inline int64_t forward_blocks(const Cell& c, const ForwardPlan& plan) {
  return std::max(plan.tiling.blocks(), c.N * ceil_div(c.C * c.Ho() * c.Wo(), 256));
}

// ---- the backward pass --------------------------------------------------------------------------

// The convolution of d_gates with the transposed weights: the gradient of x or of mem.
struct DataPlan : StepPlan {
  int channels() const { return mma() ? 8 * tiles * warps_n : columns; }  // of a block
};

// That convolution's source, d_gates; padding is the forward convolution's.
inline Segment gates_segment(const Cell& c, bool of_x) {
  Segment s = mem_segment(c);
  s.channels = int(4 * Shape(c).Cp);
  if (of_x) s.up_h = SmallDivisor(c.stride_h), s.up_w = SmallDivisor(c.stride_w);
  return s;
}

// The shared memory of a tensor core step, in bytes from its start. It begins with the convolution,
// in whose place the parked accumulators and the mem tile come; behind them lie the thresholds
// (vectors) and the sums of their gradients (row_sums).
struct BackwardLayout {
  int mem_tile, mem_pitch, vectors, row_sums, bytes;

  BackwardLayout(const DataPlan& plan, const MmaConv& conv, bool with_mem) {
    mem_tile = 8 * plan.tiles * plan.threads() * 4;
    mem_pitch = 32 * plan.warps_m + 2;
    const int epilogue = mem_tile + (with_mem ? plan.channels() * mem_pitch * 4 : 0);
    vectors = int(round_up(std::max(conv.shared_bytes(), epilogue), 128));
    row_sums = vectors + plan.channels() * 4;
    bytes = row_sums + plan.k_groups * plan.warps_m * plan.channels() * 4;
  }
};

// Plans the gradient of x or of mem like a forward step, and with `windows` in tiles of whole
// pooling windows; returns nothing if there are none. multiply: the forward pass's, which decides
// the gates' type. only: the blocks that may be chosen.
inline std::optional<DataPlan> plan_data(const Cell& c, const Device& device, Multiply multiply,
                                         bool of_x, bool windows, const BlockChoice& only = {}) {
  const int64_t height = of_x ? c.H : c.Ho(), width = of_x ? c.W : c.Wo();
  const int64_t columns = of_x ? c.Cin : c.C, images = of_x ? c.T * c.N : c.N;
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
    const Segment segment = gates_segment(c, of_x);
    for (const BlockShape& of : kDataShapes) {
      plan.shape = int(&of - kDataShapes);
      if (only.shape >= 0 && only.shape != plan.shape) continue;
      plan.warps_m = of.m, plan.warps_n = of.n, plan.k_groups = of.k;
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
  for (const int of_tile : {64, 32, 16}) {
    if (c.dtype == DType::float64 && of_tile < 64) continue;
    plan.columns = of_tile;
    with_tile<16>(c.dtype, plan.columns, [&](auto real, auto size) {
      plan.shared_bytes = int64_t(fma::StepShared<decltype(real), decltype(size)>::bytes(windows));
    });
    if (plan.shared_bytes <= device.shared_bytes) offer([](bool) { return true; });
  }
  return best.plan;
}

// Blocks of the largest launch of the backward pass.
inline int64_t backward_blocks(const Cell& c, const DataPlan& to_mem, const DataPlan& to_x) {
  const int64_t spreading = c.N * ceil_div(c.C * c.Ho() * c.Wo(), 128);
  return std::max({to_mem.tiling.blocks(), to_x.tiling.blocks(), spreading});
}

}  // namespace snnlstm::cuda
