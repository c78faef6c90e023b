#include "launch.h"

namespace snnlstm::cuda {

void launch_backward_mma(const DataPlan& plan, const BackwardMma& p, size_t shared_bytes,
                         void* stream) {
  const Launch how{"backward step (mma)", p.tiling.blocks(), plan.threads(), shared_bytes, stream};
  with_element(plan.multiply, [&](auto element) {
    using E = decltype(element);
    launch(how, plan.tiles == 8 ? &backward_mma<E, 8> : &backward_mma<E, 2>, p);
  });
}

void launch_data_gradient_mma(const Jobs<DataGradientMma>& p, Multiply multiply,
                              size_t shared_bytes, void* stream) {
  static_assert(sizeof(p) <= 4096, "a kernel's arguments take no more");
  const Launch how{"data gradient (mma)", p.job[0].blocks + p.job[1].blocks, kBackwardThreads,
                   shared_bytes, stream};
  with_element(multiply,
               [&](auto element) { launch(how, &data_gradient_mma<decltype(element)>, p); });
}

}  // namespace snnlstm::cuda
