#include "forward.h"

#include "entry.h"
#include "lanes.h"

SNNLSTM_BEGIN_ISA

void forward(const ForwardArgs& args) {
  with_lanes(args.cell,
             [&](auto lanes) { typename decltype(lanes)::template Of<Forward>(args).run(); });
}

int64_t forward_workspace(const Cell& cell, int threads) {
  return with_lanes(cell, [&](auto lanes) {
    return decltype(lanes)::template Of<Forward>::workspace(cell, threads);
  });
}

SNNLSTM_END_ISA
