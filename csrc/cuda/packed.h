// The layout of a packed weight, computed once for the kernels that pack it and those that read it.
#pragma once

#include "pack.cuh"
#include "step_plans.h"

namespace snnlstm::cuda {

// columns: of all blocks.
inline PackedPart packed_fma(const Cell& c, const StepPlan& plan, const Segment& segment, Use use,
                             int64_t columns) {
  PackedPart part;
  part.use = use, part.columns = plan.columns;
  part.pitch = fma::depth(segment) * part.columns * std::max(bytes_of(c.dtype), 4);
  part.blocks = ceil_div(columns, part.columns);
  return part;
}

inline PackedPart packed_mma(const StepPlan& plan, const MmaDepth& depth, Use use, int64_t blocks) {
  PackedPart part;
  part.use = use, part.multiply = plan.multiply;
  part.depth = depth;
  part.tiles = plan.tiles, part.warps_n = plan.warps_n;
  part.unit_bytes = plan.builder().conv.unit_bytes;
  part.blocks = blocks;
  part.pitch = depth.units() * part.unit_bytes;
  return part;
}

struct PackedForward {
  PackedPart x, mem;

  // On tensor cores a block has the units of x, then those of mem.
  PackedForward(const Cell& c, const ForwardPlan& plan) {
    if (!plan.mma()) {
      x = packed_fma(c, plan, x_segment(c), Use::x_to_gates, 4 * c.C);
      mem = packed_fma(c, plan, mem_segment(c), Use::mem_to_gates, 4 * c.C);
      mem.start = x.bytes();
      return;
    }
    const int64_t blocks = ceil_div(c.C, plan.channels());
    x = packed_mma(plan, x_depth(c, plan.multiply), Use::x_to_gates, blocks);
    mem = packed_mma(plan, mem_depth(c, plan.multiply), Use::mem_to_gates, blocks);
    mem.start = x.pitch;
    x.pitch = mem.pitch = x.pitch + mem.pitch;
  }
  int64_t bytes() const { return x.mma() ? x.bytes() : x.bytes() + mem.bytes(); }
};

inline PackedPart packed_transposed(const Cell& c, const DataPlan& plan, Use use) {
  const bool of_x = use == Use::gates_to_x;
  const int64_t columns = of_x ? c.Cin : c.C;
  if (!plan.mma()) return packed_fma(c, plan, gates_segment(c, of_x), use, columns);
  const MmaDepth depth(MmaType(plan.multiply), gates_segment(c, of_x));
  return packed_mma(plan, depth, use, ceil_div(columns, plan.channels()));
}

struct PackedBackward {
  PackedPart to_x, to_mem;

  PackedBackward(const Cell& c, const DataPlan& of_x, const DataPlan& of_mem)
      : to_x(packed_transposed(c, of_x, Use::gates_to_x)),
        to_mem(packed_transposed(c, of_mem, Use::gates_to_mem)) {
    to_mem.start = to_x.bytes();
  }
  int64_t bytes() const { return to_x.bytes() + to_mem.bytes(); }
};

}  // namespace snnlstm::cuda
