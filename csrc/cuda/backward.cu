// The backward pass of a sequence, last step first: which kernels, in which order, on which memory.
// One launch a step, then one for the first mem's gradient, one for x's and a few for the
// parameters.
#include "neuron_args.h"
#include "packer.h"

namespace snnlstm::cuda {

namespace {

class Backward {
 public:
  Backward(const BackwardArgs& args, const Target& target)
      : a_(args),
        target_(target),
        s_(args.cell),
        plan_(plan_backward(args.cell, target)),
        type_(args.cell.dtype),
        real_(type_ == DType::float64 ? DType::float64 : DType::float32),
        gate_type_(gate_type(type_, target.matrix)) {
    Arena arena(args.workspace);
    carve(arena);
  }

  static int64_t workspace(const Cell& cell, const Target& target) {
    BackwardArgs args;
    args.cell = cell;
    Backward b(args, target);
    Arena arena(nullptr);
    b.carve(arena);
    return arena.bytes();
  }

  void run() {
    const Cell& c = s_.c;
    for (int64_t t = c.T - 1; t >= 0; --t) step(t);
    if (a_.grad_mem0.data) data_gradient(plan_.to_mem, Use::gates_to_mem, mem0_gradient());
    if (a_.grad_x.data) data_gradient(plan_.to_x, Use::gates_to_x, x_gradient());
    if (a_.grad_weight) weight_gradient();
    if (a_.grad_bias || a_.grad_threshold) {
      ReduceSums p;
      p.sums = sums_;
      p.blocks = plan_.to_mem.tiling.tiles();
      p.C = int(c.C), p.total = int(plan_.to_mem.tiling.by_columns.value * plan_.to_mem.channels());
      p.grad_bias = a_.grad_bias, p.grad_threshold = a_.grad_threshold;
      p.type = type_;
      launch_reduce_sums(p, stream());
    }
  }

 private:
  Stream stream() const { return static_cast<Stream>(target_.stream); }

  void carve(Arena& arena) {
    const Cell& c = s_.c;
    d_gates_ = arena.take(c.T * s_.gates() * bytes_of(gate_type_));
    mem_ = arena.take(std::max<int64_t>(c.T - 1, 0) * s_.state() * bytes_of(gate_type_));
    d_syn_ = arena.take(s_.state() * bytes_of(real_));
    const int64_t channels = plan_.to_mem.tiling.by_columns.value * plan_.to_mem.channels();
    sums_ = arena.take(plan_.to_mem.tiling.tiles() * 5 * channels * bytes_of(real_));
    if (!plan_.spreads) spikes_ = arena.take(s_.state() * bytes_of(real_));
    parts_[0] = arena.take(plan_.x_grad.part_bytes(real_));
    parts_[1] = arena.take(plan_.mem_grad.part_bytes(real_));
  }

  Image d_gates(int64_t t) const {
    return image(static_cast<char*>(d_gates_) + t * s_.gates() * bytes_of(gate_type_), s_,
                 gate_type_, 4);
  }
  NeuronBackward neuron(int64_t t) const {
    const Cell& c = s_.c;
    NeuronBackward n = neuron_backward(a_, t);
    n.spreads = plan_.spreads;
    n.gates = image(const_cast<char*>(static_cast<const char*>(a_.saved_gates)) +
                        t * s_.gates() * bytes_of(gate_type_),
                    s_, gate_type_, 4);
    if (t > 0)
      n.syn_prev = as_tensor(image(const_cast<char*>(static_cast<const char*>(a_.saved_syn)) +
                                       (t - 1) * s_.state() * bytes_of(type_),
                                   s_, type_));
    if (t < c.T - 1) n.d_syn_in = image(d_syn_, s_, real_);
    if (t > 0)
      n.d_syn_out = image(d_syn_, s_, real_);
    else
      n.grad_syn0 = state_tensor(c, a_.grad_syn0, 0, 4);
    n.d_gates = d_gates(t);
    if (a_.grad_weight && t < c.T - 1)
      n.mem_keep =
          image(static_cast<char*>(mem_) + t * s_.state() * bytes_of(gate_type_), s_, gate_type_);
    if (a_.grad_bias || a_.grad_threshold) n.sums = sums_;
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
      SpreadStep p;
      p.tiling = plan_.to_mem.tiling;
      p.neuron = n;
      p.spikes = n.spikes_in = image(spikes_, s_, real_);
      launch_spread(p, stream());
    }
    Segment s;
    if (t < c.T - 1) s = transposed(d_gates(t + 1), false);
    run_step(plan_.to_mem, Use::gates_to_mem, s, n, Tensor());
  }

  struct Output {
    Tensor tensor;
    Image gates;
    int height, width;
  };
  Output mem0_gradient() const {
    return {state_tensor(s_.c, a_.grad_mem0, 0, 4), d_gates(0), int(s_.Ho), int(s_.Wo)};
  }
  Output x_gradient() const {
    const Cell& c = s_.c;
    return {tensor(a_.grad_x, type_, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4), d_gates(0), int(c.H),
            int(c.W)};
  }
  void data_gradient(const DataPlan& plan, Use use, const Output& out) const {
    NeuronBackward n;
    n.Ho = out.height, n.Wo = out.width;
    run_step(plan, use, transposed(out.gates, use == Use::gates_to_x), n, out.tensor);
  }

  // s without channels: there is nothing to convolve.
  void run_step(const DataPlan& plan, Use use, Segment s, const NeuronBackward& n,
                const Tensor& out) const {
    Packer before(s_.c, target_);
    if (use == Use::gates_to_mem) before.transposed(plan_.to_x, Use::gates_to_x);
    const char* weight = static_cast<const char*>(a_.weight) + before.bytes();
    if (!plan.mma()) {
      BackwardFma p;
      p.tiling = plan.tiling;
      s.weight = weight;
      s.weight_pitch = fma::depth(s) * fma::kColumns;
      p.d_gates = s;
      p.neuron = n;
      p.out = out;
      return launch_backward_fma(p, type_, stream());
    }
    BackwardMma p;
    p.tiling = plan.tiling;
    MmaBuilder builder(type_of(plan.multiply), plan.warps_n, plan.tiles);
    const MmaDepth depth = gates_depth(s_.c, plan.multiply);
    if (s.channels > 0) builder.add(s, depth, p.tiling);
    builder.finish(weight, 0, depth.units(), plan.threads());
    p.conv = builder.conv;
    p.neuron = n;
    p.out = out;
    const bool gathers = !out.present() && s_.c.pool != Pool::none && plan_.spreads;
    const BackwardShared layout(plan, p.conv, gathers);
    p.mem_tile = layout.mem_tile, p.mem_pitch = layout.mem_pitch;
    p.vectors = layout.vectors, p.row_sums = layout.row_sums;
    launch_backward_mma(plan, p, layout.bytes, stream());
  }

  void weight_gradient() const {
    const Cell& c = s_.c;
    WeightGrad grad[2];
    const WeightPlan* plans[2] = {&plan_.x_grad, &plan_.mem_grad};
    grad[0].in = input_window(c);
    grad[0].in.src = tensor(a_.x, type_, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
    grad[1].in = state_window(c);
    grad[1].in.src = state_tensor(c, a_.mem0, 0, 4);
    if (c.T > 1) grad[1].later = as_tensor(image(mem_, s_, gate_type_));
    ReduceWeights r;
    for (int k = 0; k < 2; ++k) {
      WeightGrad& g = grad[k];
      const WeightPlan& plan = *plans[k];
      g.d_gates = d_gates(0);
      g.tiling = plan.tiling;
      g.Ho = int(s_.Ho), g.Wo = int(s_.Wo);
      g.rows = int(4 * s_.Cp), g.columns = int(s_.taps * g.in.channels);
      g.share = plan.share, g.total = plan.total;
      g.parts = parts_[k], g.part_rows = plan.part_rows, g.part_columns = plan.part_columns;
      ReduceWeight& h = r.half[k];
      h.parts = parts_[k], h.splits = plan.splits;
      h.part_rows = plan.part_rows, h.part_columns = plan.part_columns;
      h.channels = g.in.channels, h.tap_stride = plan.tap_stride;
      h.first_channel = k == 0 ? 0 : int(c.Cin);
    }
    if (plan_.x_grad.mma()) {
      WeightGradJobs jobs;
      for (int k = 0; k < 2; ++k) jobs.job[k] = weight_job(*plans[k], grad[k], k == 0);
      launch_weight_grad_mma(plan_, jobs, stream());
    } else {
      for (int k = 0; k < 2; ++k)
        launch_weight_grad_fma(grad[k], plans[k]->splits, real_, stream());
    }
    r.C = int(c.C), r.Cp = int(s_.Cp), r.taps = int(s_.taps);
    r.all_channels = int(c.Cin + c.C);
    r.grad = a_.grad_weight, r.type = type_;
    launch_reduce_weight(r, stream());
  }

  WeightGradMma weight_job(const WeightPlan& plan, const WeightGrad& grad, bool of_x) const {
    const MmaType type(plan.multiply);
    const MmaDepth depth = of_x ? x_depth(s_.c, plan.multiply) : mem_depth(s_.c, plan.multiply);
    WeightGradMma p;
    p.grad = grad;
    p.column_blocks = plan.column_blocks, p.row_blocks = plan.row_blocks();
    p.splits = plan.splits;
    p.multiply = plan.multiply;
    p.warp_rows = plan.warp_rows;
    p.column_pitch = plan.column_pitch;
    p.buffer_bytes = plan.buffer_bytes;
    Segment in = grad.in;
    for (MmaSegment& m : p.source) {
      m = mma_segment(in, type, depth, plan.tiling);
      m.tail_steps =
          2;  // every warp reads its 16 channels: whole chunks, with zeros behind the last
      // A chunk comes in the time of 4 k-steps.
      m.turns = int(ceil_div(ceil_div(chunk_turns(m, type), plan.threads()), 4));
      if (grad.later.present()) in.src = grad.later;
    }
    return p;
  }

  const BackwardArgs& a_;
  const Target& target_;
  Shape s_;
  BackwardPlan plan_;
  DType type_, real_, gate_type_;
  void *d_gates_ = nullptr, *mem_ = nullptr, *d_syn_ = nullptr, *sums_ = nullptr;
  void *spikes_ = nullptr, *parts_[2] = {nullptr, nullptr};
};

}  // namespace

void backward(const BackwardArgs& args, const Target& target) { Backward(args, target).run(); }

int64_t backward_workspace(const Cell& cell, const Target& target) {
  return Backward::workspace(cell, target);
}

}  // namespace snnlstm::cuda
