#include "launch.h"

namespace snnlstm::cuda {

void launch_weight_grad_mma(const WeightPlans& plan, const Jobs<WeightGradMma>& p, void* stream) {
  int64_t blocks = 0;
  for (const WeightGradMma& job : p.job)
    blocks += int64_t(job.column_blocks) * job.row_blocks * job.splits;
  const Launch how{"weight gradient (mma)", blocks, plan.threads(), size_t(plan.shared_bytes()),
                   stream};
  constexpr void (*kernels[])(Jobs<WeightGradMma>) = {
      nullptr, &weight_grad_mma<Multiply::fp16>, &weight_grad_mma<Multiply::bf16>,
      &weight_grad_mma<Multiply::tf32>, &weight_grad_mma<Multiply::tf32x3>};
  launch(how, kernels[int(plan.x.multiply)], p);
}

}  // namespace snnlstm::cuda
