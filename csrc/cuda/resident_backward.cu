#include "launchers.h"
#include "passes.h"
#include "resident_backward.cuh"

namespace snnlstm::cuda {

void resident_backward(const BackwardPass& pass, const BackwardArgs& args,
                       const ResidentGradients& to, void* stream) {
  const Shape& s = pass.s;
  const Cell& c = s.c;
  const ResidentBackwardPlan& plan = pass.sequence;
  const PackedPart& packed = pass.packed.to_mem;
  ResidentBackward p;
  plan.give(p, c, pass.to_mem.multiply, args.record, packed.in(args.weight));
  NeuronBackward& n = p.neuron = neuron_backward(args, 0, c.T);
  n.grad_syn0 = state_tensor(c, args.grad_syn0, 0, 4);
  n.gates = image(args.saved_gates, s, pass.gates, 4);
  n.d_gates = image(to.d_gates, s, pass.gates, 4);
  n.own_mem = image(to.mem, s, pass.gates);
  n.sums = to.sums;
  p.syn0 = state_tensor(c, args.syn0, 0, 4);
  // The saved syn of step t - 1 is read at t.
  p.saved_syn = as_tensor(image(args.saved_syn, s, c.dtype, 1, -1));
  p.grad_mem0 = state_tensor(c, args.grad_mem0, 0, 4);
  p.segment = gates_segment(c, false);
  p.channels = plan.channels();
  p.quad_bits = plan.quad_bits, p.tiles = plan.tiles;
  p.by_tiles = SmallDivisor(plan.tiles), p.pieces = plan.pieces;
  const bool mma = pass.to_mem.mma();
  const Launch how{mma ? "backward sequence (mma)" : "backward sequence (fma)", c.N, plan.threads(),
                   size_t(plan.at.bytes), stream};
  if (!mma) {
    p.weight_rows = int(fma::depth(p.segment)), p.weight_columns = pass.to_mem.columns;
    return with_real(c.dtype,
                     [&](auto real) { launch(how, &resident_backward_fma<decltype(real)>, p); });
  }
  p.walk = walk_sizes(packed.depth);
  p.unit_bytes = packed.unit_bytes;
  with_element(p.multiply,
               [&](auto element) { launch(how, &resident_backward_mma<decltype(element)>, p); });
}

}  // namespace snnlstm::cuda
