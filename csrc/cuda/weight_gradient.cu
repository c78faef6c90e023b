// Launches the kernels that form the gradients of weight and bias over all steps.
#include "launchers.h"
#include "passes.h"
#include "weight_gradient_mma.cuh"

namespace snnlstm::cuda {

namespace {

void launch_weight_gradient_fma(const WeightGradientJob& p, int splits, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"weight gradient (fma)", dim3(p.part_columns / 64, p.part_rows / 64, splits),
                     fma::kThreads, sizeof(fma::WeightGradientShared<R>), stream};
    launch(how, &weight_gradient_fma<R>, p);
  });
}

void launch_weight_gradient_mma(const WeightPlans& plan, const Jobs<WeightGradientMma>& p,
                                void* stream) {
  int64_t blocks = 0;
  for (const WeightGradientMma& job : p.job)
    blocks += int64_t(job.column_blocks) * job.row_blocks * job.splits;
  const Launch how{"weight gradient (mma)", blocks, plan.threads(), size_t(plan.shared_bytes()),
                   stream};
  constexpr void (*kernels[])(Jobs<WeightGradientMma>) = {
      nullptr,
      &weight_gradient_mma<Multiply::fp16>,
      &weight_gradient_mma<Multiply::bf16>,
      &weight_gradient_mma<Multiply::tf32>,
      &weight_gradient_mma<Multiply::tf32x3>,
      &weight_gradient_mma<Multiply::fp16_sm75>};
  launch(how, kernels[int(plan.x.multiply)], p);
}

void launch_reduce_weight(const ReduceWeights& given, void* stream) {
  with_real(given.type, [&](auto real) {
    using R = decltype(real);
    ReduceWeights p = given;
    const int64_t of_one = p.pitch() * int64_t(sizeof(R));
    while (p.chunk > 1 && p.chunk * of_one > 48 * 1024) p.chunk /= 2;
    const int64_t blocks = int64_t(4) * p.C * (p.chunks(0) + p.chunks(1));
    const Launch how{"add weight gradients", blocks, kReduceThreads, size_t(p.chunk * of_one),
                     stream};
    launch(how, &reduce_weight<R>, p);
  });
}

void launch_sum_gates(const SumGates& p, int splits, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"sum gate gradients", dim3(p.columns / kSumColumns, splits), kSumThreads,
                     sizeof(SumShared<R>), stream};
    launch(how, &sum_gates<R>, p);
  });
}

// threads: of a block of the launch, which may have more warps than the job.
WeightGradientMma mma_job(const BackwardPass& all, const WeightPlan& plan,
                          const WeightGradientJob& grad, bool of_x, int threads) {
  const MmaType type(plan.multiply);
  const MmaDepth depth = of_x ? x_depth(all.s.c, plan.multiply) : mem_depth(all.s.c, plan.multiply);
  WeightGradientMma p;
  p.grad = grad;
  p.column_blocks = plan.column_blocks, p.row_blocks = plan.row_blocks();
  p.splits = plan.splits;
  p.warp_rows = plan.warp_rows, p.tap_groups = plan.tap_groups;
  p.planes = plan.warp_rows * type.element / 2;
  while (4 * p.planes > 1 << p.unit_bits) ++p.unit_bits;
  p.column_pitch = plan.column_pitch;
  p.buffer_bytes = plan.buffer_bytes;
  p.totals = all.weights.totals();
  Segment in = grad.in;
  for (MmaSegment& m : p.source) {
    m = mma_segment(in, type, depth, plan.tiling);
    m.tail_steps = 2;  // warps read whole chunks: zeros come behind the last channel
    // A tile's one or two chunks come during the 4 turns of the tile before.
    const int64_t turns = 8 / type.element;
    m.turns = int(ceil_div(ceil_div(chunk_turns(m, type), threads), turns));
    if (grad.later.present()) in.src = grad.later;
  }
  return p;
}

}  // namespace

void launch_reduce_sums(const ReduceSums& p, void* stream) {
  with_real(p.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"add bias or threshold gradients", dim3(ceil_div(p.columns, 32), p.rows),
                     kReduceThreads, sizeof(ReduceShared<R>), stream};
    launch(how, &reduce_sums<R>, p);
  });
}

void bias_gradient(const BackwardPass& plan, const WeightSources& of, void* out, void* stream) {
  SumGates p;
  p.d_gates = of.d_gates, p.type = plan.gates;
  p.columns = int(4 * plan.s.Cp);
  p.pixels = plan.pixels(), p.share = ceil_div(p.pixels, plan.bias_splits);
  p.parts = of.bias_parts;
  launch_sum_gates(p, plan.bias_splits, plan.real, stream);
  launch_reduce_sums(
      {of.bias_parts, plan.bias_splits, 4, int(plan.s.Cp), int(plan.s.c.C), out, plan.type},
      stream);
}

void weight_gradient(const BackwardPass& plan, const WeightSources& of, void* out, void* stream) {
  const Shape& s = plan.s;
  const Cell& c = s.c;
  WeightGradientJob grad[2];
  const WeightPlan* plans[2] = {&plan.weights.x, &plan.weights.mem};
  grad[0].in = x_segment(c);
  grad[0].in.src = of.x;
  grad[1].in = mem_segment(c);
  grad[1].in.src = of.mem;
  grad[1].later = of.mem_later;
  ReduceWeights r;
  for (int k = 0; k < 2; ++k) {
    WeightGradientJob& g = grad[k];
    const WeightPlan& part = *plans[k];
    g.d_gates = image(of.d_gates, s, plan.gates, 4);
    g.tiling = part.tiling;
    g.Ho = int(s.Ho), g.Wo = int(s.Wo);
    g.rows = int(4 * s.Cp), g.columns = int(s.taps * g.in.channels);
    g.share = part.share, g.total = part.total;
    g.parts = of.parts[k], g.part_rows = part.part_rows, g.part_columns = part.part_columns;
    ReduceWeight& h = r.half[k];
    h.parts = of.parts[k], h.splits = part.splits;
    h.part_rows = part.part_rows, h.part_columns = part.part_columns;
    h.channels = g.in.channels, h.tap_stride = part.tap_stride;
    h.first_channel = k == 0 ? 0 : int(c.Cin);
  }
  if (plan.weights.x.mma()) {
    Jobs<WeightGradientMma> jobs;
    const int threads = plan.weights.threads();
    for (int k = 0; k < 2; ++k) jobs.job[k] = mma_job(plan, *plans[k], grad[k], k == 0, threads);
    launch_weight_gradient_mma(plan.weights, jobs, stream);
  } else {
    for (int k = 0; k < 2; ++k)
      launch_weight_gradient_fma(grad[k], plans[k]->splits, plan.real, stream);
  }
  r.C = int(c.C), r.Cp = int(s.Cp), r.taps = int(s.taps);
  r.all_channels = int(c.Cin + c.C);
  r.grad = out, r.type = plan.type;
  launch_reduce_weight(r, stream);
}

}  // namespace snnlstm::cuda
