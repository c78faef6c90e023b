#include "backward.h"

#include "entry.h"
#include "lanes.h"
#include "step_gradients.h"

SNNLSTM_BEGIN_ISA

void backward(const BackwardArgs& args) {
  with_lanes(args.cell, [&](auto lanes) {
    using L = decltype(lanes);
    Backward<typename L::Scalar, L::count>(args).run();
  });
}

int64_t backward_workspace(const Cell& cell, int threads, bool weight) {
  return with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    return Backward<typename L::Scalar, L::count>::workspace(cell, threads, weight);
  });
}

void weight_gradient(const WeightGradArgs& args) {
  with_lanes(args.cell, [&](auto lanes) {
    using L = decltype(lanes);
    StepGradients<typename L::Scalar, L::count>(args).run();
  });
}

int64_t weight_gradient_workspace(const Cell& cell, int threads) {
  return with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    return StepGradients<typename L::Scalar, L::count>::workspace(cell, threads);
  });
}

SNNLSTM_END_ISA
