// Runs the neurons alone, behind torch's own convolution.
#include "launch.h"
#include "pointwise.cuh"

namespace snnlstm::cuda {

namespace {

struct PointwisePlan {
  Tiling tiling;
  bool whole_windows;

  explicit PointwisePlan(const Cell& c) {
    whole_windows =
        choose_tile(c, c.Ho(), c.Wo(), pointwise::kPixels, c.pool != Pool::none, tiling);
    if (!whole_windows) choose_tile(c, c.Ho(), c.Wo(), pointwise::kPixels, false, tiling);
    cover(tiling, c, c.N, c.C, pointwise::kChannels);
  }
  int64_t channels() const { return int64_t(tiling.by_columns.value) * pointwise::kChannels; }
};

// Returns gate k of a tensor (1, N, 4C, Ho, Wo).
Tensor gate_of(const View& all, DType type, const Cell& c, int k) {
  View v = all;
  v.data = static_cast<char*>(all.data) + k * c.C * all.stride[2] * bytes_of(type);
  return tensor(v, type, 0, {1, c.N, c.C, c.Ho(), c.Wo()}, 4);
}

}  // namespace

void pointwise_forward(const ForwardArgs& args, const View& gate_sums, const Target& target) {
  const Cell& c = args.cell;
  const DType gates = gate_type(c.dtype, target.matrix);
  const PointwisePlan plan(c);
  refuse_oversize(c, plan.tiling.blocks());
  PointwiseForward p;
  p.tiling = plan.tiling;
  for (int k = 0; k < 4; ++k) p.sums[k] = gate_of(gate_sums, gates, c, k);
  p.neuron = neuron_forward(args, 0, 4);
  p.neuron.fires = plan.whole_windows && !c.inhibition;
  if (args.saved_syn) p.neuron.syn_keep = image(args.saved_syn, Shape(c), c.dtype);
  if (args.saved_gates) p.neuron.gates_out = image(args.saved_gates, Shape(c), gates, 4);
  with_real(c.dtype, [&](auto real) {
    using R = decltype(real);
    const Launch how{"pointwise forward", p.tiling.blocks(), pointwise::kThreads,
                     sizeof(pointwise::Shared<R>), target.stream};
    launch(how, &pointwise_forward<R>, p);
  });
  if (p.neuron.fires) return;
  const FireStep fire{p.neuron.fire, p.neuron.mem_out, int(c.N), args.winner};
  launch_fire(fire, c.inhibition, target.stream);
}

void pointwise_backward(const BackwardArgs& args, const Target& target) {
  const Cell& c = args.cell;
  const DType gates = gate_type(c.dtype, target.matrix);
  const Shape s(c);
  const PointwisePlan plan(c);
  refuse_oversize(c, plan.tiling.blocks());
  const DType real = real_of(c.dtype);
  Arena arena(args.workspace);
  void* sums = arena.take(plan.tiling.tiles() * plan.channels() * bytes_of(real));
  PointwiseBackward p;
  p.tiling = plan.tiling;
  NeuronBackward& n = p.neuron;
  n = neuron_backward(args, 0);
  n.gates = image(args.saved_gates, s, gates, 4);
  n.d_gates = image(args.d_gates, s, gates, 4);
  if (args.mem_after) n.mem_keep = image(args.mem_after, s, gates);
  n.grad_syn0 = tensor(args.grad_syn0, c.dtype, 0, {1, c.N, c.C, s.Ho, s.Wo}, 4);
  n.spreads = plan.whole_windows;
  if (args.grad_threshold) n.sums = sums;
  if (!n.spreads && n.fire.spk.present() && n.surrogate != Surrogate::none) {
    n.spikes_in = image(arena.take(s.state() * bytes_of(real)), s, real);
    launch_spread(n, c.N, target.stream);
  }
  with_real(c.dtype, [&](auto zero) {
    using R = decltype(zero);
    const Launch how{"pointwise backward", p.tiling.blocks(), pointwise::kThreads,
                     sizeof(pointwise::Shared<R>), target.stream};
    launch(how, &pointwise_backward<R>, p);
  });
  if (!args.grad_threshold) return;
  ReduceSums r;
  r.parts = sums, r.blocks = plan.tiling.tiles();
  r.pitch = int(plan.channels()), r.columns = int(c.C);
  r.out = args.grad_threshold, r.type = c.dtype;
  launch_reduce_sums(r, target.stream);
}

int64_t pointwise_workspace(const Cell& cell, const Target&) {
  const PointwisePlan plan(cell);
  const int real = bytes_of(real_of(cell.dtype));
  Arena arena(nullptr);
  arena.take(plan.tiling.tiles() * plan.channels() * real);
  if (!plan.whole_windows) arena.take(Shape(cell).state() * real);
  return arena.bytes();
}

}  // namespace snnlstm::cuda
