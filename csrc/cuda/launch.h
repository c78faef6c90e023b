// The launchers: one function a kernel, which picks the instance for the types. Each family is
// compiled in a file of its own.
#pragma once

#include "choose.h"
#include "choose_backward.h"
#include "fire.cuh"
#include "forward_fma.cuh"
#include "forward_mma.cuh"
#include "pack.cuh"
#include "spread.cuh"
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

}  // namespace snnlstm::cuda
