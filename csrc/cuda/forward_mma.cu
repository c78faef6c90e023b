#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_mma(const ForwardPlan& plan, const ForwardMma& p, Stream stream) {
  const Launch how{"forward step (mma)", dim3(unsigned(p.tiling.blocks())),
                   dim3(unsigned(plan.threads())),
                   size_t(p.vectors) + 5 * plan.channels() * sizeof(float), stream};
  with_element(plan.multiply, [&](auto element) {
    using E = decltype(element);
    if (plan.tiles == 8)
      launch(how, &forward_mma<E, 2>, p);
    else
      launch(how, &forward_mma<E, 1>, p);
  });
}

}  // namespace snnlstm::cuda
