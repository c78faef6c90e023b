// Winograd's tiles along the two axes of an image, which are independent of each other.
#pragma once

#include <algorithm>

#include "../args.h"

namespace snnlstm::cpu {

// Tiles of `tile` outputs along an axis. The kernel's taps are cut into `parts` parts of `part`
// taps each, and zeros fill up the last part. If there are several parts, each is as long as a
// tile, so that part k reads the inputs of the tile k tiles further on.
struct Axis {
  int tile = 1, part = 1, parts = 1;

  int inputs() const { return tile + part - 1; }
  int taps() const { return part * parts; }
};

struct WinogradTile {
  Axis h, w;

  int points() const { return h.inputs() * w.inputs(); }  // products for a tile, part and channel
  int parts() const { return h.parts * w.parts; }
};

// The tiles are F(2,3), F(3,3), F(4,3), F(2,5), F(4,5) and F(4,4). One tap needs no transform.
inline Axis axis(int kernel, int tile) {
  if (kernel == 1) return {};
  if (tile == 3) return {3, 3, (kernel + 2) / 3};
  return tile == 2 || kernel <= 5 ? Axis{tile, kernel, 1} : Axis{tile, 4, (kernel + 3) / 4};
}
inline bool has_tile(int kernel, int tile) {
  return kernel == 1 ? tile == 1 : tile == 3 || tile == 4 || (tile == 2 && kernel <= 5);
}

// Returns the tiles of the recurrent convolution, and of the input convolution if it is tiled.
inline WinogradTile tiling(const Cell& c) {
  return {axis(c.kernel_h, c.tile_h), axis(c.kernel_w, c.tile_w)};
}

// Returns the tiles of the weight gradient. Tiles with more than 6 inputs would round too much.
inline WinogradTile grad_tiling(const Cell& c) {
  const auto smaller = [](int kernel, int tile) {
    const Axis a = axis(kernel, tile);
    return a.inputs() <= 6 ? a : axis(kernel, kernel == 5 ? 2 : 3);
  };
  return {smaller(c.kernel_h, c.tile_h), smaller(c.kernel_w, c.tile_w)};
}

}  // namespace snnlstm::cpu
