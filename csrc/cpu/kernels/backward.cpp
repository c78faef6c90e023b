#include "backward.h"

#include "entry.h"
#include "lanes.h"

SNNLSTM_BEGIN_ISA

void backward(const BackwardArgs& args) {
  with_lanes(args.cell,
             [&](auto lanes) { typename decltype(lanes)::template Of<Backward>(args).run(); });
}

int64_t backward_workspace(const Cell& cell, int threads, bool weight) {
  return with_lanes(cell, [&](auto lanes) {
    return decltype(lanes)::template Of<Backward>::workspace(cell, threads, weight);
  });
}

SNNLSTM_END_ISA
