#include "launch.h"

namespace snnlstm::cuda {

void launch_backward_fma(const BackwardFma& p, DType type, Stream stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const bool gathers = !p.out.present() && p.neuron.fire.pool != Pool::none && p.neuron.spreads;
    const Launch how{p.out.present() ? "data gradient (fma)" : "backward step (fma)",
                     dim3(unsigned(p.tiling.blocks())), dim3(fma::kThreads),
                     fma::BackwardShared<R>::bytes(gathers), stream};
    launch(how, &backward_fma<R>, p);
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

void launch_weight_grad_fma(const WeightGrad& p, int splits, DType type, Stream stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"weight gradient (fma)",
                     dim3(unsigned(p.part_columns / 64), unsigned(p.part_rows / 64), splits),
                     dim3(fma::kThreads), sizeof(fma::WeightGradShared<R>), stream};
    launch(how, &weight_grad_fma<R>, p);
  });
}

void launch_reduce_weight(const ReduceWeights& given, Stream stream) {
  with_real(given.type, [&](auto real) {
    using R = decltype(real);
    ReduceWeights p = given;
    const int64_t of_one = p.pitch() * int64_t(sizeof(R));
    while (p.chunk > 1 && p.chunk * of_one > 48 * 1024) p.chunk /= 2;
    const Launch how{"add weight gradients",
                     dim3(unsigned(p.chunks(0) + p.chunks(1)), unsigned(4 * p.C)),
                     dim3(kReduceThreads), size_t(p.chunk * of_one), stream};
    launch(how, &reduce_weight<R>, p);
  });
}

void launch_reduce_sums(const ReduceSums& p, Stream stream) {
  with_real(p.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"add bias and threshold gradients", dim3(unsigned(ceil_div(p.C, 32)), 5),
                     dim3(kReduceThreads), sizeof(ReduceShared<R>), stream};
    launch(how, &reduce_sums<R>, p);
  });
}

}  // namespace snnlstm::cuda
