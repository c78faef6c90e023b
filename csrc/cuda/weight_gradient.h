// Launches the kernels that form the gradients of weight and bias over many steps, and lays out
// their memory. backward() ends with them.
#pragma once

#include "choose.h"
#include "launch.h"

namespace snnlstm::cuda {

class WeightGradient {
 public:
  struct Sources {
    Tensor x;          // (T, N, Cin, H, W)
    Tensor mem;        // before the first step
    Tensor mem_later;  // after each step; absent if there is one step
    void* d_gates;     // (T, N, Ho, Wo, 4, Cp)
  };

  WeightGradient(const Cell& cell, const Target& target)
      : target_(target),
        s_(cell),
        plan_(plan_weights(cell, target)),
        type_(cell.dtype),
        real_(real_of(type_)),
        gate_type_(gate_type(type_, target.matrix)),
        bias_splits_(int(std::clamp<int64_t>(pixels() / 1024, 1, 4 * target.multiprocessors))) {}

  // Takes the workspace.
  void carve(Arena& arena) {
    parts_[0] = arena.take(plan_.x.part_bytes(real_));
    parts_[1] = arena.take(plan_.mem.part_bytes(real_));
    bias_parts_ = arena.take(bias_splits_ * 4 * s_.Cp * bytes_of(real_));
  }

  // Either gradient may be null.
  void run(const Sources& from, void* grad_weight, void* grad_bias) const {
    if (grad_weight) weight(from, grad_weight);
    if (grad_bias) bias(from, grad_bias);
  }

 private:
  int64_t pixels() const { return s_.c.T * s_.c.N * s_.pixels; }

  void bias(const Sources& from, void* grad) const {
    SumGates p;
    p.d_gates = from.d_gates, p.type = gate_type_;
    p.columns = int(4 * s_.Cp);
    p.pixels = pixels(), p.share = ceil_div(p.pixels, bias_splits_);
    p.parts = bias_parts_;
    launch_sum_gates(p, bias_splits_, real_, target_.stream);
    ReduceSums r;
    r.parts = bias_parts_, r.blocks = bias_splits_;
    r.rows = 4, r.pitch = int(s_.Cp), r.columns = int(s_.c.C);
    r.out = grad, r.type = type_;
    launch_reduce_sums(r, target_.stream);
  }

  void weight(const Sources& from, void* out) const {
    const Cell& c = s_.c;
    WeightGrad grad[2];
    const WeightPlan* plans[2] = {&plan_.x, &plan_.mem};
    grad[0].in = input_window(c);
    grad[0].in.src = from.x;
    grad[1].in = state_window(c);
    grad[1].in.src = from.mem;
    grad[1].later = from.mem_later;
    ReduceWeights r;
    for (int k = 0; k < 2; ++k) {
      WeightGrad& g = grad[k];
      const WeightPlan& plan = *plans[k];
      g.d_gates = image(from.d_gates, s_, gate_type_, 4);
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
    if (plan_.x.mma()) {
      Jobs<WeightGradMma> jobs;
      const int threads = plan_.threads();
      for (int k = 0; k < 2; ++k) jobs.job[k] = job(*plans[k], grad[k], k == 0, threads);
      launch_weight_grad_mma(plan_, jobs, target_.stream);
    } else {
      for (int k = 0; k < 2; ++k)
        launch_weight_grad_fma(grad[k], plans[k]->splits, real_, target_.stream);
    }
    r.C = int(c.C), r.Cp = int(s_.Cp), r.taps = int(s_.taps);
    r.all_channels = int(c.Cin + c.C);
    r.grad = out, r.type = type_;
    launch_reduce_weight(r, target_.stream);
  }

  // threads: of a block of the launch, which may have more warps than the job.
  WeightGradMma job(const WeightPlan& plan, const WeightGrad& grad, bool of_x, int threads) const {
    const MmaType type(plan.multiply);
    const MmaDepth depth = of_x ? x_depth(s_.c, plan.multiply) : mem_depth(s_.c, plan.multiply);
    WeightGradMma p;
    p.grad = grad;
    p.column_blocks = plan.column_blocks, p.row_blocks = plan.row_blocks();
    p.splits = plan.splits;
    p.warp_rows = plan.warp_rows, p.tap_groups = plan.tap_groups;
    p.planes = plan.warp_rows * type.element / 2;
    while (4 * p.planes > 1 << p.unit_bits) ++p.unit_bits;
    p.column_pitch = plan.column_pitch;
    p.buffer_bytes = plan.buffer_bytes;
    p.totals = plan_.totals();
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

  const Target& target_;
  Shape s_;
  WeightPlans plan_;
  DType type_, real_, gate_type_;
  int bias_splits_;
  void *parts_[2] = {nullptr, nullptr}, *bias_parts_ = nullptr;
};

}  // namespace snnlstm::cuda
