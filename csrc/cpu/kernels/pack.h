// The caller's weight (4C, Cin + C, kernel_h, kernel_w) into the order in which the register tiles
// read it (layout.h), and the weight gradient back.
#pragma once

#include "layout.h"
#include "winograd.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Packing {
  using L = Layout<T, VL>;

  // Place of the weight from input channel ci (x's first, then mem's) to gate channel g at tap (i,
  // j).
  static int64_t source(const L& l, int64_t g, int64_t ci, int64_t tap) {
    return (g * (l.c.Cin + l.c.C) + ci) * l.taps + tap;
  }

  // f(row of K, input channel, tap): the rows of one channel block of the forward weight.
  template <class F>
  static void forward_rows(const L& l, F&& f) {
    for (int64_t tap = 0, k = 0; tap < l.taps; ++tap)
      for (int64_t ci = 0; ci < l.c.Cin; ++ci) f(k++, ci, tap);
    for (int64_t tap = 0, k = l.Kx; tap < l.taps; ++tap)
      for (int64_t ci = 0; ci < l.c.C; ++ci) f(k++, l.c.Cin + ci, tap);
  }

  static void forward(const L& l, const T* weight, T* packed) {
    for (int64_t cb = 0; cb < l.Cb; ++cb)
      forward_rows(l, [&](int64_t k, int64_t ci, int64_t tap) {
        T* out = packed + (cb * l.K() + k) * 4 * VL;
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t lane = 0; lane < VL; ++lane) {
            const int64_t ch = cb * VL + lane;
            *out++ = ch < l.c.C ? weight[source(l, gate * l.c.C + ch, ci, tap)] : T(0);
          }
      });
  }

  static void backward(const L& l, const T* weight, T* packed) {
    backward_half(l, weight, 0, l.c.Cin, l.x_blocks, packed);
    backward_half(l, weight, l.c.Cin, l.c.C, l.Cb, packed + l.x_blocks * l.Kg * VL);
  }

  // Winograd's weights of the input channels [first, first + count), of the gates.
  static void forward_tiles(const L& l, const T* weight, int64_t first, int64_t count, T* packed) {
    for (int64_t cb = 0; cb < l.Cb; ++cb)
      for (int64_t k = 0; k < count; ++k)
        tile_weights(
            l, 4,
            [&](int64_t tap, int64_t v, int64_t lane) {
              const int64_t ch = cb * VL + lane;
              return ch < l.c.C ? weight[source(l, v * l.c.C + ch, first + k, tap)] : T(0);
            },
            packed + (cb * l.points * count + k) * 4 * VL, count * 4 * VL);
  }

  // And of the data gradient, from the gates to those channels; `vectors` vectors of them.
  static void backward_tiles(const L& l, const T* weight, int64_t first, int64_t count,
                             int64_t vectors, T* packed) {
    const int64_t nv = tile_vectors(vectors), gates = 4 * l.Cp;
    for (int64_t block = 0; block < vectors; block += nv)
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
        tile_weights(
            l, nv,
            [&](int64_t tap, int64_t v, int64_t lane) {
              const int64_t k = (block + v) * VL + lane;
              return ch < l.c.C && k < count
                         ? weight[source(l, gate * l.c.C + ch, first + k, l.taps - 1 - tap)]
                         : T(0);
            },
            packed + (block * l.points * gates + g * nv) * VL, gates * nv * VL);
      }
  }

  // A channel block of the weight gradient's sums at Winograd's points, (Cb, points, count, 4, VL),
  // to rows (Cb, taps, count, 4, VL).
  static void gradient_from_tiles(const L& l, const T* sums, int64_t cb, int64_t count, T* rows) {
    using S = Simd<T, VL>;
    const int64_t stride = count * 4 * VL;
    sums += cb * l.grad_points * stride;
    rows += cb * l.taps * stride;
    with_grad_winograd<S>(l.c.kernel_h, int(l.grad_tile), [&](auto form) {
      using W = decltype(form);
      for (int64_t k = 0; k < stride; k += VL)
        W::template outputs<W::kernel>(sums + k, stride, [&](int i, int j, typename S::R v) {
          S::store(rows + (i * W::kernel + j) * stride + k, v);
        });
    });
  }

  // From rows of K, x's (Cb, Kx, 4, VL) and mem's (Cb, Km, 4, VL): channel block cb of the
  // gradient.
  static void weight_gradient(const L& l, const T* x, const T* mem, int64_t cb, T* grad) {
    forward_rows(l, [&](int64_t k, int64_t ci, int64_t tap) {
      const T* in =
          (k < l.Kx ? x + (cb * l.Kx + k) * 4 * VL : mem + (cb * l.Km + k - l.Kx) * 4 * VL);
      for (int64_t gate = 0; gate < 4; ++gate, in += VL)
        for (int64_t lane = 0; lane < VL && cb * VL + lane < l.c.C; ++lane)
          grad[source(l, gate * l.c.C + cb * VL + lane, ci, tap)] = in[lane];
    });
  }

 private:
  // tap_value(tap, vector, lane) transformed, in double precision; point p goes to out + p *
  // stride.
  template <class F>
  static void tile_weights(const L& l, int64_t vectors, F&& tap_value, T* out, int64_t stride) {
    using S = Simd<double, VL>;
    double taps[49 * VL];
    with_winograd<S>(l.c.kernel_h, int(l.tile), [&](auto form) {
      using W = decltype(form);
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t tap = 0; tap < l.taps; ++tap)
          for (int64_t lane = 0; lane < VL; ++lane) taps[tap * VL + lane] = tap_value(tap, v, lane);
        W::template taps<W::kernel>(
            [&](int i, int j) { return S::load(taps + (i * W::kernel + j) * VL); },
            [&](int i, int j, typename S::R value) {
              T* p = out + (i * W::A + j) * stride + v * VL;
              for (int lane = 0; lane < VL; ++lane) p[lane] = T(value[lane]);
            });
      }
    });
  }

  static void backward_half(const L& l, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, T* packed) {
    const int64_t width = tile_vectors(vectors) * VL;
    for (int64_t block = 0; block < vectors * VL; block += width)
      for (int64_t tap = l.taps - 1; tap >= 0; --tap)
        for (int64_t g = 0; g < 4 * l.Cp; ++g) {
          const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
          for (int64_t k = 0; k < width; ++k)
            *packed++ = ch < l.c.C && block + k < count
                            ? weight[source(l, gate * l.c.C + ch, first + block + k, tap)]
                            : T(0);
        }
  }
};

SNNLSTM_END_ISA
