#include "launchers.h"

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

void launch_backward_fma(const BackwardFma& p, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const bool gathers = p.neuron.fire.pool != Pool::none && p.neuron.spreads;
    const Launch how{"backward step (fma)", p.tiling.blocks(), fma::kThreads,
                     fma::BackwardShared<R>::bytes(gathers), stream};
    launch(how, &backward_fma<R>, p);
  });
}

void launch_data_gradient_fma(const Jobs<DataGradientFma>& p, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"data gradient (fma)", p.job[0].blocks + p.job[1].blocks, fma::kThreads,
                     sizeof(fma::Shared<R>), stream};
    launch(how, &data_gradient_fma<R>, p);
  });
}

void launch_spread(const NeuronBackward& p, int64_t N, void* stream) {
  with_real(p.fire.spk.type, [&](auto real) {
    const int64_t blocks = N * blocks_of_sample(p.fire, kSpreadThreads);
    const Launch how{"spread spikes", blocks, kSpreadThreads, 0, stream};
    launch(how, &spread_spikes<decltype(real)>, p);
  });
}

}  // namespace snnlstm::cuda
