// The launchers: one function a kernel, which picks the instance for the types. Each family is
// compiled in a file of its own.
#pragma once

#include "backward.cuh"
#include "choose.h"
#include "fire.cuh"
#include "forward.cuh"
#include "neuron_backward.cuh"
#include "pack.cuh"
#include "plan.h"
#include "weight_grad.cuh"

namespace snnlstm::cuda {

void launch_forward_fma(const ForwardFma& p, Stream stream);
void launch_forward_mma(const ForwardPlan& plan, const ForwardMma& p, Stream stream);
void launch_fire(const FireStep& p, bool inhibition, Stream stream);

void launch_backward_fma(const BackwardFma& p, DType type, Stream stream);
void launch_backward_mma(const DataPlan& plan, const BackwardMma& p, int shared_bytes,
                         Stream stream);
void launch_data_gradient_fma(const DataGradientsFma& p, DType type, Stream stream);
void launch_data_gradient_mma(const DataGradientsMma& p, Multiply multiply, int shared_bytes,
                              Stream stream);
void launch_spread(const SpreadStep& p, Stream stream);
void launch_weight_grad_fma(const WeightGrad& p, int splits, DType type, Stream stream);
void launch_weight_grad_mma(const WeightPlans& plan, const WeightGradJobs& p, Stream stream);
void launch_reduce_weight(const ReduceWeights& p, Stream stream);
void launch_sum_gates(const SumGates& p, int splits, DType type, Stream stream);
void launch_reduce_sums(const ReduceSums& p, Stream stream);

// The whole sequence in one launch; see resident_plan.h for whether it can be.
void resident_forward(const ForwardArgs& args, const Target& target);

// What the steps of the backward pass leave; mem and sums: null where they are not wanted.
struct ResidentGradients {
  void *d_gates = nullptr, *mem = nullptr, *sums = nullptr;
};
struct ResidentBackwardPlan;
// All steps and the gradients of the first states. weight: packed, for the gradient of mem.
void resident_backward(const ResidentBackwardPlan& plan, const BackwardArgs& args,
                       const ResidentGradients& to, const void* weight, const Target& target);

int64_t forward_workspace(const Cell& cell, const Target& target);
int64_t backward_workspace(const Cell& cell, const Target& target, bool of_weights);
int64_t weight_workspace(const Cell& cell, const Target& target);

// f(E{}) with the type of elements that tensor core kernels are compiled for.
template <class F>
void with_element(Multiply multiply, F&& f) {
  if (multiply == Multiply::tf32x3) return f(mma_gemm::Parts{});
  multiply == Multiply::tf32 ? f(float{}) : f(uint16_t{});
}

// f(R{}) with the type that the kernels compute in.
template <class F>
void with_real(DType type, F&& f) {
  type == DType::float64 ? f(double{}) : f(float{});
}

// ---- arguments ----------------------------------------------------------------------------------
//
// From the caller's arguments to what the neurons' kernels take, for one time step.

template <class Args>
Fire fire_of(const Args& a, const View& spk, int64_t t, int held) {
  const Cell& c = a.cell;
  Fire f;
  f.C = int(c.C), f.Hp = int(c.Hp()), f.Wp = int(c.Wp());
  f.pool = c.pool, f.pool_h = c.pool_h, f.pool_w = c.pool_w;
  f.num_levels = c.num_levels, f.levels = a.levels;
  f.threshold = a.threshold, f.threshold_stride = a.threshold_stride;
  f.graded = a.graded_factor;
  f.spk = tensor(spk, c.dtype, t, {1, c.N, c.C, c.Hp(), c.Wp()}, held);
  return f;
}

// What the kernels of both passes take; spk: of step t, or its gradient.
template <class Neuron, class Args>
Neuron neuron_of_step(const Args& a, const View& spk, int64_t t, int held) {
  const Cell& c = a.cell;
  Neuron n;
  n.C = int(c.C), n.Cp = int(Shape(c).Cp), n.Ho = int(c.Ho()), n.Wo = int(c.Wo());
  n.reset = c.reset;
  n.fire = fire_of(a, spk, t, held);
  return n;
}

inline Tensor state_tensor(const Cell& c, const View& v, int64_t t, int held) {
  return tensor(v, c.dtype, t, {1, c.N, c.C, c.Ho(), c.Wo()}, held);
}

// Has the states before the first step, and those after step t where the caller wants them; held:
// channels that a thread holds.
inline NeuronForward neuron_forward(const ForwardArgs& a, int64_t t, int held) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronForward>(a, a.spk, t, held);
  n.bias = a.bias;
  n.syn_in = state_tensor(c, a.syn0, 0, held), n.mem_in = state_tensor(c, a.mem0, 0, held);
  if (a.record || t == c.T - 1)
    n.syn_out = state_tensor(c, a.syn, t, held), n.mem_out = state_tensor(c, a.mem, t, held);
  return n;
}

// Has syn before the first step, and the caller's gradients of step t.
inline NeuronBackward neuron_backward(const BackwardArgs& a, int64_t t) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronBackward>(a, a.grad_spk, t, 4);
  n.surrogate = c.surrogate, n.p0 = c.surrogate_p0, n.p1 = c.surrogate_p1;
  n.noise = tensor(a.noise, c.dtype, t, {1, c.N, c.C, c.Hp(), c.Wp()}, 4);
  n.winner = c.inhibition ? a.winner + t * c.N : nullptr;
  n.syn_prev = state_tensor(c, a.syn0, 0, 4);
  if (a.record || t == c.T - 1) {
    n.grad_syn = state_tensor(c, a.grad_syn, a.record ? t : 0, 4);
    n.grad_mem = state_tensor(c, a.grad_mem, a.record ? t : 0, 4);
  }
  return n;
}

}  // namespace snnlstm::cuda
