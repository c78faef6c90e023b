// Which way each convolution is summed: a cost model in multiply-adds of one vector, per pixel and
// channel block, with what the transforms cost beside them. benchmarks/NOTES.md has the measurements.
#include "api.h"

namespace snnlstm::cpu {
namespace {

struct Tiling {
  int tile, inputs;  // outputs and inputs of a tile, a side
};

double direct_cost(const Cell& c, double channels) { return c.kernel_h * c.kernel_w * channels * 4; }

// The products, the transform of the outputs (of four gates) and the transform of the inputs, which
// all channel blocks share. Tiles that stick out of the image count whole.
double tile_cost(const Cell& c, Tiling t, double channels) {
  const double points = t.inputs * t.inputs;
  const auto up = [&](int64_t n) { return double((n + t.tile - 1) / t.tile * t.tile) / double(n); };
  const double per_tile = points * (4 * channels * 1.15 + 4 * 4) + points * 5 * channels / double(c.C);
  return per_tile / (t.tile * t.tile) * up(c.Ho()) * up(c.Wo());
}

}  // namespace

Cell choose(const Cell& cell, Algorithm algorithm, double density) {
  Cell c = cell;
  c.tile = 0;
  c.x_way = Way::direct;
  (void)density;
  if (algorithm == Algorithm::direct || !has_tiles(c)) return c;
  const bool x_fits = c.stride_h == 1 && c.stride_w == 1;
  const bool forced = algorithm == Algorithm::winograd;
  double best = direct_cost(c, double(c.C));
  for (const Tiling t : {Tiling{4, 6}, Tiling{2, 4}}) {
    if (c.kernel_h == 5 && t.tile != 2) continue;
    const Tiling used = c.kernel_h == 5 ? Tiling{2, 6} : t;
    const double cost = tile_cost(c, used, double(c.C));
    if (cost < best || (forced && c.tile == 0)) best = cost, c.tile = used.tile;
  }
  if (c.tile > 0 && x_fits) {
    const Tiling used = {c.tile, c.tile + c.kernel_h - 1};
    // beside the recurrent half the outputs are transformed anyway
    const double cost = tile_cost(c, used, double(c.Cin)) - 16 * used.inputs * used.inputs / double(c.tile * c.tile);
    if (forced || cost < direct_cost(c, double(c.Cin))) c.x_way = Way::winograd;
  }
  return c;
}

}  // namespace snnlstm::cpu
