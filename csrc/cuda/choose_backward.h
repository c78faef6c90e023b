// The backward pass's part of choose.h.
#pragma once

#include "backward_fma.cuh"
#include "choose.h"

namespace snnlstm::cuda {

// A convolution with the transposed weights.
struct DataPlan {
  Tiling tiling;

  int channels() const { return fma::kColumns; }  // of a block
};

struct WeightPlan {
  Tiling tiling;
  int splits = 1;
  int64_t share = 0, total = 0;
  int part_rows = 0, part_columns = 0, tap_stride = 0;

  int64_t part_bytes(DType real) const {
    return int64_t(splits) * part_rows * part_columns * bytes_of(real);
  }
};

struct BackwardPlan {
  Multiply multiply = Multiply::fma;
  bool spreads = true;  // pooling windows do not cross tiles: the step does it all
  DataPlan to_mem, to_x;
  WeightPlan x_grad, mem_grad;

  // Bytes of the packed weights for x, which lie before those for mem.
  int64_t x_bytes(const Cell& c) const {
    const Shape s(c);
    return round_up(c.Cin, fma::kColumns) * round_up(s.taps * 4 * s.Cp, fma::kDepth) *
           std::max(bytes_of(c.dtype), 4);
  }
};

inline void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int channels) {
  tiling.images = images;
  tiling.by_batch = Divisor(std::max<int64_t>(c.N, 1));
  tiling.by_columns = Divisor(ceil_div(columns, channels));
}

inline WeightPlan plan_weight(const Cell& c, const Target& target, int64_t channels) {
  const Shape s(c);
  WeightPlan w;
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.part_rows = int(round_up(4 * s.Cp, 64)), w.part_columns = int(round_up(s.taps * channels, 64));
  w.tap_stride = int(channels);
  w.total = c.T * c.N * s.pixels;
  // Two blocks for each multiprocessor, none with less than 256 pixels.
  const int64_t blocks = int64_t(w.part_rows / 64) * (w.part_columns / 64);
  const int64_t wanted = std::max<int64_t>(2 * target.multiprocessors / blocks, 1);
  w.splits = int(std::max<int64_t>(std::min({wanted, w.total / 256, int64_t(1024)}), 1));
  w.share = round_up(ceil_div(w.total, w.splits), fma::kDepth);
  return w;
}

inline BackwardPlan plan_backward(const Cell& c, const Target& target) {
  BackwardPlan plan;
  const bool windows = c.pool != Pool::none;
  const size_t bytes = c.dtype == DType::float64 ? fma::BackwardShared<double>::bytes(windows)
                                                 : fma::BackwardShared<float>::bytes(windows);
  plan.spreads = int64_t(bytes) <= target.shared_bytes &&
                 choose_tile(c, c.Ho(), c.Wo(), fma::kPixels, windows, plan.to_mem.tiling);
  if (!plan.spreads) choose_tile(c, c.Ho(), c.Wo(), fma::kPixels, false, plan.to_mem.tiling);
  cover(plan.to_mem.tiling, c, c.N, c.C, plan.to_mem.channels());
  choose_tile(c, c.H, c.W, fma::kPixels, false, plan.to_x.tiling);
  cover(plan.to_x.tiling, c, c.T * c.N, c.Cin, plan.to_x.channels());
  plan.x_grad = plan_weight(c, target, c.Cin);
  plan.mem_grad = plan_weight(c, target, c.C);
  return plan;
}

}  // namespace snnlstm::cuda
