// Launches the kernels that compute the gradients of weight and bias over all steps.
#include "../launchers.h"
#include "../steps.h"
#include "weight_gradient_mma.cuh"

namespace snnlstm::cuda {

namespace {

// threads: of a block of the launch, which may have more warps than the job.
WeightGradientMma mma_job(const BackwardSteps& all, const WeightBlocks& part,
                          const WeightGradientJob& grad, bool is_x, int threads) {
  const MmaType type(part.multiply);
  const MmaDepth depth = is_x ? x_depth(all.s.c, part.multiply) : mem_depth(all.s.c, part.multiply);
  WeightGradientMma p;
  p.grad = grad;
  p.column_blocks = part.column_blocks;
  p.row_blocks = part.row_blocks();
  p.splits = part.splits;
  p.warp_rows = part.warp_rows;
  p.tap_groups = part.tap_groups;
  p.planes = part.warp_rows * type.element / 2;
  while (4 * p.planes > 1 << p.unit_bits) ++p.unit_bits;
  p.column_pitch = part.column_pitch;
  p.buffer_bytes = part.buffer_bytes;
  p.totals = all.weights.totals();
  Segment in = grad.in;
  for (MmaSegment& m : p.source) {
    m = mma_segment(in, type, depth, part.tiling);
    m.tail_steps = 2;  // warps read whole chunks: zeros follow the last channel
    // A tile's one or two chunks are loaded during the 4 k-blocks of the previous tile.
    const int64_t k_blocks = 8 / type.element;
    m.accesses = int(ceil_div(ceil_div(chunk_accesses(m, type), threads), k_blocks));
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
  sums.of_image = s.pixels;
  if (bias != nullptr) sums.splits = steps.bias_splits;
  add.sums[0] = {sources.bias_parts, steps.bias_splits, 4, int(s.Cp), int(c.C), bias, steps.type};

  WeightGradientsFma by_fma;
  WeightGradientsMma mma;
  by_fma.bias = mma.bias = sums;
  auto& grad = by_fma.job;
  const WeightBlocks* both[2] = {&steps.weights.x, &steps.weights.mem};
  grad[0].in = x_segment(c);
  grad[0].in.src = sources.x;
  grad[1].in = mem_segment(c);
  grad[1].in.src = sources.mem;
  grad[1].later = sources.mem_later;
  ReduceWeights& r = add.weight;
  for (int k = 0; k < 2; ++k) {
    WeightGradientJob& g = grad[k];
    const WeightBlocks& part = *both[k];
    g.d_gates = image(sources.d_gates, s, steps.gates, 4);
    g.tiling = part.tiling;
    g.Ho = int(s.Ho), g.Wo = int(s.Wo);
    g.rows = int(4 * s.Cp);
    g.columns = int(s.taps * g.in.channels);
    g.share = part.share;
    g.total = part.total;
    g.lengths = sources.lengths;
    g.parts = sources.parts[steps.weights.side_by_side() ? 0 : k];
    g.part_rows = part.part_rows;
    g.part_columns = part.part_columns;
    ReduceWeight& h = r.half[k];
    h.parts = g.parts;
    h.splits = part.splits;
    if (k == 1 && steps.weights.side_by_side())
      h.parts = static_cast<char*>(g.parts) + grad[0].columns * bytes_of(steps.real);
    h.part_rows = part.part_rows;
    h.part_columns = part.part_columns;
    h.channels = g.in.channels;
    h.tap_stride = part.tap_stride;
    h.first_channel = k == 0 ? 0 : int(c.Cin);
  }
  r.C = int(c.C);
  r.Cp = int(s.Cp);
  r.taps = int(s.taps);
  r.places = steps.taps;
  r.all_channels = int(c.Cin + c.C);
  r.grad = weight;
  r.type = steps.type;
  const WeightBlocks& x = steps.weights.x;
  if (x.mma()) {
    const int threads = steps.weights.threads();
    for (int k = 0; k < 2; ++k) {
      mma.job[k] = mma_job(steps, *both[k], grad[k], k == 0, threads);
      const WeightGradientMma& job = mma.job[k];
      if (weight != nullptr) mma.blocks += job.column_blocks * job.row_blocks * job.splits;
    }
    static_assert(sizeof(mma) <= 4096, "a kernel takes at most 4096 bytes of arguments");
    const Launch how{"weight gradient (mma)", mma.blocks + mma.bias.blocks(), threads,
                     size_t(steps.weights.shared_bytes()), stream};
    with_element(x.multiply,
                 [&](auto element) { launch(how, &weight_gradient_mma<decltype(element)>, mma); });
  } else {
    if (weight != nullptr) by_fma.blocks = int(x.part_bytes(DType::float32) / (4 * 4096));
    with_tile<32>(steps.real, x.columns, [&](auto real, auto tile) {
      using R = decltype(real);
      using T = decltype(tile);
      const Launch how{"weight gradient (fma)", by_fma.blocks + by_fma.bias.blocks(), fma::kThreads,
                       sizeof(fma::WeightGradientShared<R, T>), stream};
      launch(how, &weight_gradient_fma<R, T>, by_fma);
    });
  }
}

}  // namespace snnlstm::cuda
