#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_fma(DType dtype, const ForwardFma& p, Stream stream) {
  with_type(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const Launch how{"forward step (fma)", dim3(unsigned(p.tiling.blocks())), dim3(fma::kThreads),
                     sizeof(fma::Shared<RealOf<S>>), stream};
    launch(how, &forward_fma<S>, p);
  });
}

void launch_fire(DType dtype, const FireStep& p, bool inhibition, Stream stream) {
  with_type(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    if (inhibition) {
      const Launch how{"fire (inhibition)", dim3(unsigned(p.N)), dim3(kFireThreads),
                       sizeof(WinnerShared<RealOf<S>>), stream};
      return launch(how, &fire_winner<S>, p);
    }
    const int64_t neurons = int64_t(p.N) * p.fire.C * p.fire.Hp * p.fire.Wp;
    const Launch how{"fire", dim3(unsigned(ceil_div(neurons, kFireThreads))), dim3(kFireThreads), 0,
                     stream};
    launch(how, &fire_windows<S>, p);
  });
}

}  // namespace snnlstm::cuda
