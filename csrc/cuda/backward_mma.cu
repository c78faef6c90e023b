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

}  // namespace snnlstm::cuda
