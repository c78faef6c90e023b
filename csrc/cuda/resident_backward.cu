#include "launch.h"
#include "resident_plan.h"

namespace snnlstm::cuda {

void resident_backward(const ResidentBackwardPlan& plan, const BackwardArgs& args,
                       const ResidentGradients& to, const void* weight, const Target& target) {
  const Cell& c = args.cell;
  const Shape s(c);
  ResidentBackward p;
  plan.give(p, c, args.record, weight);
  const DType gates = gate_type(c.dtype, target.matrix);
  NeuronBackward& n = p.neuron = neuron_backward(args, 0, c.T);
  n.grad_syn0 = state_tensor(c, args.grad_syn0, 0, 4);
  n.gates = image(args.saved_gates, s, gates, 4);
  n.d_gates = image(to.d_gates, s, gates, 4);
  n.mem_keep = image(to.mem, s, gates);
  n.sums = to.sums;
  p.syn0 = state_tensor(c, args.syn0, 0, 4);
  // The saved syn of step t - 1 is read at t.
  p.saved_syn = as_tensor(image(args.saved_syn, s, c.dtype, 1, -1));
  p.grad_mem0 = state_tensor(c, args.grad_mem0, 0, 4);
  p.window = gates_window(c, false);
  p.channels = plan.channels();
  p.quad_bits = plan.quad_bits, p.tiles = plan.tiles;
  p.by_tiles = SmallDivisor(plan.tiles), p.pieces = plan.pieces;
  const bool mma = plan.step.mma();
  const Launch how{mma ? "backward sequence (mma)" : "backward sequence (fma)", c.N, plan.threads(),
                   size_t(plan.at.bytes), target.stream};
  if (!mma) {
    p.weight_rows = int(fma::depth(p.window));
    return with_real(c.dtype,
                     [&](auto real) { launch(how, &resident_backward_fma<decltype(real)>, p); });
  }
  const PackedPart packed = packed_transposed(c, plan.step, Use::gates_to_mem);
  p.walk = walk_sizes(packed.depth);
  p.unit_bytes = packed.unit_bytes;
  with_element(p.multiply,
               [&](auto element) { launch(how, &resident_backward_mma<decltype(element)>, p); });
}

}  // namespace snnlstm::cuda
