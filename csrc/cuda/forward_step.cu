#include "launchers.h"

namespace snnlstm::cuda {

void launch_forward_mma(const ForwardPlan& plan, const ForwardMma& p, void* stream) {
  const size_t shared_bytes = p.vectors + 5 * plan.channels() * sizeof(float);
  const Launch how{"forward step (mma)", p.tiling.blocks(), plan.threads(), shared_bytes, stream};
  with_element(plan.multiply, [&](auto element) {
    using E = decltype(element);
    launch(how, plan.tiles == 8 ? &forward_mma<E, 2> : &forward_mma<E, 1>, p);
  });
}

void launch_forward_fma(const ForwardFma& p, void* stream) {
  with_real(p.neuron.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"forward step (fma)", p.tiling.blocks(), fma::kThreads, sizeof(fma::Shared<R>),
                     stream};
    launch(how, &forward_fma<R>, p);
  });
}

}  // namespace snnlstm::cuda
