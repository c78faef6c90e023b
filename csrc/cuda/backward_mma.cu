#include "launch.h"

namespace snnlstm::cuda {

void launch_backward_mma(const DataPlan& plan, const BackwardMma& p, int shared_bytes,
                         Stream stream) {
  const Launch how{"backward step (mma)", dim3(unsigned(p.tiling.blocks())),
                   dim3(unsigned(plan.threads())), size_t(shared_bytes), stream};
  with_element(plan.multiply, [&](auto element) {
    using E = decltype(element);
    if (plan.tiles == 8)
      launch(how, &backward_mma<E, 8>, p);
    else
      launch(how, &backward_mma<E, 2>, p);
  });
}

void launch_data_gradient_mma(const DataGradientsMma& p, Multiply multiply, int shared_bytes,
                              Stream stream) {
  static_assert(sizeof(DataGradientsMma) <= 4096, "all that a kernel's arguments may take");
  const Launch how{"data gradient (mma)", dim3(unsigned(p.job[0].blocks + p.job[1].blocks)),
                   dim3(kBackwardThreads), size_t(shared_bytes), stream};
  with_element(multiply,
               [&](auto element) { launch(how, &data_gradient_mma<decltype(element)>, p); });
}

}  // namespace snnlstm::cuda
