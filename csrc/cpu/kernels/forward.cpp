#include "forward.h"

#include "entry.h"
#include "lanes.h"

SNNLSTM_BEGIN_ISA

void forward(const ForwardArgs& args) {
  with_lanes(args.cell, [&](auto lanes) {
    using L = decltype(lanes);
    Forward<typename L::Scalar, L::count>(args).run();
  });
}

int64_t forward_workspace(const Cell& cell, int threads) {
  return with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    return Forward<typename L::Scalar, L::count>::workspace(cell, threads);
  });
}

SNNLSTM_END_ISA
