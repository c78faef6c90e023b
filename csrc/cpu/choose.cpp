// Which way each convolution is summed: a cost model in multiply-adds of one vector, per pixel and
// channel block, with what the transforms cost beside them. benchmarks/NOTES.md has the
// measurements.
#include "api.h"

namespace snnlstm::cpu {
namespace {

constexpr int kMostInputs = 8;  // of a tile, a side

struct Tiling {
  int tile, inputs;  // outputs and inputs of a tile, a side
};

double direct_cost(const Cell& c, double channels) {
  return c.kernel_h * c.kernel_w * channels * 4;
}

// The products, the transform of the outputs (of four gates) and the transform of the inputs, which
// all channel blocks share. Tiles that stick out of the image count whole. In the backward pass all
// pixels of a call share the transforms of the filters, which have changed since the last call, and
// of their gradient.
double tile_cost(const Cell& c, Tiling t, double channels, bool backward) {
  const double points = t.inputs * t.inputs;
  const auto up = [&](int64_t n) { return double((n + t.tile - 1) / t.tile * t.tile) / double(n); };
  const double per_tile =
      points * (4 * channels * 1.15 + 4 * 4) + points * 5 * channels / double(c.C);
  const double of_filters = backward ? 20 * points * 4 * channels : 0;  // measured
  return per_tile / (t.tile * t.tile) * up(c.Ho()) * up(c.Wo()) +
         of_filters / double(c.T * c.N * c.Ho() * c.Wo());
}

// The cell without the taps that only ever meet the border: those that are further from the middle
// than one end of the image from the other. What is left is never wider than twice the image.
Cell within_image(const Cell& cell) {
  Cell c = cell;
  const auto trim = [](int64_t size, int& kernel, int& dilation, int& outer) {
    const int64_t reach = size > 1 ? (size - 1) / dilation : 0, most = (kernel - 1) / 2;
    outer = int(most > reach ? most - reach : 0);
    kernel -= 2 * outer;
    if (kernel == 1) dilation = 1;
  };
  trim(c.H, c.kernel_h, c.dilation_h, c.outer_h);
  trim(c.W, c.kernel_w, c.dilation_w, c.outer_w);
  return c;
}

}  // namespace

Cell choose(const Cell& cell, Algorithm algorithm, double density, int most_inputs, bool backward) {
  Cell c = within_image(cell);
  c.tile = 0;
  c.x_way = Way::direct;
  if (algorithm == Algorithm::direct) return c;
  const bool forced = algorithm == Algorithm::winograd;
  if (has_tiles(c)) {
    double best = direct_cost(c, double(c.C));
    for (const int tile : {4, 2}) {
      const Tiling t = {tile, tile + c.kernel_h - 1};
      if (t.inputs > (forced ? kMostInputs : most_inputs)) continue;
      const double cost = tile_cost(c, t, double(c.C), backward);
      if (cost < best || (forced && c.tile == 0)) best = cost, c.tile = tile;
    }
  }
  double best = direct_cost(c, double(c.Cin));
  const int tile = backward ? c.grad_tile() : c.tile;  // backward's x_way: of the weight gradient
  if (tile > 0 && c.stride_h == 1 && c.stride_w == 1) {
    const Tiling t = {tile, tile + c.kernel_h - 1};
    // beside the recurrent half the outputs are transformed anyway
    const double cost = tile_cost(c, t, double(c.Cin), backward) - tile_cost(c, t, 0, backward);
    if (forced || cost < best) best = cost, c.x_way = Way::winograd;
  }
  if (!forced && density < 1 && sparse_cost(c, density) * direct_cost(c, double(c.Cin)) < best)
    c.x_way = Way::sparse;
  return c;
}

}  // namespace snnlstm::cpu
