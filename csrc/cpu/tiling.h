// Winograd's tiles along the two axes of an image. The axes are independent of each other.
#pragma once

#include "../args.h"

namespace snnlstm::cpu {

// Tiles of `tile` outputs. The kernel's taps are cut into `parts` parts of `part` taps each, and
// zeros fill up the last part. If there are several parts, each is as long as a tile, so that part
// k sees the inputs of the tile that lies k tiles further.
struct Axis {
  int tile = 1, part = 1, parts = 1;

  int inputs() const { return tile + part - 1; }
  int taps() const { return part * parts; }
};

struct Tiling {
  Axis h, w;

  int points() const { return h.inputs() * w.inputs(); }  // products of a tile, part and channel
  int parts() const { return h.parts * w.parts; }
};

// The forms are F(2,3), F(3,3), F(4,3), F(2,5), F(4,5) and F(4,4). One tap needs no transform.
inline Axis axis(int kernel, int tile) {
  if (kernel == 1) return {};
  if (tile == 3) return {3, 3, (kernel + 2) / 3};
  return tile == 2 || kernel <= 5 ? Axis{tile, kernel, 1} : Axis{tile, 4, (kernel + 3) / 4};
}
inline bool has_form(int kernel, int tile) {
  return kernel == 1 ? tile == 1 : tile == 3 || tile == 4 || (tile == 2 && kernel <= 5);
}

// Returns the tiles of the recurrent convolution, which the input's has too if it is tiled.
inline Tiling tiling(const Cell& c) {
  return {axis(c.kernel_h, c.tile_h), axis(c.kernel_w, c.tile_w)};
}

// Returns the tiles of the weight gradient. Tiles with more than 6 inputs would round too much.
inline Tiling grad_tiling(const Cell& c) {
  const auto smaller = [](int kernel, int tile) {
    const Axis a = axis(kernel, tile);
    return a.inputs() <= 6 ? a : axis(kernel, kernel == 5 ? 2 : 3);
  };
  return {smaller(c.kernel_h, c.tile_h), smaller(c.kernel_w, c.tile_w)};
}

// The taps of a kernel along one axis that meet a pixel, and not only the border.
struct MetTaps {
  int64_t first, last;  // the last one is not among them

  // Tap 0 looks at place `begin` of an axis of n pixels, which may lie in the border.
  MetTaps(int64_t begin, int kernel, int dilation, int64_t n) {
    const int64_t before = begin < 0 ? (dilation - 1 - begin) / dilation : 0;
    const int64_t until = n > begin ? (n - begin + dilation - 1) / dilation : 0;
    last = until < kernel ? until : kernel;
    first = before < last ? before : last;
  }
};

// Returns the share of the taps that meet a pixel, of all outputs along an axis of n pixels.
inline double met_share(int kernel, int dilation, int64_t n) {
  int64_t met = 0;
  for (int64_t k = 0; k < n; ++k) {
    const MetTaps taps(k - int64_t(dilation) * (kernel - 1) / 2, kernel, dilation, n);
    met += taps.last - taps.first;
  }
  return n > 0 ? double(met) / (double(n) * kernel) : 1;
}

// Direct convolution takes one line of pixels after the other, and leaves out the taps that meet
// only the border beside the line. This returns what that costs, of all taps: a line of one pixel
// costs twice as much as a longer one.
inline double lines_cost(const Cell& c, bool columns) {
  const int64_t H = c.Ho(), W = c.Wo();
  return columns ? met_share(c.kernel_w, c.dilation_w, W) * (1 + 1. / double(H > 1 ? H : 1))
                 : met_share(c.kernel_h, c.dilation_h, H) * (1 + 1. / double(W > 1 ? W : 1));
}
inline bool along_columns(const Cell& c) {
  return lines_cost(c, true) < 0.9 * lines_cost(c, false);
}

}  // namespace snnlstm::cpu
