#include "launch.h"

namespace snnlstm::cuda {

void launch_weight_grad_mma(const WeightPlans& plan, const WeightGradJobs& p, Stream stream) {
  int64_t blocks = 0;
  for (const WeightGradMma& job : p.job)
    blocks += int64_t(job.column_blocks) * job.row_blocks * job.splits;
  const Launch how{"weight gradient (mma)", dim3(unsigned(blocks)), dim3(unsigned(plan.threads())),
                   size_t(plan.shared_bytes()), stream};
  switch (plan.x.multiply) {
    case Multiply::fp16:
      return launch(how, &weight_grad_mma<Multiply::fp16>, p);
    case Multiply::bf16:
      return launch(how, &weight_grad_mma<Multiply::bf16>, p);
    case Multiply::tf32:
      return launch(how, &weight_grad_mma<Multiply::tf32>, p);
    default:
      return launch(how, &weight_grad_mma<Multiply::tf32x3>, p);
  }
}

}  // namespace snnlstm::cuda
