// The weight gradient's inner product: a register tile of KB input values by the 4 gates' lanes,
// summed over pixels.
//
//   out[k][v] += sum over images, rows, pixels:  in[row, pixel, k] * d_gates[row, pixel][v]
//
// for each v < 4 * VL.
#pragma once

#include "tiles.h"

SNNLSTM_BEGIN_ISA

template <class T>
struct PixelRows {
  const T* in;
  int64_t in_row, in_pixel;
  const T* d_gates;
  int64_t d_row, d_pixel;
  int64_t rows, pixels;
  int64_t images = 1, in_image = 0, d_image = 0;
};

template <class S, int NV, int KB, class T = typename S::Scalar>
SNNLSTM_INLINE void weight_grad_tile(const PixelRows<T>& p, int64_t in_offset, T* out) {
  using R = typename S::R;
  constexpr int VL = S::lanes;
  // Too few sums would wait for each other, so neighbouring pixels have sums of their own.
  constexpr int side = KB * NV <= 2 ? 4 : KB * NV <= 4 ? 2 : 1;
  R acc[side][KB][NV];
#pragma GCC unroll 4
  for (int s = 0; s < side; ++s)
#pragma GCC unroll 8
    for (int k = 0; k < KB; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[s][k][v] = R{};  // rounds less than sums that begin with `out`
  for (int64_t row = 0; row < p.images * p.rows; ++row) {
    const int64_t n = p.images > 1 ? row / p.rows : 0;
    const int64_t h = row - n * p.rows;
    const T* a = p.in + in_offset + n * p.in_image + h * p.in_row;
    const T* d = p.d_gates + n * p.d_image + h * p.d_row;
    const auto pixel = [&](R(&sums)[KB][NV]) __attribute__((always_inline)) {
      R x[KB];
#pragma GCC unroll 8
      for (int k = 0; k < KB; ++k) x[k] = S::splat(a[k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const R g = S::load(d + v * VL);
#pragma GCC unroll 8
        for (int k = 0; k < KB; ++k) sums[k][v] += x[k] * g;
      }
      a += p.in_pixel;
      d += p.d_pixel;
    };
    int64_t w = 0;
    for (; w + side <= p.pixels; w += side)
#pragma GCC unroll 4
      for (int s = 0; s < side; ++s) pixel(acc[s]);
    for (; w < p.pixels; ++w) pixel(acc[0]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < KB; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* p = out + (k * NV + v) * VL;
      R sum = acc[0][k][v];
#pragma GCC unroll 4
      for (int s = 1; s < side; ++s) sum += acc[s][k][v];
      S::store(p, S::load(p) + sum);
    }
}

// Multiplies `len` neighbouring input values, in tiles of nearly equal size, by NV vectors of d
// gates.
template <class S, int NV = 4, class T = typename S::Scalar>
void weight_grad_run(const PixelRows<T>& p, int64_t in_offset, int64_t len, T* out) {
  using V = Merged<S, NV>;
  constexpr int KB = kMaxPixels<V::count>;
  for (int64_t done = 0, tiles = (len + KB - 1) / KB; tiles > 0; --tiles) {
    const int64_t n = (len - done + tiles - 1) / tiles;
    T* o = out + done * NV * S::lanes;
    with_count<KB>(n, [&](auto values) __attribute__((always_inline)) {
      weight_grad_tile<typename V::Vector, V::count, decltype(values)::value>(p, in_offset + done,
                                                                              o);
    });
    done += n;
  }
}

// Computes the weight gradient of one block of tiles by Winograd: transforms the gates' gradient of
// one channel block, and adds its products with the transformed inputs (tiles.h), over all tiles,
// to `len` rows of (4, VL) of the sums (points, parts, sums_stride). p.in is not used.
template <class S, class V, class T = typename S::Scalar>
void weight_grad_tiles(const PlaneTransform<V>& taps, const PixelRows<T>& p, const TileBlock<T>& b,
                       const T* values, int64_t len, T* d_values, T* sums, int64_t sums_stride) {
  constexpr int VL = S::lanes;
  constexpr int kGates = 4 * VL;
  const Plane from{b.dilation_h * p.d_row, b.dilation_w * p.d_pixel, V::lanes};
  const Plane to{b.winograd.w.inputs() * b.products_stride, b.products_stride, V::lanes};
  for (int64_t k = 0; k < b.images * b.count(); ++k, d_values += kGates) {
    const int64_t image = k / b.count(), tile = k % b.count();
    const int64_t h0 = b.row(tile / b.columns), w0 = b.column(tile % b.columns);
    taps.run(p.d_gates + image * p.d_image + h0 * p.d_row + w0 * p.d_pixel, from, d_values, to,
             kGates / V::lanes);
  }
  d_values -= b.images * b.count() * kGates;
  const TileRows rows(b);
  for (int point = 0; point < b.winograd.points(); ++point)
    for (int part = 0; part < b.winograd.parts(); ++part, sums += sums_stride) {
      const T* in = values + point * b.values_stride +
                    b.part(part / b.winograd.w.parts, part % b.winograd.w.parts);
      PixelRows<T> tiles;
      tiles.in = in;
      tiles.in_image = rows.image;
      tiles.in_row = rows.row;
      tiles.d_gates = d_values + point * b.products_stride;
      tiles.in_pixel = b.channels;
      tiles.d_pixel = kGates;
      tiles.d_row = rows.columns * kGates;
      tiles.d_image = rows.rows * tiles.d_row;
      tiles.images = rows.images;
      tiles.rows = rows.rows;
      tiles.pixels = rows.columns;
      weight_grad_run<S>(tiles, 0, len, sums);
    }
}

SNNLSTM_END_ISA
