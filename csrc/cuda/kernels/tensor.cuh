// Reads and writes images, the caller's and our own, in patches. A patch, 2 neighbouring pixels and
// CH neighbouring channels, is what one thread holds of a tile.
//
// Lane l of a warp holds pixels 2g, 2g + 1 (g = l % 8 or l / 4) and channels q * CH ... (q the
// other part of l). So a warp's access covers whole 32-byte sectors in both usual layouts:
//   channels last   for a pixel CH channels in one vector, neighbouring lanes side by side
//   contiguous      for a channel 2 pixels in one vector, neighbouring lanes side by side
// Other layouts (odd sizes, odd strides, unaligned pointers) are accessed element by element.
#pragma once

#include "math.cuh"

namespace snnlstm::cuda {

// The two neighbouring pixels of a patch. valid: whether each lies in the image.
struct PixelPair {
  int t, n;
  int y[2], x[2];
  bool valid[2];
};

// Returns the image of one time step and sample.
SNNLSTM_DEVICE void* image_of(const Tensor& a, int t, int n) {
  return static_cast<char*>(a.data) + (t * a.t + n * a.n) * bytes_of(a.type);
}
SNNLSTM_DEVICE int offset(const Tensor& a, int c, int y, int x) {
  return c * a.c + y * (fault(Fault::wrong_row_stride) ? a.w : a.h) + x * a.w;
}

// Calls move(p, values) for the CH channels of each pixel, or for both pixels of each channel, or
// for each element, as the layout allows. The values come from v[pixel][channel] and go back there.
template <class Known, class R, int CH, class Move>
SNNLSTM_DEVICE void move_patch(const Tensor& a, const PixelPair& at, int c0, int plane,
                               R (&v)[2][CH], Move&& move) {
  constexpr bool channels = Known::kNarrowest == Access::channels;
  if (c0 >= a.channels) return;
  with_stored<R, Known>(a.type, [&](auto of) {
    auto* p = static_cast<decltype(of)*>(image_of(a, at.t, at.n));
    const auto place = [&](int px) {  // only our images have planes
      return channels ? plane * a.plane + c0 + offset(a, 0, at.y[px], at.x[px])
                      : offset(a, c0, at.y[px], at.x[px]);
    };
    decltype(p) pixel[2] = {p + place(0), p + place(1)};
    if (channels || a.access == Access::channels) {
      unrolled<2>([&](int px) {
        if (at.valid[px]) move(pixel[px], v[px]);
      });
    } else if (Known::kNarrowest == Access::rows || a.access == Access::rows) {
      unrolled<CH>([&](int ch) {
        if (!at.valid[0] || c0 + ch >= a.channels) return;
        R pair[2] = {v[0][ch], v[1][ch]};
        move(pixel[0] + ch * a.c, pair);
        v[0][ch] = pair[0];
        v[1][ch] = pair[1];
      });
    } else {
      unrolled<CH, 2>([&](int ch, int px) {
        if (!at.valid[px] || c0 + ch >= a.channels) return;
        R one[1] = {v[px][ch]};
        move(pixel[px] + ch * a.c, one);
        v[px][ch] = one[0];
      });
    }
  });
}

// Loads v[pixel][channel] of channels c0, c0 + 1, ...; values outside the tensor are 0.
template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void load_patch(const Tensor& a, const PixelPair& at, int c0, R (&v)[2][CH],
                               int plane = 0) {
  clear<2 * CH>(&v[0][0]);
  move_patch<Known>(a, at, c0, plane, v,
                    [](const auto* p, auto& values) { load_vector(p, values); });
}

template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void store_patch(const Tensor& a, const PixelPair& at, int c0, const R (&v)[2][CH],
                                int plane = 0) {
  R copy[2][CH];
  unrolled<2, CH>([&](int px, int ch) { copy[px][ch] = v[px][ch]; });
  move_patch<Known>(a, at, c0, plane, copy, [](auto* p, auto& values) { store_vector(p, values); });
}

}  // namespace snnlstm::cuda
