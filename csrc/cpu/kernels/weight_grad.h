// The weight gradient's inner product: a register tile of KB input values by the 4 gates' vectors,
// summed over pixels.
//
//   out[k][4 * VL] += sum over rows, pixels:  in[row, pixel, k] * d_gates[row, pixel][4 * VL]
#pragma once

#include "conv.h"

SNNLSTM_BEGIN_ISA

template <class T>
struct PixelRows {
  const T* in;
  int64_t in_row, in_pixel;
  const T* d_gates;
  int64_t d_row, d_pixel;
  int64_t rows, pixels;
};

template <class S, int KB, class T = typename S::Scalar>
SNNLSTM_INLINE void weight_grad_tile(const PixelRows<T>& p, int64_t in_offset, T* out) {
  using R = typename S::R;
  constexpr int VL = S::lanes;
  R acc[KB][4];
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[k][v] = S::load(out + (k * 4 + v) * VL);
  for (int64_t h = 0; h < p.rows; ++h) {
    const T* a = p.in + in_offset + h * p.in_row;
    const T* d = p.d_gates + h * p.d_row;
    for (int64_t w = 0; w < p.pixels; ++w, a += p.in_pixel, d += p.d_pixel) {
      R x[KB];
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) x[k] = S::splat(a[k]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const R g = S::load(d + v * VL);
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) acc[k][v] += x[k] * g;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) S::store(out + (k * 4 + v) * VL, acc[k][v]);
}

// `len` neighbouring input values, in tiles of nearly equal size.
template <class S, class T = typename S::Scalar>
void weight_grad_run(const PixelRows<T>& p, int64_t in_offset, int64_t len, T* out) {
  constexpr int KB = kMaxPixels<4>;
  for (int64_t done = 0, tiles = (len + KB - 1) / KB; tiles > 0; --tiles) {
    const int64_t n = (len - done + tiles - 1) / tiles;
    T* o = out + done * 4 * S::lanes;
    switch (n) {
#define SNNLSTM_TILE(n)                                                          \
  case n:                                                                        \
    if constexpr (n <= KB) weight_grad_tile<S, n>(p, in_offset + done, o);       \
    break;
      SNNLSTM_TILE(1)
      SNNLSTM_TILE(2)
      SNNLSTM_TILE(3)
      SNNLSTM_TILE(4)
      SNNLSTM_TILE(5)
      SNNLSTM_TILE(6)
#undef SNNLSTM_TILE
    }
    done += n;
  }
}

SNNLSTM_END_ISA
