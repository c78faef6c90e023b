#include "launch.h"
#include "resident_forward.cuh"
#include "resident_plan.h"

namespace snnlstm::cuda {

namespace {

NeuronForward neuron_of(const ForwardArgs& a, int held, DType gates) {
  const Cell& c = a.cell;
  const Shape s(c);
  NeuronForward n = neuron_forward(a, c.T - 1, held);
  const auto all = [&](const View& v, int64_t T) {
    return tensor(v, c.dtype, 0, {T, c.N, c.C, s.Ho, s.Wo}, held);
  };
  n.fires = !c.inhibition;
  n.syn_out = all(a.syn, a.record ? c.T : 1), n.mem_out = all(a.mem, a.record ? c.T : 1);
  n.fire.spk = tensor(a.spk, c.dtype, 0, {c.T, c.N, c.C, c.Hp(), c.Wp()}, held);
  if (a.saved_gates != nullptr) {
    n.gates_out = image(a.saved_gates, s, gates, 4);
    n.syn_keep = image(a.saved_syn, s, c.dtype);
  }
  return n;
}

}  // namespace

void resident_forward(const ForwardArgs& args, const Target& target) {
  const Cell& c = args.cell;
  const ResidentPlan plan = plan_resident(c, target);
  const Shape s(c);
  const bool mma = plan.step.mma();
  ResidentForward p;
  plan.give(p, c, args.record, args.weight);
  p.winner = args.winner;
  p.neuron = neuron_of(args, plan.step.held(), gate_type(c.dtype, target.matrix));
  p.x = input_window(c);
  p.x.src = tensor(args.x, c.dtype, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
  const bool by_channel = p.x.src.c == 1;
  p.by_first = Divisor(by_channel ? c.Cin : c.W), p.by_second = Divisor(by_channel ? c.W : c.H);
  p.channels = resident::power_of_two(plan.groups * (mma ? 2 * plan.step.tiles : 4));
  const Launch how{mma ? "forward sequence (mma)" : "forward sequence (fma)", c.N, plan.threads(),
                   size_t(plan.at.bytes), target.stream};
  if (!mma) {
    p.weight_rows[0] = int(fma::depth(input_window(c)));
    p.weight_rows[1] = int(fma::depth(state_window(c)));
    return with_real(c.dtype,
                     [&](auto real) { launch(how, &resident_forward_fma<decltype(real)>, p); });
  }
  const PackedForward packed(c, plan.step);
  p.gathers = packed.x.depth.patches;
  p.walk[0] = walk_sizes(packed.x.depth), p.walk[1] = walk_sizes(packed.mem.depth);
  p.table_of_mem = plan.table_of_mem;
  p.unit_bytes = packed.x.unit_bytes, p.warp_columns = plan.step.warps_n;
  p.weight_pitch = packed.x.pitch;
  with_element(p.multiply, [&](auto element) {
    using E = decltype(element);
    launch(how, plan.step.tiles == 8 ? &resident_forward_mma<E, 2> : &resident_forward_mma<E, 1>,
           p);
  });
}

}  // namespace snnlstm::cuda
