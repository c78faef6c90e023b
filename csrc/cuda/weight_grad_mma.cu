#include "launch.h"

namespace snnlstm::cuda {

void launch_weight_grad_mma(const WeightPlans& plan, const WeightGradJobs& p, Stream stream) {
  int64_t blocks = 0;
  for (const WeightGradMma& job : p.job)
    blocks += int64_t(job.column_blocks) * job.row_blocks * job.splits;
  const Launch how{"weight gradient (mma)", dim3(unsigned(blocks)),
                   dim3(unsigned(plan.x.threads())),
                   size_t(std::max(plan.x.shared_bytes(), plan.mem.shared_bytes())), stream};
  if (type_of(plan.x.multiply).element == 2)
    launch(how, &weight_grad_mma<uint16_t>, p);
  else
    launch(how, &weight_grad_mma<float>, p);
}

}  // namespace snnlstm::cuda
