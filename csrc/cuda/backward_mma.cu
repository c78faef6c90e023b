#include "launch.h"

namespace snnlstm::cuda {

void launch_backward_mma(const DataPlan& plan, const BackwardMma& p, int shared_bytes,
                         Stream stream) {
  const Launch how{p.out.present() ? "data gradient (mma)" : "backward step (mma)",
                   dim3(unsigned(p.tiling.blocks())), dim3(unsigned(plan.threads())),
                   size_t(shared_bytes), stream};
  const bool half = type_of(plan.multiply).element == 2;
  if (plan.tiles == 8)
    half ? launch(how, &backward_mma<uint16_t, 8>, p) : launch(how, &backward_mma<float, 8>, p);
  else
    half ? launch(how, &backward_mma<uint16_t, 2>, p) : launch(how, &backward_mma<float, 2>, p);
}

void launch_weight_grad_mma(const BackwardPlan& plan, const WeightGradJobs& p, Stream stream) {
  int64_t blocks = 0;
  for (const WeightGradMma& job : p.job)
    blocks += int64_t(job.column_blocks) * job.row_blocks * job.splits;
  const Launch how{
      "weight gradient (mma)", dim3(unsigned(blocks)), dim3(unsigned(plan.x_grad.threads())),
      size_t(std::max(plan.x_grad.shared_bytes(), plan.mem_grad.shared_bytes())), stream};
  if (type_of(plan.x_grad.multiply).element == 2)
    launch(how, &weight_grad_mma<uint16_t>, p);
  else
    launch(how, &weight_grad_mma<float>, p);
}

}  // namespace snnlstm::cuda
