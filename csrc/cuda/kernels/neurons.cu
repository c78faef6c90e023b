// Runs the neurons of one step after torch's own convolution.
#include "../launchers.h"
#include "../steps.h"
#include "neurons.cuh"

namespace snnlstm::cuda {

namespace {

// Returns gate k of a tensor (1, N, 4C, Ho, Wo), if there is one.
Tensor gate_of(const View& all, DType type, const Cell& c, int k) {
  if (all.data == nullptr) return {};
  View v = all;
  v.data = static_cast<char*>(all.data) + k * c.C * all.stride[2] * bytes_of(type);
  return tensor(v, type, 0, {1, c.N, c.C, c.Ho(), c.Wo()}, 4);
}

}  // namespace

CudnnSteps::CudnnSteps(const Cell& of, Matrix matrix, bool backward) : Steps(of, matrix) {
  const Cell& c = s.c;
  cut(tiling, c.Ho(), c.Wo(), neurons::kPixels);
  cover(tiling, c, c.N, c.C, neurons::kChannels);
  blocks = tiling.blocks();
  if (!backward) return;
  sums_bytes = round_up(tiling.tiles() * pitch() * bytes_of(real), 256);
  workspace = sums_bytes + (c.pool == Pool::none ? 0 : s.state() * bytes_of(real));
}

int CudnnSteps::pitch() const { return tiling.columns * neurons::kChannels; }

void CudnnSteps::forward(const ForwardArgs& args, void* stream) const {
  const Cell& c = s.c;
  ForwardNeurons p;
  p.tiling = tiling;
  for (int k = 0; k < 4; ++k) p.sums[k] = gate_of(args.gate_sums, gates, c, k);
  p.neuron = neuron_forward(args, 0, 4);
  if (args.saved_syn) p.neuron.own_syn = image(args.saved_syn, s, type);
  if (args.saved_gates) p.neuron.gates_out = image(args.saved_gates, s, gates, 4);
  with_real(c.dtype, [&](auto real) {
    using R = decltype(real);
    const Launch how{"neurons forward", p.tiling.blocks(), neurons::kThreads,
                     sizeof(neurons::PatchShared<R>), stream};
    launch(how, &neurons_forward<R>, p);
  });
  if (c.pool != Pool::none) launch_fire({p.neuron.fire, p.neuron.mem_out, int(c.N)}, stream);
}

void CudnnSteps::backward(const BackwardArgs& args, void* stream) const {
  const Cell& c = s.c;
  char* const space = static_cast<char*>(args.workspace);
  BackwardNeurons p;
  p.tiling = tiling;
  NeuronBackward& n = p.neuron;
  n = neuron_backward(args, 0);
  n.gates = image(args.saved_gates, s, gates, 4);
  n.d_gates = image(args.d_gates, s, gates, 4);
  if (args.mem_after) n.mem_for_weight = image(args.mem_after, s, gates);
  n.grad_syn0 = state_tensor(c, args.grad_syn0, 0, 4);
  if (args.grad_threshold) n.sums = space;
  if (c.pool != Pool::none) launch_spread(n, image(space + sums_bytes, s, real), c.N, stream);
  with_real(c.dtype, [&](auto zero) {
    using R = decltype(zero);
    const Launch how{"neurons backward", p.tiling.blocks(), neurons::kThreads,
                     sizeof(neurons::PatchShared<R>), stream};
    launch(how, &neurons_backward<R>, p);
  });
  if (!args.grad_threshold) return;
  AddGradients add;
  add.sums[1] = {space, tiling.tiles(), 1, pitch(), int(c.C), args.grad_threshold, type};
  launch_add_gradients(add, real, stream);
}

}  // namespace snnlstm::cuda
