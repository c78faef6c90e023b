// Decides how each convolution is summed. The cost model counts multiply-adds of one vector, per
// pixel and channel block, and adds the cost of the transforms. benchmarks/NOTES.md has the
// measurements.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "api.h"
#include "tiling.h"

namespace snnlstm::cpu {
namespace {

constexpr int kMaxTileInputs = 8;  // along an axis

// Returns how many tiles or pixels share one read of the weights: those of one image or of several
// small ones, and at most `wanted`.
double at_once(const Cell& c, double in_image, double wanted) {
  return std::min(std::max(in_image, in_image * std::floor(double(c.N) / 2)), wanted);
}

// Returns the cost of packing `values` values of each filter and, in the backward pass, of clearing
// and writing their gradient. All pixels of a call share that cost, because in training the filters
// change from call to call. The forward pass assumes two steps for any T, so that a sequence gives
// the same results when it is cut into pieces. The backward pass of a step call assumes a loop of
// 16 steps that packs the filters once; each call writes a gradient of its own.
double filter_cost(const Cell& c, double values, double channels, bool backward) {
  const double sharing = !backward ? 2 : c.T == 1 ? 16 : double(c.T);
  const double per_pixel = values * 4 * channels / (double(c.N) * double(c.Ho() * c.Wo()));
  return (70 / sharing + (backward ? 90 / double(c.T) : 0)) * per_pixel;  // measured
}

// Returns the share of the taps that meet a pixel, over all outputs along an axis of n pixels. A
// tap at a distance of d pixels meets a pixel from n - d outputs.
double met_share(int kernel, int dilation, int64_t n) {
  int64_t met = 0;
  for (int64_t tap = 0; tap < kernel; ++tap) {
    const int64_t away = std::abs(tap * dilation - int64_t(dilation) * (kernel - 1) / 2);
    met += away < n ? n - away : 0;
  }
  return n > 0 ? double(met) / (double(n) * kernel) : 1;
}

// Returns the cost of direct convolution or, if `lists` is not negative, of sums over lists of
// nonzeros, which take that share of the time of all taps. Direct convolution goes through the
// pixels row by row, and skips the rows of taps that meet only the border. Its cost per pixel is
// twice as high in rows of one pixel as in long rows.
double direct_cost(const Cell& c, double channels, bool backward, double lists = -1) {
  const double taps = c.kernel_h * c.kernel_w;
  const double rows = met_share(c.kernel_h, c.dilation_h, c.Ho()) * (1 + 1. / double(c.Wo()));
  const double share = lists < 0 ? rows : lists;
  const double fetching = 1 / at_once(c, double(c.Ho() * c.Wo()), 64);
  return taps * channels * 4 * share * (1 + fetching) + filter_cost(c, taps, channels, backward);
}

// Adds up the products, the transform of the outputs (of four gates) and the transform of the
// inputs, which all channel blocks share. Tiles that extend beyond the image count whole.
double tile_cost(const Cell& c, const WinogradTile& t, double channels, bool backward) {
  const double points = t.points();
  const double products = points * t.parts() * 4 * channels;
  const auto up = [](const Axis& a, int dilation, int64_t n) {
    const int64_t unit = a.tile * (a.tile > 1 ? dilation : 1);
    return double((n + unit - 1) / unit * unit) / double(n);
  };
  const double tiles = up(t.h, c.dilation_h, c.Ho()) * up(t.w, c.dilation_w, c.Wo()) *
                       double(c.Ho() * c.Wo()) / (t.h.tile * t.w.tile);
  const double fetching = 1 / at_once(c, tiles, 32);
  const double per_tile =
      products * (1.15 + fetching) + points * 3 * 4 * 4 + points * 2.5 * channels / double(c.C);
  return per_tile * tiles / double(c.Ho() * c.Wo()) +
         filter_cost(c, points * t.parts(), channels, backward);
}

}  // namespace

// In the backward pass x_algorithm is the weight gradient's.
Cell choose(const Cell& cell, CpuAlgorithm algorithm, double density, int max_tile_inputs,
            bool backward) {
  Cell c = within_image(cell);
  if (algorithm == CpuAlgorithm::direct) return c;
  const bool forced = algorithm == CpuAlgorithm::winograd;
  double best = direct_cost(c, double(c.C), backward);
  if (kernels().has_tiles(c)) {
    for (const int h : {4, 3, 2, 1})
      for (const int w : {4, 3, 2, 1}) {
        if (!has_tile(c.kernel_h, h) || !has_tile(c.kernel_w, w) || h * w == 1) continue;
        Cell tiled = c;
        tiled.tile_h = h, tiled.tile_w = w;
        const WinogradTile t = tiling(tiled);
        const int inputs = std::max(t.h.inputs(), t.w.inputs());
        if (inputs > (forced ? kMaxTileInputs : max_tile_inputs)) continue;
        double cost = tile_cost(c, t, double(c.C), backward);
        if (backward)  // half of the work is the weight gradient's, which has tiles of its own
          cost = (cost + tile_cost(c, grad_tiling(tiled), double(c.C), backward)) / 2;
        if (cost < best || (forced && !c.tiled())) {
          best = cost;
          c.tile_h = h;
          c.tile_w = w;
        }
      }
  }
  best = direct_cost(c, double(c.Cin), backward);
  if (c.tiled() && c.stride_h == 1 && c.stride_w == 1) {
    // The recurrent half transforms its outputs anyway, so x pays only for its inputs and products.
    const WinogradTile t = backward ? grad_tiling(c) : tiling(c);
    const double cost = tile_cost(c, t, double(c.Cin), backward) - tile_cost(c, t, 0, backward);
    if (forced || cost < best) {
      best = cost;
      c.x_algorithm = CpuAlgorithm::winograd;
    }
  }
  if (!backward && !forced && density < 1) {
    const double cost = direct_cost(c, double(c.Cin), backward, kernels().sparse_cost(c, density));
    if (cost < best) c.x_algorithm = CpuAlgorithm::sparse;
  }
  return c;
}

// Tiles with more than 6 inputs along an axis would round too much. Fine tiles are F(4,3) or F(2,5)
// along one axis alone.
std::pair<int, int> convolution_tile(const Cell& c, bool fine) {
  const bool too_coarse = fine && std::min(c.kernel_h, c.kernel_w) == 5;
  if (!kernels().has_tiles(c) || c.kernel_h * c.kernel_w == 1 || too_coarse) return {0, 0};
  const auto side = [](int kernel, bool fine) {
    return kernel == 1 ? 1 : kernel == 3 ? (fine ? 2 : 4) : kernel == 5 ? 2 : 3;
  };
  return {side(c.kernel_h, fine && c.kernel_w > 3), side(c.kernel_w, fine && c.kernel_h > 1)};
}

// torch's function multiplies nearly as fast as the processor can, if channels come last, so it
// takes a little less time than direct sums. The factors are those that no layer of 30 exceeds
// much, on Zen 5 with AVX-512; with AVX2 torch takes longer. Values that are moved count as
// multiply-adds.
double convolution_cost(const Cell& c, bool weight, double density) {
  const double channels = double(c.Cin) * double(c.Cout), taps = c.kernel_h * c.kernel_w;
  const double moved = 30 * double(c.Cin + c.Cout) / (channels * taps);
  if (!c.tiled()) return 1.25 * kernels().sparse_cost(c, density) + moved;
  const WinogradTile t = weight ? grad_tiling(c) : tiling(c);
  const auto padded = [](const Axis& a, int64_t n) {
    return double((n + a.tile - 1) / a.tile * a.tile) / double(n);
  };
  const double products = double(t.points() * t.parts()) / (t.h.tile * t.w.tile * taps);
  return 1.3 * products * padded(t.h, c.Ho()) * padded(t.w, c.Wo()) + moved;
}

std::string algorithm_name(const Cell& c) {
  const bool square = c.tile_h == c.tile_w;
  const std::string tile =
      std::to_string(c.tile_h) + (square ? "" : "x" + std::to_string(c.tile_w));
  return (c.tiled() ? "winograd" + tile : "direct") +
         (c.x_algorithm == CpuAlgorithm::sparse ? "-sparse" : "");
}

std::string form_name(const Cell& c, Form form) {
  const std::string kernel = std::to_string(c.kernel_h) + "x" + std::to_string(c.kernel_w);
  if (!c.tiled() || (form == Form::forward && c.keeps_equal())) return kernel;
  if (form == Form::forward || form == Form::backward) return kernel + ":x";
  return kernel + ":" + std::to_string(c.tile_h) + "x" + std::to_string(c.tile_w);
}

}  // namespace snnlstm::cpu
