// Launches the kernels of a sequence's backward pass, last step first, and lays out their memory:
// one launch for every step, or one for all steps (resident_backward.cu), then one for the
// gradients of x and of the first mem, and a few for those of the parameters.
#include <optional>

#include "launch.h"
#include "packed.h"
#include "resident_plan.h"
#include "weight_gradient.h"

namespace snnlstm::cuda {

namespace {

class Backward {
 public:
  Backward(const BackwardArgs& args, const Target& target)
      : a_(args),
        target_(target),
        s_(args.cell),
        plan_(plan_backward(args.cell, target)),
        packed_(args.cell, plan_),
        sequence_(may_be_resident(args.cell, target)
                      ? plan_resident_backward(args.cell, target, plan_.to_mem)
                      : ResidentBackwardPlan()),
        resident_(runs_resident_backward(args.cell, target, sequence_)),
        type_(args.cell.dtype),
        real_(real_of(type_)),
        gate_type_(gate_type(type_, target.matrix)) {
    Arena arena(args.workspace);
    carve(arena);
    bytes_ = arena.bytes();
  }

  // of_weights: false if a call is given d_gates and wants no gradient of weight or bias.
  static int64_t workspace(const Cell& cell, const Target& target, bool of_weights) {
    BackwardArgs args;
    args.cell = cell;
    if (!of_weights) args.d_gates = &args;  // any memory
    if (of_weights) args.grad_weight = &args;
    return Backward(args, target).bytes_;
  }

  void run() {
    const Cell& c = s_.c;
    refuse_oversize(c, backward_blocks(c, plan_));
    refuse_resident(sequence_.reason_against, target_);
    if (resident_) {
      resident_backward(sequence_, a_, {d_gates_, mem_kept(), a_.grad_threshold ? sums_ : nullptr},
                        packed_.to_mem.in(a_.weight), target_);
    } else {
      for (int64_t t = c.T - 1; t >= 0; --t) step(t);
    }
    data_gradients();
    if (weights_) {
      WeightGradient::Sources from;
      from.x = tensor(a_.x, type_, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
      from.mem = state_tensor(c, a_.mem0, 0, 4);
      if (c.T > 1) from.mem_later = as_tensor(image(mem_, s_, gate_type_));
      from.d_gates = d_gates_;
      weights_->run(from, a_.grad_weight, a_.grad_bias);
    }
    if (a_.grad_threshold) {
      ReduceSums p;
      p.parts = sums_, p.blocks = threshold_blocks();
      p.pitch = int(threshold_pitch()), p.columns = int(c.C);
      p.out = a_.grad_threshold, p.type = type_;
      launch_reduce_sums(p, target_.stream);
    }
  }

 private:
  int64_t threshold_blocks() const { return resident_ ? s_.c.N : plan_.to_mem.tiling.tiles(); }
  int64_t threshold_pitch() const {
    return resident_ ? sequence_.channels()
                     : plan_.to_mem.tiling.by_columns.value * plan_.to_mem.channels();
  }

  void carve(Arena& arena) {
    const Cell& c = s_.c;
    if (!resident_) d_syn_ = arena.take(s_.state() * bytes_of(real_));
    sums_ = arena.take(threshold_blocks() * threshold_pitch() * bytes_of(real_));
    if (!resident_ && !plan_.spreads) spikes_ = arena.take(s_.state() * bytes_of(real_));
    d_gates_ = a_.d_gates ? a_.d_gates : arena.take(c.T * s_.gates() * bytes_of(gate_type_));
    mem_ = a_.mem_after;
    if (!a_.grad_weight && !a_.grad_bias) return;
    if (!mem_) mem_ = arena.take(std::max<int64_t>(c.T - 1, 0) * s_.state() * bytes_of(gate_type_));
    weights_.emplace(c, target_);
    weights_->carve(arena);
  }

  // The memory for mem after each step, or null if nobody wants that.
  void* mem_kept() const { return a_.grad_weight || a_.mem_after ? mem_ : nullptr; }

  Image d_gates(int64_t t) const { return image(d_gates_, s_, gate_type_, 4, t); }
  NeuronBackward neuron(int64_t t) const {
    const Cell& c = s_.c;
    NeuronBackward n = neuron_backward(a_, t);
    n.spreads = plan_.spreads;
    n.gates = image(a_.saved_gates, s_, gate_type_, 4, t);
    if (t > 0) n.syn_prev = as_tensor(image(a_.saved_syn, s_, type_, 1, t - 1));
    if (t < c.T - 1) n.d_syn_in = image(d_syn_, s_, real_);
    if (t > 0)
      n.d_syn_out = image(d_syn_, s_, real_);
    else
      n.grad_syn0 = state_tensor(c, a_.grad_syn0, 0, 4);
    n.d_gates = d_gates(t);
    if (mem_kept() && t < c.T - 1) n.mem_keep = image(mem_, s_, gate_type_, 1, t);
    if (a_.grad_threshold) n.sums = sums_;
    n.first_sums = t == c.T - 1;
    return n;
  }

  Segment transposed(const Image& gates, bool of_x) const {
    Segment s = gates_window(s_.c, of_x);
    s.src = as_tensor(gates);
    return s;
  }

  void step(int64_t t) const {
    const Cell& c = s_.c;
    NeuronBackward n = neuron(t);
    if (!plan_.spreads && n.fire.spk.present() && n.surrogate != Surrogate::none) {
      n.spikes_in = image(spikes_, s_, real_);
      launch_spread(n, c.N, target_.stream);
    }
    Segment s;
    if (t < c.T - 1) s = transposed(d_gates(t + 1), false);
    run_step(s, n);
  }

  MmaConv conv(const DataPlan& plan, const PackedPart& part, const Segment& s) const {
    MmaBuilder builder = plan.builder();
    if (s.channels > 0) builder.add(s, part.depth, plan.tiling);
    builder.finish(part.in(a_.weight), part.pitch, plan.threads());
    builder.conv.k_groups = plan.k_groups;
    return builder.conv;
  }

  // If s has no channels, there is nothing to convolve.
  void run_step(const Segment& s, const NeuronBackward& n) const {
    const DataPlan& plan = plan_.to_mem;
    if (!plan.mma()) {
      BackwardFma p;
      p.tiling = plan.tiling;
      p.d_gates = packed_.to_mem.with_weight(s, a_.weight);
      p.neuron = n;
      return launch_backward_fma(p, type_, target_.stream);
    }
    BackwardMma p;
    p.tiling = plan.tiling;
    p.conv = conv(plan, packed_.to_mem, s);
    p.neuron = n;
    const BackwardShared layout(plan, p.conv, s_.c.pool != Pool::none && plan_.spreads);
    p.mem_tile = layout.mem_tile, p.mem_pitch = layout.mem_pitch;
    p.vectors = layout.vectors, p.row_sums = layout.row_sums;
    launch_backward_mma(plan, p, layout.bytes, target_.stream);
  }

  // Forms the gradients of x, at all steps, and of the first mem in one launch, or in two if only
  // one of them can use tensor cores.
  void data_gradients() const {
    const Cell& c = s_.c;
    Jobs<DataGradientFma> fma;
    Jobs<DataGradientMma> mma;
    Multiply multiply = Multiply::fma;
    int bytes = 0;
    const auto add = [&](int k, const DataPlan& plan, const PackedPart& part, const Tensor& out,
                         int64_t height, int64_t width) {
      if (!out.present()) return;
      const Segment s = transposed(d_gates(0), part.use == Use::gates_to_x);
      const auto fill = [&](auto& job) {
        job.tiling = plan.tiling, job.blocks = int(plan.tiling.blocks());
        job.out = out, job.height = int(height), job.width = int(width);
      };
      if (plan.mma()) {
        DataGradientMma& job = mma.job[k];
        fill(job);
        job.conv = conv(plan, part, s), job.tiles = plan.tiles;
        multiply = plan.multiply;
        bytes = std::max(bytes, BackwardShared(plan, job.conv, false).bytes);
      } else {
        fill(fma.job[k]);
        fma.job[k].d_gates = part.with_weight(s, a_.weight);
      }
    };
    const Tensor x = tensor(a_.grad_x, type_, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
    add(0, plan_.to_x, packed_.to_x, x, c.H, c.W);
    if (!resident_)
      add(1, plan_.to_mem, packed_.to_mem, state_tensor(c, a_.grad_mem0, 0, 4), s_.Ho, s_.Wo);
    launch_data_gradient_fma(fma, type_, target_.stream);
    launch_data_gradient_mma(mma, multiply, bytes, target_.stream);
  }

  const BackwardArgs& a_;
  const Target& target_;
  Shape s_;
  BackwardPlan plan_;
  PackedBackward packed_;
  ResidentBackwardPlan sequence_;
  bool resident_;
  std::optional<WeightGradient>
      weights_;  // absent if nobody wants the gradients of weight and bias
  DType type_, real_, gate_type_;
  void *d_gates_ = nullptr, *mem_ = nullptr, *d_syn_ = nullptr, *sums_ = nullptr;
  void* spikes_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace

void backward(const BackwardArgs& args, const Target& target) { Backward(args, target).run(); }

int64_t backward_workspace(const Cell& cell, const Target& target, bool of_weights) {
  return Backward::workspace(cell, target, of_weights);
}

}  // namespace snnlstm::cuda
