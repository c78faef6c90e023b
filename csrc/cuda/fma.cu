// The launchers of one step without tensor cores.
#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_fma(const ForwardFma& p, void* stream) {
  with_real(p.neuron.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"forward step (fma)", p.tiling.blocks(), fma::kThreads, sizeof(fma::Shared<R>),
                     stream};
    launch(how, &forward_fma<R>, p);
  });
}

void launch_fire(const FireStep& p, bool inhibition, void* stream) {
  with_real(p.fire.spk.type, [&](auto real) {
    using R = decltype(real);
    if (inhibition) {
      const Launch how{"fire (inhibition)", p.N, kFireThreads, sizeof(WinnerShared<R>), stream};
      return launch(how, &fire_winner<R>, p);
    }
    const int blocks = blocks_of_sample(p.fire, kFireThreads);
    const Launch how{"fire", p.N * blocks, kFireThreads, 0, stream};
    launch(how, &fire_windows<R>, p);
  });
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
