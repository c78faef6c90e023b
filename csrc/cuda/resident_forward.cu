#include "launchers.h"
#include "passes.h"
#include "resident_forward.cuh"

namespace snnlstm::cuda {

void resident_forward(const ForwardPass& pass, const ForwardArgs& args, void* stream) {
  const Shape& s = pass.s;
  const Cell& c = s.c;
  const ResidentPlan& plan = pass.sequence;
  const ForwardPlan& step = pass.step;
  const bool mma = step.mma();
  ResidentForward p;
  plan.give(p, c, step.multiply, args.record, args.weight);
  p.winner = args.winner;
  p.neuron = neuron_forward(args, 0, step.held(), c.T);
  p.neuron.fires = !c.inhibition;
  if (args.saved_gates != nullptr) {
    p.neuron.gates_out = image(args.saved_gates, s, pass.gates, 4);
    p.neuron.own_syn = image(args.saved_syn, s, c.dtype);
  }
  p.x = x_segment(c);
  p.x.src = tensor(args.x, c.dtype, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
  const bool by_channel = p.x.src.c == 1;
  p.by_first = Divisor(by_channel ? c.Cin : c.W), p.by_second = Divisor(by_channel ? c.W : c.H);
  p.channels = resident::power_of_two(plan.groups * (mma ? 2 * step.tiles : 4));
  const Launch how{mma ? "forward sequence (mma)" : "forward sequence (fma)", c.N, plan.threads(),
                   size_t(plan.at.bytes), stream};
  if (!mma) {
    p.weight_rows[0] = int(fma::depth(x_segment(c)));
    p.weight_rows[1] = int(fma::depth(mem_segment(c)));
    p.weight_columns = step.columns;
    return with_real(c.dtype,
                     [&](auto real) { launch(how, &resident_forward_fma<decltype(real)>, p); });
  }
  const PackedForward& packed = pass.packed;
  p.gathers = packed.x.depth.patches;
  p.walk[0] = walk_sizes(packed.x.depth), p.walk[1] = walk_sizes(packed.mem.depth);
  p.table_of_mem = plan.table_of_mem;
  p.unit_bytes = packed.x.unit_bytes, p.warp_columns = step.warps_n;
  p.weight_pitch = packed.x.pitch;
  with_element(p.multiply, [&](auto element) {
    using E = decltype(element);
    launch(how, step.tiles == 8 ? &resident_forward_mma<E, 2> : &resident_forward_mma<E, 1>, p);
  });
}

}  // namespace snnlstm::cuda
