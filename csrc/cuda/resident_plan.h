// Says whether a sequence can and should run in one launch (resident.cuh), and lays out the shared
// memory of its blocks.
#pragma once

#include "packed.h"
#include "resident_backward.cuh"
#include "resident_forward.cuh"

namespace snnlstm::cuda {

template <class Layout>
struct ResidentPlanOf {
  bool fits = false;          // whether a block's shared memory holds it all
  Tiling tiling;              // one tile is the whole image
  int groups = 0, units = 0;  // units of the same pixels; of the convolution
  int warps = 0;              // of a block
  Layout at;
  int weight_bytes = 0;

  int threads() const { return 32 * warps; }

  template <class Args>
  void give(Args& p, const Cell& c, Multiply multiply, bool record, const void* weight) const {
    p.T = int(c.T), p.record = record;
    p.tiling = tiling, p.at = at;
    p.multiply = multiply;
    p.weight = weight, p.weight_bytes = weight_bytes;
    p.by_groups = SmallDivisor(groups), p.units = units;
  }
};

struct ResidentPlan : ResidentPlanOf<ResidentLayout> {
  int patches = 0;       // of a thread
  int table_of_mem = 0;  // where it begins, in elements of the table
};

namespace resident {

// The smallest power of two that is not below n.
inline int power_of_two(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Returns the sizes of the image that a convolution reads for a tile of w columns.
inline SharedImage shared_image(const Segment& s, int64_t Ho, int w) {
  SharedImage i;
  i.top = s.pad_h, i.left = s.pad_w;
  i.rows = int(Ho - 1) * s.step_h + (s.taps_h - 1) * s.dilation_h + 1;
  i.columns = (w - 1) * s.step_w + (s.taps_w - 1) * s.dilation_w + 1;
  return i;
}

inline void as_planes(SharedImage& i, int channels, int element) {
  i.single = element, i.pair = 2 * element;
  i.row = i.columns * element, i.channel = i.rows * i.row;
  i.bytes = int(round_up(int64_t(channels) * i.channel, 16));
}

inline void as_pixels(SharedImage& i, const MmaDepth& depth, int element, int w) {
  const int groups = int(4 * (depth.chunks - 1)) + 2 * depth.tail_steps;
  i.channel = element;
  i.single = 16 * groups, i.pair = 16 * (2 * groups + 1);
  i.row = int(ceil_div(i.columns, 2)) * i.pair;
  while ((i.row - w / 2 * i.pair) / 16 % 8 != 0) i.row += 16;
  i.bytes = i.rows * i.row;
}

// The tiling in which one tile is the whole image. Its width is even: threads hold pixel pairs.
inline Tiling whole_image(const Cell& c) {
  Tiling tiling;
  tiling.h = int(c.Ho()), tiling.w = int(round_up(c.Wo(), 2));
  tiling.by_w = SmallDivisor(tiling.w);
  tiling.by_window = SmallDivisor(std::max<int64_t>(c.Wp(), 1));
  tiling.by_windows = SmallDivisor(std::max<int64_t>(c.Hp() * c.Wp(), 1));
  tiling.images = c.N;
  tiling.by_batch = Divisor(std::max<int64_t>(c.N, 1));
  return tiling;
}

// Returns a number of warps among which the units are shared out evenly, 4 at least.
inline int warps_for(int units, int most_threads) {
  const int64_t rounds = ceil_div(units, most_threads / 32);
  return int(std::max<int64_t>(ceil_div(units, rounds), 4));
}

// Returns whether an image with its border, or the weights, have more numbers than shared memory
// has bytes. If not, their bytes can be counted in int.
inline bool is_large(const Cell& c, int64_t bytes) {
  const Shape s(c);
  const int64_t rows = s.Ho * c.stride_h + int64_t(c.kernel_h - 1) * c.dilation_h;
  const int64_t columns = (s.Wo + 1) * c.stride_w + int64_t(c.kernel_w - 1) * c.dilation_w;
  return s.pixels == 0 || 4 * s.pixels * s.Cp > bytes || rows > bytes || columns > bytes ||
         rows * columns > bytes || c.Cin * c.H * c.W > bytes ||
         4 * c.C * s.taps * (c.Cin + c.C) > bytes;
}

// Hands out pieces of shared memory, one behind the other.
struct Pieces {
  int64_t end = 0;
  int take(int64_t bytes) {
    const int64_t start = end;
    end += round_up(bytes, 128);
    return int(start);
  }
};

}  // namespace resident

inline WalkSizes walk_sizes(const MmaDepth& depth) {
  return {int(depth.chunks), depth.tail_steps, int(depth.units())};
}

// Plans the forward pass, whether or not that pays. step, packed: the plan of one step and the
// weight that its kernels read.
inline ResidentPlan plan_resident(const Cell& c, const Device& device, const ForwardPlan& step,
                                  const PackedForward& packed) {
  ResidentPlan plan;
  const bool mma = step.mma();
  const int real = bytes_of(real_of(c.dtype));
  const Segment x = x_segment(c), mem = mem_segment(c);
  const Shape s(c);
  if (resident::is_large(c, device.shared_bytes)) return plan;

  const Tiling& tiling = plan.tiling = resident::whole_image(c);
  const int unit_pixels = mma ? 32 : 64, unit_channels = mma ? 2 * step.tiles : 4;
  const int patches_of_unit = mma ? 2 : 4;
  const int64_t tiles = ceil_div(int64_t(tiling.h) * tiling.w, unit_pixels);
  plan.groups = int(mma ? ceil_div(c.C, step.channels()) * step.warps_n
                        : s.Cp / unit_channels);  // saved gates have Cp channels
  plan.units = int(tiles * plan.groups);
  plan.warps = resident::warps_for(plan.units, resident::threads(mma ? step.tiles : real));
  plan.patches = int(ceil_div(plan.units, plan.warps)) * patches_of_unit;

  ResidentLayout& at = plan.at;
  at.x = resident::shared_image(x, s.Ho, tiling.w);
  at.mem = resident::shared_image(mem, s.Ho, tiling.w);
  int64_t table = 0;
  if (mma) {
    const MmaDepth &of_x = packed.x.depth, &of_mem = packed.mem.depth;
    const MmaType type(step.multiply);
    if (of_x.patches)
      resident::as_planes(at.x, int(c.Cin), type.element);
    else
      resident::as_pixels(at.x, of_x, type.element, tiling.w);
    plan.table_of_mem = int(of_x.units()) * (of_x.patches ? type.per_step() : 2);
    table = plan.table_of_mem + 2 * of_mem.units();
    resident::as_pixels(at.mem, of_mem, type.element, tiling.w);
    plan.weight_bytes = int(packed.bytes());
  } else {
    resident::as_planes(at.x, int(c.Cin), real);
    resident::as_planes(at.mem, int(c.C), real);
    table = s.taps * (c.Cin + c.C);
    plan.weight_bytes = int(table) * 16 * plan.groups * real;
  }
  resident::Pieces pieces;
  for (SharedImage* i : {&at.x, &at.mem}) {  // two images each
    i->bytes = int(round_up(i->bytes, 128));
    i->start = pieces.take(2 * i->bytes);
  }
  const int64_t held = mma ? 2 * step.held() : 2;
  const int channels = resident::power_of_two(plan.groups * unit_channels);
  at.images = int(pieces.end);
  at.weights = pieces.take(plan.weight_bytes);
  at.table = pieces.take(table * 4);
  at.slots = pieces.take(plan.patches * plan.threads() * held * real);
  at.flags = pieces.take(c.reset == Reset::none ? 0 : int64_t(plan.patches) * plan.threads() * 4);
  at.vectors = pieces.take(5 * channels * real);
  at.mem_pitch = int(tiles) * unit_pixels + (mma && step.tiles == 8 ? 2 : mma ? 4 : 16);
  at.mem_tile = pieces.take(c.pool == Pool::none && !c.inhibition
                                ? 0
                                : int64_t(plan.groups) * unit_channels * at.mem_pitch * real);
  at.winners = pieces.take(c.inhibition ? plan.warps * 2 * real : 0);
  at.bytes = int(pieces.end);
  plan.fits = pieces.end <= device.shared_bytes;
  return plan;
}

// Returns the seconds of all steps in one launch. plan: of the launch. step, work: what would do a
// step in a launch of its own. neuron: cycles for a neuron (Model).
template <class Layout, class Step>
double resident_seconds(const Cell& c, const Device& device, const ResidentPlanOf<Layout>& plan,
                        const Step& step, const Work& work, double neuron) {
  const Estimate e(device);
  const double images = double(ceil_div(c.N, device.multiprocessors));
  const double outputs = double(plan.units) * (step.mma() ? 32 * 8 * step.tiles : 64 * 16);
  const double products = outputs * work.products / step.outputs() * device.multiprocessors;
  const Shape s(c);
  const double image =
      products / e.rate(step.multiply) + double(s.pixels * s.Cp) * neuron / e.rates.cycles;
  const double one = std::max(images * image, e.moving(work.memory));
  return e.model.resident + double(c.T) * (one + e.model.barrier);
}

// Returns the seconds of all steps, each in a launch of its own.
inline double fused_seconds(const Cell& c, const Device& device, Multiply multiply,
                            const Work& step) {
  const Estimate e(device);
  return double(c.T) * (e.seconds(step, multiply) + e.model.launch);
}

template <class Layout, class Step>
bool resident_pays(const Cell& c, const Device& device, const ResidentPlanOf<Layout>& plan,
                   const Step& step, const Work& work, double neuron) {
  return plan.fits && c.T > 1 && c.N > 0 &&
         resident_seconds(c, device, plan, step, work, neuron) <
             fused_seconds(c, device, step.multiply, work);
}

// Returns whether a resident kernel is considered at all: a single step is one launch anyway.
inline bool may_be_resident(const Cell& c, Algorithm algorithm) {
  return algorithm == Algorithm::resident
             ? c.T > 0
             : c.T > 1 && (algorithm == Algorithm::automatic || algorithm == Algorithm::direct);
}

// ---- the backward pass --------------------------------------------------------------------------

// Its kernel takes at most 32 channels.
struct ResidentBackwardPlan : ResidentPlanOf<ResidentBackwardLayout> {
  int quad_bits = 2, tiles = 1, pieces = 0;  // of the pointwise part, see ResidentBackward

  int held_channels() const { return pieces / tiles * (4 << quad_bits); }
  int channels() const { return resident::power_of_two(held_channels()); }
};

// Plans the backward pass, whether or not that pays. step, packed: how the kernels of one step form
// the gradient of mem, and the weight that they read.
inline ResidentBackwardPlan plan_resident_backward(const Cell& c, const Device& device,
                                                   const DataPlan& step, const PackedPart& packed) {
  ResidentBackwardPlan plan;
  const bool mma = step.mma();
  const int real = bytes_of(real_of(c.dtype));
  const Shape s(c);
  if (c.C > 32 || resident::is_large(c, device.shared_bytes)) return plan;
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
  at.d_gates = resident::shared_image(gates_segment(c, false), s.Ho, plan.tiling.w);
  int64_t table = 0;
  if (mma) {
    resident::as_pixels(at.d_gates, packed.depth, MmaType(step.multiply).element, plan.tiling.w);
    table = 2 * packed.depth.units();
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
  plan.fits = pieces.end <= device.shared_bytes;
  return plan;
}

}  // namespace snnlstm::cuda
