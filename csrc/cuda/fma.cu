// The launchers of one step without tensor cores.
#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_fma(const ForwardFma& p, Stream stream) {
  with_real(p.neuron.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"forward step (fma)", dim3(unsigned(p.tiling.blocks())), dim3(fma::kThreads),
                     sizeof(fma::Shared<R>), stream};
    launch(how, &forward_fma<R>, p);
  });
}

void launch_fire(const FireStep& p, bool inhibition, Stream stream) {
  with_real(p.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    if (inhibition) {
      const Launch how{"fire (inhibition)", dim3(unsigned(p.N)), dim3(kFireThreads),
                       sizeof(WinnerShared<R>), stream};
      return launch(how, &fire_winner<R>, p);
    }
    const int blocks = blocks_of_sample(p.fire, kFireThreads);
    const Launch how{"fire", dim3(unsigned(p.N * blocks)), dim3(kFireThreads), 0, stream};
    launch(how, &fire_windows<R>, p);
  });
}

void launch_backward_fma(const BackwardFma& p, DType type, Stream stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const bool gathers = p.neuron.fire.pool != Pool::none && p.neuron.spreads;
    const Launch how{"backward step (fma)", dim3(unsigned(p.tiling.blocks())), dim3(fma::kThreads),
                     fma::BackwardShared<R>::bytes(gathers), stream};
    launch(how, &backward_fma<R>, p);
  });
}

void launch_data_gradient_fma(const DataGradientsFma& p, DType type, Stream stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"data gradient (fma)", dim3(unsigned(p.job[0].blocks + p.job[1].blocks)),
                     dim3(fma::kThreads), sizeof(fma::Shared<R>), stream};
    launch(how, &data_gradient_fma<R>, p);
  });
}

void launch_spread(const SpreadStep& p, Stream stream) {
  with_real(p.neuron.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    const int64_t blocks = p.tiling.images * blocks_of_sample(p.neuron.fire, kSpreadThreads);
    const Launch how{"spread spikes", dim3(unsigned(blocks)), dim3(kSpreadThreads), 0, stream};
    launch(how, &spread_spikes<R>, p);
  });
}

}  // namespace snnlstm::cuda
