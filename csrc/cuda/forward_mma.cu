#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_mma(const ForwardPlan& plan, const ForwardMma& p, Stream stream) {
  const Launch how{"forward step (mma)", dim3(unsigned(p.tiling.blocks())),
                   dim3(unsigned(plan.threads())),
                   size_t(p.vectors) + 5 * plan.channels() * sizeof(float), stream};
  const bool half = type_of(plan.multiply).element == 2;
  if (plan.tiles == 8)
    half ? launch(how, &forward_mma<uint16_t, 2>, p) : launch(how, &forward_mma<float, 2>, p);
  else
    half ? launch(how, &forward_mma<uint16_t, 1>, p) : launch(how, &forward_mma<float, 1>, p);
}

}  // namespace snnlstm::cuda
