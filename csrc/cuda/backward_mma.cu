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

void launch_weight_grad_mma(const WeightPlan& plan, const WeightGradMma& p, Stream stream) {
  const Launch how{"weight gradient (mma)",
                   dim3(unsigned(plan.column_blocks),
                        unsigned(plan.part_rows / (32 * plan.warp_rows)), unsigned(plan.splits)),
                   dim3(unsigned(plan.threads())), size_t(plan.shared_bytes()), stream};
  if (type_of(plan.multiply).element == 2)
    launch(how, &weight_grad_mma<uint16_t>, p);
  else
    launch(how, &weight_grad_mma<float>, p);
}

}  // namespace snnlstm::cuda
