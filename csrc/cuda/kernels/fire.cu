#include "../launchers.h"
#include "fire.cuh"

namespace snnlstm::cuda {

void launch_fire(const FireStep& p, void* stream) {
  with_real(p.fire.spk.type, [&](auto real) {
    const int blocks = blocks_of_sample(p.fire, kFireThreads);
    const Launch how{"fire", p.N * blocks, kFireThreads, 0, stream};
    launch(how, &fire_windows<decltype(real)>, p);
  });
}

void launch_spread(NeuronBackward& p, const Tensor& spikes, int64_t N, void* stream) {
  if (!p.fire.spk.present() || p.surrogate == Surrogate::none) return;
  p.spikes_in = spikes;
  with_real(p.fire.spk.type, [&](auto real) {
    const int64_t blocks = N * blocks_of_sample(p.fire, kSpreadThreads);
    const Launch how{"spread spikes", blocks, kSpreadThreads, 0, stream};
    launch(how, &spread_spikes<decltype(real)>, p);
  });
}

}  // namespace snnlstm::cuda
