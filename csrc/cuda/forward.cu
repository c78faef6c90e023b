// Launches the kernels of a sequence's forward pass, and lays out their memory. Small images take
// one launch (resident_forward.cu), others one for every step, and a second if the spikes need a
// whole sample or windows that cross tiles.
#include "launch.h"
#include "packed.h"
#include "resident_plan.h"

namespace snnlstm::cuda {

namespace {

class Forward {
 public:
  Forward(const ForwardArgs& args, const Target& target)
      : a_(args),
        target_(target),
        s_(args.cell),
        plan_(plan_forward(args.cell, target)),
        packed_(args.cell, plan_),
        type_(args.cell.dtype),
        real_(real_of(type_)),
        size_(bytes_of(type_)) {
    Arena arena(args.workspace);
    carve(arena);
    bytes_ = arena.bytes();
  }

  static int64_t workspace(const Cell& cell, const Target& target) {
    ForwardArgs args;
    args.cell = cell;
    return Forward(args, target).bytes_;
  }

  void run() {
    refuse_oversize(s_.c, forward_blocks(s_.c, plan_));
    for (int64_t t = 0; t < s_.c.T; ++t) {
      if (plan_.hoisted > 0 && t % plan_.hoisted == 0) hoist(t);
      step(t);
      if (!plan_.fires) fire(t);
    }
  }

 private:
  // Takes the workspace: states between two steps, which the caller may not keep, and gate sums.
  void carve(Arena& arena) {
    if (s_.c.T < 2) return;
    for (void*& mem : mem_) mem = arena.take(s_.state() * size_);
    syn_ = arena.take(s_.state() * size_);
    sums_ = arena.take(plan_.hoisted * s_.gates() * bytes_of(real_));
  }

  bool training() const { return a_.saved_gates != nullptr; }
  bool writes_states(int64_t t) const { return a_.record || t == s_.c.T - 1; }

  Tensor state(const View& v, int64_t t) const { return state_tensor(s_.c, v, t, plan_.held()); }
  Tensor mem_before(int64_t t) const {
    if (t == 0) return state(a_.mem0, 0);
    return a_.record ? state(a_.mem, t - 1) : as_tensor(image(mem_[t & 1], s_, type_));
  }
  Tensor syn_before(int64_t t) const {
    if (t == 0) return state(a_.syn0, 0);
    if (training()) return as_tensor(saved_syn(t - 1));
    return a_.record ? state(a_.syn, t - 1) : as_tensor(image(syn_, s_, type_));
  }
  Image saved_syn(int64_t t) const { return image(a_.saved_syn, s_, type_, 1, t); }
  Tensor mem_after(int64_t t) const {
    return writes_states(t) ? state(a_.mem, t) : as_tensor(image(mem_[(t + 1) & 1], s_, type_));
  }

  NeuronForward neuron(int64_t t) const {
    NeuronForward n = neuron_forward(a_, t, plan_.held());
    n.fires = plan_.fires;
    n.syn_in = syn_before(t), n.mem_in = mem_before(t);
    if (!writes_states(t)) n.mem_keep = image(mem_[(t + 1) & 1], s_, type_);
    if (t + 1 < s_.c.T) {
      if (training())
        n.syn_keep = saved_syn(t);
      else if (!a_.record)
        n.syn_keep = image(syn_, s_, type_);
    }
    if (training()) n.gates_out = image(a_.saved_gates, s_, gate_type(type_, target_.matrix), 4, t);
    return n;
  }

  Image sums(int64_t t) const { return image(sums_, s_, real_, 4, t % plan_.hoisted); }
  // Returns the input half of steps t ... t + steps - 1.
  Segment x_segment(int64_t t, int64_t steps) const {
    const Cell& c = s_.c;
    Segment s = input_window(c);
    s.src = tensor(a_.x, type_, t, {steps, c.N, c.Cin, c.H, c.W}, 4);
    return s;
  }
  Segment mem_segment(const NeuronForward& n) const {
    Segment s = state_window(s_.c);
    s.src = n.mem_in;
    return s;
  }

  // Computes the input half of the gate sums of step t and the next ones.
  void hoist(int64_t t) const {
    const int64_t steps = std::min(plan_.hoisted, s_.c.T - t);
    auto n = neuron_of_steps<NeuronForward>(a_, a_.spk, 0, plan_.held());
    n.sums_out = sums(t);
    Tiling tiling = plan_.tiling;
    tiling.images = steps * s_.c.N;
    launch(tiling, n, x_segment(t, steps), Segment());
  }
  void step(int64_t t) const {
    NeuronForward n = neuron(t);
    if (plan_.hoisted > 0) n.sums_in = sums(t);
    launch(plan_.tiling, n, plan_.hoisted > 0 ? Segment() : x_segment(t, 1), mem_segment(n));
  }

  // Launches one kernel. Segments without channels are left out.
  void launch(const Tiling& tiling, const NeuronForward& n, Segment x, Segment mem) const {
    if (!plan_.mma()) {
      ForwardFma p;
      p.tiling = tiling;
      p.neuron = n;
      p.x = packed_.x.with_weight(x, a_.weight);
      p.mem = packed_.mem.with_weight(mem, a_.weight);
      return launch_forward_fma(p, target_.stream);
    }
    MmaBuilder builder = plan_.builder();
    if (x.channels > 0) builder.add(x, packed_.x.depth, tiling);
    if (mem.channels > 0) builder.add(mem, packed_.mem.depth, tiling);
    const PackedPart& first = x.channels > 0 ? packed_.x : packed_.mem;
    builder.finish(first.in(a_.weight), first.pitch, plan_.threads());
    ForwardMma p;
    p.tiling = tiling;
    p.neuron = n;
    p.conv = builder.conv;
    p.mem_pitch = plan_.mem_pitch();
    p.vectors = int(forward_shared_bytes(plan_, p.conv, s_.c.pool != Pool::none));
    launch_forward_mma(plan_, p, target_.stream);
  }

  void fire(int64_t t) const {
    const FireStep p{fire_of(a_, a_.spk, t, plan_.held()), mem_after(t), int(s_.c.N),
                     a_.winner ? a_.winner + t * s_.c.N : nullptr};
    launch_fire(p, s_.c.inhibition, target_.stream);
  }

  const ForwardArgs& a_;
  const Target& target_;
  Shape s_;
  ForwardPlan plan_;
  PackedForward packed_;
  DType type_, real_;
  int size_;
  int64_t bytes_ = 0;
  void *mem_[2] = {nullptr, nullptr}, *syn_ = nullptr, *sums_ = nullptr;
};

}  // namespace

void forward(const ForwardArgs& args, const Target& target) {
  if (runs_resident(args.cell, target)) return resident_forward(args, target);
  if (target.algorithm == Algorithm::resident)
    refuse_resident(plan_resident(args.cell, target).reason_against, target);
  Forward(args, target).run();
}

int64_t forward_workspace(const Cell& cell, const Target& target) {
  return runs_resident(cell, target) ? 0 : Forward::workspace(cell, target);
}

}  // namespace snnlstm::cuda
