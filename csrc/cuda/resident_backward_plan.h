// The backward pass's part of resident_plan.h.
#pragma once

#include "choose_backward.h"
#include "resident_backward.cuh"
#include "resident_plan.h"

namespace snnlstm::cuda {

struct ResidentBackwardPlan {
  const char* reason_against = nullptr;      // why the kernels of one step must do it
  DataPlan step;                             // whose packed weights are used
  Tiling tiling;                             // one tile is the whole image
  int groups = 0, units = 0, warps = 0;      // of 16 channels; of the convolution; of a block
  int quad_bits = 2, tiles = 1, pieces = 0;  // of the pointwise part, see ResidentBackward
  ResidentBackwardLayout at;
  int weight_bytes = 0;

  int threads() const { return 32 * warps; }
  int held_channels() const { return pieces / tiles * (4 << quad_bits); }
  int channels() const { return resident::power_of_two(held_channels()); }
};

// The plan, whether or not it pays. step: how the kernels of one step form the gradient of mem.
inline ResidentBackwardPlan plan_resident_backward(const Cell& c, const Target& target,
                                                   const DataPlan& step) {
  ResidentBackwardPlan plan;
  plan.step = step;
  const bool mma = step.mma();
  const int real = c.dtype == DType::float64 ? 8 : 4;
  const Shape s(c);
  if (c.C > 32) {
    plan.reason_against = "its backward pass has at most 32 channels";
    return plan;
  }
  if (resident::is_large(c, target.shared_bytes)) {
    plan.reason_against = "an image or the weights do not fit in the shared memory of a block";
    return plan;
  }
  plan.tiling = resident::whole_image(c);
  const int64_t pixels = int64_t(plan.tiling.h) * plan.tiling.w;
  plan.groups = int(mma ? ceil_div(c.C, step.channels()) * step.warps_n : ceil_div(c.C, 16));
  plan.units = int(ceil_div(pixels, mma ? 32 : 64) * plan.groups);
  plan.quad_bits = s.Cp == 8 ? 1 : 2;
  plan.tiles = int(ceil_div(pixels, 64 >> plan.quad_bits));
  plan.pieces = plan.tiles * int(ceil_div(s.Cp, 4 << plan.quad_bits));
  // The pointwise part takes more instructions than the convolution.
  plan.warps = resident::warps_for(plan.pieces, resident::backward_threads(real));

  ResidentBackwardLayout& at = plan.at;
  at.d_gates = resident::shared_image(gates_window(c, false), s.Ho, plan.tiling.w);
  int64_t table = 0;
  if (mma) {
    const PackedPart packed = packed_transposed(c, step, Use::gates_to_mem);
    resident::as_pixels(at.d_gates, packed.depth, MmaType(step.multiply).element, plan.tiling.w);
    table = 2 * packed.units();
    plan.weight_bytes = int(packed.bytes());
  } else {
    resident::as_planes(at.d_gates, int(4 * s.Cp), real);
    table = s.taps * 4 * s.Cp;
    plan.weight_bytes = int(table) * 16 * plan.groups * real;
  }
  resident::Pieces pieces;
  pieces.take(at.d_gates.bytes);
  at.weights = pieces.take(plan.weight_bytes);
  at.table = pieces.take(table * 4);
  const int64_t slots = int64_t(plan.pieces) * 2 * kSlotStride * real;
  at.d_mem = pieces.take(slots), at.d_syn = pieces.take(slots);
  at.vectors = pieces.take(plan.channels() * real);
  at.row_sums = pieces.take(2 * plan.warps * plan.channels() * real);
  at.mem_pitch = plan.tiles * (64 >> plan.quad_bits) + 2;
  at.mem_tile =
      pieces.take(c.pool == Pool::none ? 0 : int64_t(plan.held_channels()) * at.mem_pitch * real);
  at.bytes = int(pieces.end);
  if (pieces.end > target.shared_bytes)
    plan.reason_against = "an image and the weights do not fit in the shared memory of a block";
  return plan;
}

// Returns whether the steps of a call's backward pass are one launch.
inline bool runs_resident_backward(const Cell& c, const Target& target,
                                   const ResidentBackwardPlan& plan) {
  if (!may_be_resident(c, target)) return false;
  const bool pays = resident_pays(c, target, plan.step.multiply, plan.step.tiling.blocks(), c.C,
                                  resident_cost::neuron_backward);
  return wants_resident(plan.reason_against, pays, target);
}

}  // namespace snnlstm::cuda
