#include "launch.h"

namespace snnlstm::cuda {

void launch_weight_grad_fma(const WeightGrad& p, int splits, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"weight gradient (fma)", dim3(p.part_columns / 64, p.part_rows / 64, splits),
                     fma::kThreads, sizeof(fma::WeightGradShared<R>), stream};
    launch(how, &weight_grad_fma<R>, p);
  });
}

void launch_reduce_weight(const ReduceWeights& given, void* stream) {
  with_real(given.type, [&](auto real) {
    using R = decltype(real);
    ReduceWeights p = given;
    const int64_t of_one = p.pitch() * int64_t(sizeof(R));
    while (p.chunk > 1 && p.chunk * of_one > 48 * 1024) p.chunk /= 2;
    const int64_t blocks = int64_t(4) * p.C * (p.chunks(0) + p.chunks(1));
    const Launch how{"add weight gradients", blocks, kReduceThreads, size_t(p.chunk * of_one),
                     stream};
    launch(how, &reduce_weight<R>, p);
  });
}

void launch_sum_gates(const SumGates& p, int splits, DType type, void* stream) {
  with_real(type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"sum gate gradients", dim3(p.columns / kSumColumns, splits), kSumThreads,
                     sizeof(SumShared<R>), stream};
    launch(how, &sum_gates<R>, p);
  });
}

void launch_reduce_sums(const ReduceSums& p, void* stream) {
  with_real(p.type, [&](auto real) {
    using R = decltype(real);
    const Launch how{"add bias or threshold gradients", dim3(ceil_div(p.columns, 32), p.rows),
                     kReduceThreads, sizeof(ReduceShared<R>), stream};
    launch(how, &reduce_sums<R>, p);
  });
}

}  // namespace snnlstm::cuda
