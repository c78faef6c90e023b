#include "launch.h"

namespace snnlstm::cuda {

void launch_backward_mma(const DataPlan& plan, const BackwardMma& p, int shared_bytes,
                         Stream stream) {
  const Launch how{p.out.present() ? "data gradient (mma)" : "backward step (mma)",
                   dim3(unsigned(p.tiling.blocks())), dim3(unsigned(plan.threads())),
                   size_t(shared_bytes), stream};
  with_element(plan.multiply, [&](auto element) {
    using E = decltype(element);
    if (plan.tiles == 8)
      launch(how, &backward_mma<E, 8>, p);
    else
      launch(how, &backward_mma<E, 2>, p);
  });
}

}  // namespace snnlstm::cuda
