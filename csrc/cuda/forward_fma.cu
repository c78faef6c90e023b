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

}  // namespace snnlstm::cuda
