// The caller's weight (4C, Cin + C, kernel_h, kernel_w) into the order in which the register tiles
// read it (layout.h), and the weight gradient back.
#pragma once

#include "layout.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Packing {
  using L = Layout<T, VL>;

  // Place of the weight from input channel ci (x's first, then mem's) to gate channel g at tap (i, j).
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

  // partial: `splits` times (Cb, K, 4, VL), summed in order. Writes the gradient of channel block cb.
  static void weight_gradient(const L& l, const T* partial, int64_t splits, int64_t cb, T* grad) {
    const int64_t size = l.Cb * l.K() * 4 * VL;
    forward_rows(l, [&](int64_t k, int64_t ci, int64_t tap) {
      const T* in = partial + (cb * l.K() + k) * 4 * VL;
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t lane = 0; lane < VL; ++lane, ++in) {
          const int64_t ch = cb * VL + lane;
          if (ch >= l.c.C) continue;
          T sum = in[0];
          for (int64_t s = 1; s < splits; ++s) sum += in[s * size];
          grad[source(l, gate * l.c.C + ch, ci, tap)] = sum;
        }
    });
  }

 private:
  static void backward_half(const L& l, const T* weight, int64_t first, int64_t count, int64_t vectors,
                            T* packed) {
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
