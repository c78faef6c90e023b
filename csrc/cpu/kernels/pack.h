// The caller's weight (4C, Cin + C, kernel_h, kernel_w) into the order in which the register tiles
// read it (layout.h).
#pragma once

#include "schedule.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Packing {
  using L = Layout<T, VL>;

  // Place of the weight from input channel ci (x's first, then mem's) to gate channel g, at a
  // place among its taps.
  static int64_t source(const L& l, int64_t g, int64_t ci, int64_t place) {
    return (g * (l.c.Cin + l.c.C) + ci) * l.all_taps() + place;
  }

  // Row of K of input channel ci at a tap, in the forward weight.
  static int64_t row(const L& l, int64_t ci, int64_t tap) {
    return ci < l.c.Cin ? tap * l.c.Cin + ci : l.Kx + tap * l.c.C + ci - l.c.Cin;
  }

  static void forward(const L& l, int threads, const T* weight, T* packed) {
    const int64_t channels = l.c.Cin + l.c.C;
    parallel_for(threads, l.Cb * channels, l.taps * 4 * VL, [&](int64_t task) {
      const int64_t cb = task / channels, ci = task % channels;
      for (int64_t tap = 0; tap < l.taps; ++tap) {
        const int64_t place = l.place(tap);
        T* out = packed + (cb * l.K() + row(l, ci, tap)) * 4 * VL;
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t lane = 0; lane < VL; ++lane) {
            const int64_t ch = cb * VL + lane;
            *out++ = ch < l.c.C ? weight[source(l, gate * l.c.C + ch, ci, place)] : T(0);
          }
      }
    });
  }

  static void backward(const L& l, int threads, const T* weight, T* packed) {
    backward_half(l, threads, weight, 0, l.c.Cin, l.x_blocks, packed);
    backward_half(l, threads, weight, l.c.Cin, l.c.C, l.Cb, packed + l.x_blocks * l.Kg * VL);
  }

  // Winograd's weights of the input channels [first, first + count), of the gates.
  static void forward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            T* packed) {
    parallel_for(threads, l.Cb * count, l.tile_weights() * 4 * VL, [&](int64_t task) {
      const int64_t cb = task / count, k = task % count;
      tile_weights(
          l, 4, count * 4 * VL,
          [&](int64_t tap, int64_t v, int64_t lane) {
            const int64_t ch = cb * VL + lane;
            return ch < l.c.C ? weight[source(l, v * l.c.C + ch, first + k, l.place(tap))] : T(0);
          },
          packed + (cb * l.tile_weights() * count + k) * 4 * VL);
    });
  }

  // And of the data gradient, from the gates to those channels; `vectors` vectors of them.
  static void backward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                             int64_t vectors, T* packed) {
    const int64_t nv = tile_vectors(vectors), gates = 4 * l.Cp;
    parallel_for(threads, vectors / nv * gates, l.tile_weights() * nv * VL, [&](int64_t task) {
      const int64_t block = task / gates * nv, g = task % gates;
      const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
      tile_weights(
          l, nv, gates * nv * VL,
          [&](int64_t tap, int64_t v, int64_t lane) {
            const int64_t k = (block + v) * VL + lane;
            return ch < l.c.C && k < count
                       ? weight[source(l, gate * l.c.C + ch, first + k, l.place(l.taps - 1 - tap))]
                       : T(0);
          },
          packed + (block * l.tile_weights() * gates + g * nv) * VL);
    });
  }

 private:
  // tap_value(tap, vector, lane) transformed, in double precision: point p of part k goes to
  // out + (p * parts + k) * stride.
  template <class F>
  static void tile_weights(const L& l, int64_t vectors, int64_t stride, F&& tap_value, T* out) {
    using S = Simd<double, VL>;
    const Tiling& t = l.form;
    const auto transform = PlaneTransform<S>::taps(t, t.h.part, t.w.part);
    const int64_t column = t.w.part * VL, columns = t.w.inputs() * VL;
    alignas(64) double taps[5 * 5 * VL], values[8 * 8 * VL];
    for (int64_t part = 0; part < t.parts(); ++part)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t top = part / t.w.parts * t.h.part, left = part % t.w.parts * t.w.part;
        for (int64_t i = 0; i < t.h.part; ++i)
          for (int64_t j = 0; j < t.w.part; ++j) {
            const bool inside = top + i < l.c.kernel_h && left + j < l.c.kernel_w;
            const int64_t tap = (top + i) * l.c.kernel_w + left + j;
            for (int64_t lane = 0; lane < VL; ++lane)
              taps[i * column + j * VL + lane] = inside ? double(tap_value(tap, v, lane)) : 0.0;
          }
        transform.run(taps, {column, VL, 0}, values, {columns, VL, 0}, 1);
        T* to = out + part * stride + v * VL;
        for (int64_t point = 0; point < t.points(); ++point)
          for (int64_t lane = 0; lane < VL; ++lane)
            to[point * t.parts() * stride + lane] = T(values[point * VL + lane]);
      }
  }

  static void backward_half(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, T* packed) {
    const int64_t nv = tile_vectors(vectors), gates = 4 * l.Cp;
    parallel_for(threads, vectors / nv * gates, l.taps * nv * VL, [&](int64_t task) {
      const int64_t block = task / gates * nv, g = task % gates;
      const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
      for (int64_t tap = 0; tap < l.taps; ++tap) {
        const int64_t place = l.place(l.taps - 1 - tap);
        T* out = packed + (block * l.taps * gates + (tap * gates + g) * nv) * VL;
        for (int64_t k = block * VL; k < (block + nv) * VL; ++k)
          *out++ = ch < l.c.C && k < count ? weight[source(l, gate * l.c.C + ch, first + k, place)]
                                           : T(0);
      }
    });
  }
};

SNNLSTM_END_ISA
