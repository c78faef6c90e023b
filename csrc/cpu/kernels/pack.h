// Packs the caller's weight (4C, Cin + C, kernel_h, kernel_w) in the order in which the register
// tiles read it (layout.h).
#pragma once

#include "schedule.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Packing {
  using L = Layout<T, VL>;

  // Returns the place of the weight from input channel ci (x's first, then mem's) to gate channel
  // g, at a place among its taps.
  static int64_t source(const L& l, int64_t g, int64_t ci, int64_t place) {
    return (g * (l.c.Cin + l.c.C) + ci) * l.all_taps() + place;
  }

  // Returns the row of K of input channel ci at a tap, in the forward weight.
  static int64_t row(const L& l, int64_t ci, int64_t tap) {
    return ci < l.c.Cin ? tap * l.c.Cin + ci : l.Kx + tap * l.c.C + ci - l.c.Cin;
  }

  static void forward(const L& l, int threads, const T* weight, T* packed) {
    const int64_t channels = l.c.Cin + l.c.C;
    parallel_for(threads, l.Cb * channels, l.taps * 4 * VL, [&](int64_t task) {
      const int64_t cb = task / channels, ci = task % channels;
      const int64_t next = (ci < l.c.Cin ? l.c.Cin : l.c.C) * 4 * VL;  // tap
      T* const out = packed + (cb * l.K() + row(l, ci, 0)) * 4 * VL;
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t lane = 0; lane < VL; ++lane) {
          const int64_t ch = cb * VL + lane;
          T* to = out + gate * VL + lane;
          if (ch >= l.c.C) {
            for (int64_t tap = 0; tap < l.taps; ++tap) to[tap * next] = 0;
            continue;
          }
          const T* from = weight + source(l, gate * l.c.C + ch, ci, l.place(0));
          for (int64_t i = 0; i < l.c.kernel_h; ++i, from += l.all_columns())
            for (int64_t j = 0; j < l.c.kernel_w; ++j, to += next) *to = from[j];
        }
    });
  }

  static void backward(const L& l, int threads, const T* weight, T* packed) {
    backward_half(l, threads, weight, 0, l.c.Cin, l.x_blocks, packed);
    backward_half(l, threads, weight, l.c.Cin, l.c.C, l.Cb, packed + l.x_blocks * l.Kg * VL);
  }

  // Makes Winograd's weights from the input channels [first, first + count) to the gates.
  static void forward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            T* packed) {
    parallel_for(threads, l.Cb * count, l.tile_weights() * 4 * VL, [&](int64_t task) {
      const int64_t cb = task / count, k = task % count;
      for (int64_t gate = 0; gate < 4; ++gate) {
        const LaneWeights from{weight + source(l, gate * l.c.C + cb * VL, first + k, 0),
                               source(l, 1, 0, 0), within(l.c.C - cb * VL)};
        tile_weights(l, from, false, count * 4 * VL,
                     packed + (cb * l.tile_weights() * count + k) * 4 * VL + gate * VL);
      }
    });
  }

  // Makes those of the data gradient, from the gates to `vectors` vectors of those channels.
  static void backward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                             int64_t vectors, T* packed) {
    each_backward(l, threads, weight, first, count, vectors, l.tile_weights(),
                  [&](const LaneWeights& from, int64_t block, int64_t place, int64_t width) {
                    tile_weights(l, from, true, 4 * l.Cp * width,
                                 packed + block * l.tile_weights() * 4 * l.Cp + place);
                  });
  }

 private:
  // The weights of tap 0 that are packed into one vector. Those of neighbouring lanes lie `stride`
  // apart, and the lanes from `count` on are zero.
  struct LaneWeights {
    const T* from;
    int64_t stride, count;
  };
  static int64_t within(int64_t lanes) { return lanes < 0 ? 0 : lanes < VL ? lanes : VL; }

  // Calls f(lanes, block, place, width) for every gate channel and vector of input channels. The
  // vector belongs to a block of `width` channels that begins at channel `block`, and lies at
  // `place` in that block's row of all gates.
  template <class F>
  static void each_backward(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, int64_t values, F&& f) {
    const int64_t gates = 4 * l.Cp;
    parallel_for(threads, vectors * gates, values * VL, [&](int64_t task) {
      const int64_t v = task / gates, g = task % gates;
      const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
      const VectorBlock b = vector_block(vectors, v, VL * int(sizeof(T)));
      const LaneWeights from{weight + source(l, gate * l.c.C + ch, first + v * VL, 0),
                             source(l, 0, 1, 0), ch < l.c.C ? within(count - v * VL) : 0};
      f(from, b.first * VL, (g * b.count + v - b.first) * VL, b.count * VL);
    });
  }

  // Transforms one vector of weights, flipped or not, in double precision. Point p of part k goes
  // to out + (p * parts + k) * stride.
  static void tile_weights(const L& l, const LaneWeights& from, bool flipped, int64_t stride,
                           T* out) {
    using S = Simd<double, VL>;
    const Tiling& t = l.form;
    const auto transform = PlaneTransform<S>::taps(t, t.h.part, t.w.part);
    const int64_t points = t.points(), parts = t.parts();
    alignas(64) double taps[5 * 5 * VL], values[8 * 8 * VL];
    for (int64_t part = 0; part < parts; ++part, out += stride) {
      std::memset(taps, 0, sizeof(taps));
      const int64_t top = part / t.w.parts * t.h.part, left = part % t.w.parts * t.w.part;
      for (int64_t i = 0; i < t.h.part && top + i < l.c.kernel_h; ++i)
        for (int64_t j = 0; j < t.w.part && left + j < l.c.kernel_w; ++j) {
          const int64_t tap = (top + i) * l.c.kernel_w + left + j;
          const T* weight = from.from + l.place(flipped ? l.taps - 1 - tap : tap);
          double* to = taps + (i * t.w.part + j) * VL;
          for (int64_t lane = 0; lane < from.count; ++lane) to[lane] = weight[lane * from.stride];
        }
      transform.run(taps, {t.w.part * VL, VL, 0}, values, {t.w.inputs() * VL, VL, 0}, 1);
      for (int64_t point = 0; point < points; ++point)
        for (int lane = 0; lane < VL; ++lane)
          out[point * parts * stride + lane] = T(values[point * VL + lane]);
    }
  }

  static void backward_half(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, T* packed) {
    each_backward(l, threads, weight, first, count, vectors, l.taps,
                  [&](const LaneWeights& from, int64_t block, int64_t place, int64_t width) {
                    T* out = packed + block * l.Kg + place;
                    for (int64_t tap = 0; tap < l.taps; ++tap, out += 4 * l.Cp * width) {
                      const T* weight = from.from + l.place(l.taps - 1 - tap);
                      for (int64_t lane = 0; lane < VL; ++lane)
                        out[lane] = lane < from.count ? weight[lane * from.stride] : T(0);
                    }
                  });
  }
};

SNNLSTM_END_ISA
