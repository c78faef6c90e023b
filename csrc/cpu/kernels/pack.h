// Packs the caller's weight (4C, Cin + C, kernel_h, kernel_w) in the order in which the register
// tiles read it (layout.h).
#pragma once

#include "layout.h"
#include "threads.h"
#include "transpose.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Packing {
  using L = Layout<T, VL>;
  using S = Simd<T, VL>;

  // The distances, in the caller's weight, of neighbouring outputs, inputs and taps. A turned weight
  // has the inputs first.
  struct Distances {
    int64_t output, input, tap;

    explicit Distances(const L& l) {
      const int64_t inputs = l.x.channels + l.mem.channels;
      const int64_t second = l.c.turned ? l.c.Cout : inputs;
      const int64_t of_first = second * l.all_taps();
      const int64_t of_second = l.c.weight_last ? 1 : l.all_taps();
      output = l.c.turned ? of_second : of_first;
      input = l.c.turned ? of_first : of_second;
      tap = l.c.weight_last ? second : 1;
    }
  };

  // Returns the place of the weight from input channel ci (x's first, then mem's) to gate channel
  // g, at a place among its taps.
  static int64_t source(const L& l, int64_t g, int64_t ci, int64_t place) {
    const Distances to(l);
    return g * to.output + ci * to.input + place * to.tap;
  }

  // Returns how many neighbouring input channels are packed together, so that their taps fill
  // several squares of VL lanes.
  static int64_t together(const L& l) {
    const int64_t count = (4 * VL + l.taps - 1) / l.taps;
    return count < 8 && l.taps <= 128 ? 8 : count;
  }

  static void forward(const L& l, int threads, const T* weight, T* packed) {
    forward_half(l, threads, weight, 0, l.c.Cin, packed);
    if (l.packed_rows() > l.x.K)
      forward_half(l, threads, weight, l.c.Cin, l.c.C, packed + l.x.K * 4 * VL);
  }

  static void backward(const L& l, int threads, const T* weight, T* packed) {
    backward_half(l, threads, weight, 0, l.c.Cin, l.x.blocks, packed);
    if (!l.c.tiled())
      backward_half(l, threads, weight, l.c.Cin, l.c.C, l.Cb, packed + l.x.blocks * l.Kg * VL);
  }

  // Transforms the weights from input channels [first, first + count) to the gates for Winograd.
  static void forward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            T* packed) {
    const TapVectors taps(l, threads, 4 * together(l));
    each_forward(
        l, threads, count, l.tile_weights(), [&](int64_t cb, int64_t begin, int64_t n, int thread) {
          for (int64_t gate = 0; gate < 4; ++gate)
            load(l, weight + source(l, l.output(cb, gate), first + begin, 0), source(l, 1, 0, 0),
                 l.lanes(cb, gate), n, taps.of(thread, gate * n), {l.taps, l.taps * VL, VL});
          T* const out = packed + (cb * l.tile_weights() * count + begin) * 4 * VL;
          for (int64_t k = 0; k < 4 * n; ++k)
            tile_weights(l, taps.of(thread, k % 4 * n + k / 4), l.c.turned, count * 4 * VL,
                         out + k * VL);
        });
  }

  // Transforms the weights of the data gradient for Winograd, from the gates to `vectors` vectors
  // of the input channels [first, first + count).
  static void backward_tiles(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                             int64_t vectors, T* packed) {
    const TapVectors taps(l, threads, 1);
    each_backward(
        l, threads, weight, first, count, vectors, l.tile_weights(),
        [&](const T* from, int64_t lanes, int64_t block, int64_t place, int64_t width, int thread) {
          load(l, from, l.all_taps(), lanes, 1, taps.of(thread, 0), {l.taps, 0, VL});
          tile_weights(l, taps.of(thread, 0), true, 4 * l.Cp * width,
                       packed + block * l.tile_weights() * 4 * l.Cp + place);
        });
  }

 private:
  // The taps (count, taps, VL) of some vectors of weights, for each thread.
  struct TapVectors {
    TapVectors(const L& l, int threads, int64_t count)
        : size(l.taps * VL),
          count(count),
          values(new T[(threads > 1 ? threads : 1) * count * size]) {}
    T* of(int thread, int64_t k) const { return &values[(thread * count + k) * size]; }

    int64_t size, count;
    std::unique_ptr<T[]> values;
  };

  static int64_t within(int64_t lanes) { return lanes < 0 ? 0 : lanes < VL ? lanes : VL; }

  // Loads the taps of `count` neighbouring input channels, whose lanes lie `stride` apart. The
  // lanes from `lanes` on are zero.
  static void load(const L& l, const T* weight, int64_t stride, int64_t lanes, int64_t count,
                   T* dst, const Pixels& to) {
    const Distances from(l);
    if (l.all_taps() == l.taps && count > 1 && from.tap == 1 && from.input == l.taps)
      return load_row<S>(weight, stride, 1, count * l.taps, lanes, dst, to, VL);
    if (l.c.weight_last && !l.c.turned) {
      for (int64_t tap = 0; tap < l.taps; ++tap)
        load_row<S>(weight + tap * from.tap, stride, 1, count, lanes, dst + tap * to.pixel,
                    Row{to.row}, VL);
      return;
    }
    const int64_t run = l.c.outer_w == 0 ? l.taps : l.c.kernel_w;  // neighbours
    for (int64_t k = 0; k < count * l.taps; k += run) {
      const int64_t ci = k / l.taps, tap = k % l.taps;
      load_row<S>(weight + ci * from.input + l.place(tap) * from.tap, stride, from.tap, run, lanes,
                  dst + ci * to.row + tap * to.pixel, Row{to.pixel}, VL);
    }
  }

  // Calls f(channel block, first, n, thread number) for all channel blocks and groups of n of
  // `count` input channels. A channel makes `values` values.
  template <class F>
  static void each_forward(const L& l, int threads, int64_t count, int64_t values, F&& f) {
    const int64_t most = together(l);
    const int64_t groups = (count + most - 1) / most;
    parallel_for(threads, l.Cb * groups, most * values * 4 * VL, [&](int64_t task, int thread) {
      const int64_t begin = task % groups * most;
      f(task / groups, begin, begin + most < count ? most : count - begin, thread);
    });
  }

  static void forward_half(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                           T* packed) {
    each_forward(l, threads, count, l.taps, [&](int64_t cb, int64_t begin, int64_t n, int) {
      T* const out = packed + (cb * l.packed_rows() + begin) * 4 * VL;
      for (int64_t gate = 0; gate < 4; ++gate)
        load(l, weight + source(l, l.output(cb, gate), first + begin, 0), source(l, 1, 0, 0),
             l.lanes(cb, gate), n, out + gate * VL, {l.taps, 4 * VL, count * 4 * VL});
    });
  }

  // Calls f(from, lanes, block, place, width, thread number) for every gate channel and vector of
  // input channels. `from` points to the weight that goes to lane 0. The vector belongs to a block
  // of `width` channels that begins at channel `block`, and lies at `place` in that block's row of
  // all gates. The vectors of a block follow each other, and fill whole cache lines.
  template <class F>
  static void each_backward(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, int64_t values, F&& f) {
    constexpr int kTogether = 4;
    parallel_for(threads, 4 * l.Cp / kTogether, kTogether * vectors * VL * values,
                 [&](int64_t task, int thread) {
                   for (int64_t g = task * kTogether; g < (task + 1) * kTogether; ++g) {
                     const int64_t ch = g / (4 * VL) * VL + g % VL, gate = g / VL % 4;
                     for (int64_t v = 0; v < vectors; ++v) {
                       const VectorBlock b = vector_block(vectors, v, VL * int(sizeof(T)));
                       f(weight + source(l, gate * l.c.C + ch, first + v * VL, 0),
                         ch < l.c.C ? within(count - v * VL) : 0, b.first * VL,
                         (g * b.count + v - b.first) * VL, b.count * VL, thread);
                     }
                   }
                 });
  }

  static void backward_half(const L& l, int threads, const T* weight, int64_t first, int64_t count,
                            int64_t vectors, T* packed) {
    each_backward(
        l, threads, weight, first, count, vectors, l.taps,
        [&](const T* from, int64_t lanes, int64_t block, int64_t place, int64_t width, int) {
          const int64_t next = 4 * l.Cp * width;  // tap, from the last one on
          T* const last = packed + block * l.Kg + place + (l.taps - 1) * next;
          load(l, from, l.all_taps(), lanes, 1, last, {l.taps, 0, -next});
        });
  }

  // Transforms a vector's taps, flipped or not, in double precision. Point p of part k goes to
  // out + (p * parts + k) * stride.
  static void tile_weights(const L& l, const T* in, bool flipped, int64_t stride, T* out) {
    using D = Simd<double, VL>;
    const WinogradTile& t = l.winograd;
    const auto transform = PlaneTransform<D>::taps(t, t.h.part, t.w.part);
    const int64_t points = t.points(), parts = t.parts();
    alignas(64) double taps[5 * 5 * VL], values[8 * 8 * VL];
    for (int64_t i0 = 0; i0 < t.h.taps(); i0 += t.h.part)
      for (int64_t j0 = 0; j0 < t.w.taps(); j0 += t.w.part, out += stride) {
        double* to = taps;
        for (int64_t i = i0; i < i0 + t.h.part; ++i)
          for (int64_t j = j0; j < j0 + t.w.part; ++j, to += VL) {
            const bool inside = i < l.c.kernel_h && j < l.c.kernel_w;
            const int64_t tap = i * l.c.kernel_w + j;
            const T* from = in + (flipped ? l.taps - 1 - tap : tap) * VL;
            D::store(to, inside ? __builtin_convertvector(S::load(from), typename D::R)
                                : typename D::R{});
          }
        transform.run(taps, {t.w.part * VL, VL, 0}, values, {t.w.inputs() * VL, VL, 0}, 1);
        for (int64_t point = 0; point < points; ++point)
          S::store(out + point * parts * stride,
                   __builtin_convertvector(D::load(values + point * VL), typename S::R));
      }
  }
};

SNNLSTM_END_ISA
