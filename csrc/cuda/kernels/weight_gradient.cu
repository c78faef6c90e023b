// Launches the kernels that compute the gradients of weight and bias over all steps.
#include "../launchers.h"
#include "../steps.h"
#include "weight_gradient_mma.cuh"

namespace snnlstm::cuda {

namespace {

WeightGradientMma mma_job(const WeightBlocks& blocks, const WeightHalf& half,
                          const WeightGradientJob& grad) {
  WeightGradientMma p;
  p.grad = grad;
  p.splits = blocks.splits;
  p.column_pitch = half.tap_stride;
  p.buffer_bytes = blocks.buffer_bytes;
  Segment in = grad.in;
  for (MmaSegment& m : p.source) {
    m = mma_segment(in, blocks.multiply, blocks.tiling);
    m.tail_steps = 2;  // warps read whole chunks: zeros follow the last channel
    if (grad.later.present()) in.src = grad.later;
  }
  return p;
}

}  // namespace

void launch_add_gradients(AddGradients p, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    size_t bytes = sizeof(ReduceShared<R>);
    ReduceWeights& w = p.weight;
    if (w.grad != nullptr) {
      const int64_t of_one = w.pitch() * int64_t(sizeof(R));
      while (w.chunk > 1 && w.chunk * of_one > 48 * 1024) w.chunk /= 2;
      bytes = std::max(bytes, size_t(w.chunk * of_one));
      p.of_weight = 4 * w.C * (w.chunks(0) + w.chunks(1));
    }
    const int64_t blocks = p.of_weight + p.sums[0].launched() + p.sums[1].launched();
    const Launch how{"add gradients", blocks, kReduceThreads, bytes, stream};
    launch(how, &add_gradients<R>, p);
  });
}

void weight_gradient(const BackwardSteps& steps, const WeightSources& sources, void* weight,
                     void* bias, AddGradients& add, void* stream) {
  const Shape& s = steps.s;
  const Cell& c = s.c;
  SumGates sums;
  sums.d_gates = sources.d_gates;
  sums.type = steps.gates;
  sums.columns = int(4 * s.Cp);
  sums.pixels = steps.pixels();
  sums.share = ceil_div(sums.pixels, steps.bias_splits);
  sums.parts = sources.bias_parts;
  sums.lengths = sources.lengths;
  sums.batch = c.N;
  sums.image_pixels = s.pixels;
  if (bias != nullptr) sums.splits = steps.bias_splits;
  add.sums[0] = {sources.bias_parts, steps.bias_splits, 4, int(s.Cp), int(c.C), bias, steps.type};

  WeightGradientsFma by_fma;
  WeightGradientsMma mma;
  by_fma.bias = mma.bias = sums;
  auto& grad = by_fma.job;
  const WeightBlocks& blocks = steps.weights;
  const WeightHalf* const halves[2] = {&blocks.x, &blocks.mem};
  grad[0].in = x_segment(c);
  grad[0].in.src = sources.x;
  grad[1].in = mem_segment(c);
  grad[1].in.src = sources.mem;
  grad[1].later = sources.mem_later;
  ReduceWeights& r = add.weight;
  for (int k = 0; k < 2; ++k) {
    WeightGradientJob& g = grad[k];
    const WeightHalf& half = *halves[k];
    g.d_gates = image(sources.d_gates, s, steps.gates, 4);
    g.tiling = blocks.tiling;
    g.Ho = int(s.Ho), g.Wo = int(s.Wo);
    g.rows = int(4 * s.Cp);
    g.columns = int(s.taps * g.in.channels);
    g.share = blocks.share;
    g.total = blocks.total;
    g.lengths = sources.lengths;
    g.parts = sources.parts[blocks.mma() ? k : 0];
    g.part_rows = half.part_rows;
    g.part_columns = half.part_columns;
    ReduceWeight& h = r.half[k];
    h.parts = g.parts;
    h.splits = blocks.splits;
    if (k == 1 && !blocks.mma())
      h.parts = static_cast<char*>(g.parts) + grad[0].columns * bytes_of(steps.real);
    h.part_rows = half.part_rows;
    h.part_columns = half.part_columns;
    h.channels = g.in.channels;
    h.tap_stride = half.tap_stride;
    h.first_channel = k == 0 ? 0 : int(c.Cin);
  }
  r.C = int(c.C);
  r.Cp = int(s.Cp);
  r.taps = int(s.taps);
  r.places = steps.taps;
  r.all_channels = int(c.Cin + c.C);
  r.grad = weight;
  r.type = steps.type;
  if (blocks.mma()) {
    for (int k = 0; k < 2; ++k) {
      mma.job[k] = mma_job(blocks, *halves[k], grad[k]);
      if (weight != nullptr) mma.blocks += mma.job[k].blocks();
    }
    static_assert(sizeof(mma) <= 4096, "a kernel takes at most 4096 bytes of arguments");
    const int bytes =
        weight_tile::shared_bytes(bytes_of(operand_type(blocks.multiply)), blocks.buffer_bytes);
    const Launch how{"weight gradient (mma)", mma.blocks + mma.bias.blocks(), kThreads,
                     size_t(bytes), stream};
    with_element(blocks.multiply,
                 [&](auto element) { launch(how, &weight_gradient_mma<decltype(element)>, mma); });
  } else {
    if (weight != nullptr) by_fma.blocks = int(blocks.x.blocks * blocks.splits);
    with_real(steps.real, [&](auto real) {
      using R = decltype(real);
      const Launch how{"weight gradient (fma)", by_fma.blocks + by_fma.bias.blocks(), kThreads,
                       sizeof(fma::WeightGradientShared<R>), stream};
      launch(how, &weight_gradient_fma<R>, by_fma);
    });
  }
}

}  // namespace snnlstm::cuda
