// Winograd's minimal filtering (Lavin and Gray 2016, https://arxiv.org/abs/1509.09308), along each
// axis by itself: F(M, R) gives M outputs of R taps from A = M + R - 1 inputs by A products instead
// of M * R. A tile of F(Mh, Rh) x F(Mw, Rw) takes, of direct convolution's products,
//
//           F(2,3)  F(3,3)  F(4,3)  F(2,5)  F(4,4)  F(4,5)
//   A          4       5       6       6       7       8
//   part     0.67    0.56    0.50    0.60    0.44    0.40    along one axis
//
//   outputs = ATh [ (BTh inputs BTw') * (Gh taps Gw') ] ATw'      sums over channels inside [ ]
//
// The interpolation points are 0, infinity and +-1 for A = 4, +-2/3, +-3/2 for A = 6, +-1/2, +-1,
// +-2 for A = 8. A = 5 and 7 have the points of 6 and 8 without infinity. So the transforms are the
// same few sums for every M and R: AT and G are Vandermonde matrices of the points, G's rows
// scaled. Pairs +-p share their even and odd sums. Reciprocal points near 1 keep the entries of all
// three matrices small: for A = 6 the error is less than half of that of the usual 0, +-1, +-2
// (benchmarks/NOTES.md). The weight gradient has Rh x Rw outputs, and takes a tile's gradients
// instead of the taps.
//
// A transform takes one axis at a time and is a loop over lines, so that code for nine lengths of
// line serves every tile.
#pragma once

#include "../tiling.h"
#include "conv.h"

SNNLSTM_BEGIN_ISA

using cpu::Axis;
using cpu::WinogradTile;

// One dimension of the transforms, on values of type R (vectors).
template <class R, class T, int A>
struct Transform {
  static_assert(A >= 4 && A <= 8);

  // The points +-p, +-q and +-r, as far as A has them. p q r = 1.
  static constexpr bool infinite = A % 2 == 0;
  static constexpr int pairs = (A - 1) / 2;
  static constexpr double p = pairs == 1 ? 1 : pairs == 2 ? 2. / 3 : 0.5;
  static constexpr double q = pairs == 2 ? 1.5 : 1;
  static constexpr double r = 2;
  static constexpr double pp = p * p;
  static constexpr double qq = q * q;
  static constexpr double rr = r * r;

  // BT makes A values of A inputs.
  struct Inputs {
    static constexpr int from = A, to = A;
    static constexpr bool adds = false;
    static SNNLSTM_INLINE void apply(const R (&x)[A], R (&y)[A]) {
      if constexpr (pairs == 1) {
        y[0] = x[0] - x[2];
        plus_minus(x[2], x[1], y[1], y[2]);
        y[3] = x[3] - x[1];
      } else if constexpr (pairs == 2) {
        y[0] = x[0] - T(pp + qq) * x[2] + x[4];
        plus_minus(x[4] - T(qq) * x[2], T(p) * (x[3] - T(qq) * x[1]), y[1], y[2]);
        plus_minus(x[4] - T(pp) * x[2], T(q) * (x[3] - T(pp) * x[1]), y[3], y[4]);
        if constexpr (infinite) y[5] = x[1] - T(pp + qq) * x[3] + x[5];
      } else {
        constexpr double sum = pp + qq + rr;  // and, with these points, pp qq + pp rr + qq rr
        y[0] = x[0] - x[6] + T(sum) * (x[4] - x[2]);
        plus_minus(quartic(x, 6, qq, rr), T(p) * quartic(x, 5, qq, rr), y[1], y[2]);
        plus_minus(quartic(x, 6, pp, rr), T(q) * quartic(x, 5, pp, rr), y[3], y[4]);
        plus_minus(quartic(x, 6, pp, qq), T(r) * quartic(x, 5, pp, qq), y[5], y[6]);
        if constexpr (infinite) y[7] = x[7] - x[1] + T(sum) * (x[3] - x[5]);
      }
    }
  };

  // AT makes M outputs of A products.
  template <int M>
  struct Outputs {
    static constexpr int from = A, to = M;
    static constexpr bool adds = true;
    static SNNLSTM_INLINE void apply(const R (&y)[A], R (&out)[M]) {
      const R even = y[1] + y[2], odd = y[1] - y[2];
      double power = 1;
      for (int k = 0; k < M; ++k, power *= p) out[k] = T(power) * (k % 2 ? odd : even);
      if constexpr (pairs > 1) add_pair(y[3], y[4], q, out);
      if constexpr (pairs > 2) add_pair(y[5], y[6], r, out);
      out[0] += y[0];
      if constexpr (infinite) out[M - 1] += y[A - 1];
    }
  };

  // G makes A values of N taps.
  template <int N>
  struct Taps {
    static constexpr int from = N, to = A;
    static constexpr bool adds = false;
    static SNNLSTM_INLINE void apply(const R (&x)[N], R (&y)[A]) {
      constexpr double scale_p = (pairs > 1 ? pp - qq : 1) * (pairs > 2 ? pp - rr : 1);
      constexpr double scale_q = (qq - pp) * (pairs > 2 ? qq - rr : 1);
      constexpr double scale_r = (rr - pp) * (rr - qq);
      y[0] = x[0];
      pair(x, p, 0.5 / (pp * scale_p), y[1], y[2]);
      if constexpr (pairs > 1) pair(x, q, 0.5 / (qq * scale_q), y[3], y[4]);
      if constexpr (pairs > 2) pair(x, r, 0.5 / (rr * scale_r), y[5], y[6]);
      if constexpr (infinite) y[A - 1] = x[N - 1];
    }
  };

 private:
  static SNNLSTM_INLINE void plus_minus(R even, R odd, R& plus, R& minus) {
    plus = even + odd;
    minus = even - odd;
  }

  // Returns (z^2 - a) (z^2 - b) with x[k], x[k - 2] and x[k - 4] as z^4, z^2 and 1.
  static SNNLSTM_INLINE R quartic(const R (&x)[A], int k, double a, double b) {
    return x[k] - T(a + b) * x[k - 2] + T(a * b) * x[k - 4];
  }

  // Adds the products at z and -z to the outputs.
  template <int M>
  static SNNLSTM_INLINE void add_pair(R plus, R minus, double z, R (&out)[M]) {
    const R even = plus + minus, odd = plus - minus;
    double power = 1;  // a loop, because Clang does not inline a recursive function
    for (int k = 0; k < M; ++k, power *= z) out[k] += T(power) * (k % 2 ? odd : even);
  }

  // Evaluates the polynomial with coefficients x, times scale, at z (plus) and at -z (minus).
  template <int N>
  static SNNLSTM_INLINE void pair(const R (&x)[N], double z, double scale, R& plus, R& minus) {
    R even = T(scale) * x[0], odd = T(scale * z) * x[1];
    double power = z * z;
    for (int k = 2; k < N; ++k, power *= z) (k % 2 ? odd : even) += T(scale * power) * x[k];
    plus_minus(even, odd, plus, minus);
  }
};

// The strides, in elements, of vectors that are transformed along one axis: `next` between the
// neighbours in a line, `line` between lines, `batch` between batches of lines.
struct Lines {
  int64_t next, line, batch;
};

// Transforms `batches` times `lines` lines from `in` to `out`, and adds `start` unless it is null.
template <class T>
using AxisTransform = void (*)(const T* in, const Lines& from, T* out, const Lines& to, int lines,
                               int batches, const T* start, const Lines& at);

template <class S, class Op, bool adds, class T = typename S::Scalar>
SNNLSTM_INLINE void transform_each_line(const T* in, Lines from, T* out, Lines to, int lines,
                                        int batches, const T* start, Lines at) {
  using R = typename S::R;
  from.batch -= lines * from.line;
  to.batch -= lines * to.line;
  at.batch -= lines * at.line;
  for (; batches > 0; --batches, in += from.batch, out += to.batch, start += at.batch)
    for (int l = lines; l > 0; --l, in += from.line, out += to.line, start += at.line) {
      R x[Op::from], y[Op::to];
#pragma GCC unroll 8
      for (int k = 0; k < Op::from; ++k) x[k] = S::load(in + k * from.next);
      Op::apply(x, y);
#pragma GCC unroll 8
      for (int k = 0; k < Op::to; ++k) {
        if constexpr (adds) y[k] += S::load(start + k * at.next);
        S::store(out + k * to.next, y[k]);
      }
    }
}

template <class S, class Op, class T = typename S::Scalar>
void transform_lines(const T* in, const Lines& from, T* out, const Lines& to, int lines,
                     int batches, const T* start, const Lines& at) {
  if constexpr (Op::adds)
    if (start)
      return transform_each_line<S, Op, true>(in, from, out, to, lines, batches, start, at);
  transform_each_line<S, Op, false>(in, from, out, to, lines, batches, start, Lines{});
}

// The transforms along an axis, which are null for a kernel of one tap. `sizes` is the number of
// inputs, or ten times that plus the number of outputs or taps.
template <class S>
class AxisTransforms {
  using T = typename S::Scalar;
  template <int A>
  using Of = Transform<typename S::R, T, A>;

 public:
  static AxisTransform<T> inputs(const Axis& a) { return find<Inputs, 4, 5, 6, 7, 8>(a.inputs()); }
  static AxisTransform<T> outputs(const Axis& a, int count) {
    return find<Outputs, 42, 43, 53, 62, 63, 64, 65, 74, 84>(a.inputs() * 10 + count);
  }
  static AxisTransform<T> taps(const Axis& a, int count) {
    return find<Taps, 42, 43, 53, 62, 63, 64, 65, 74, 85>(a.inputs() * 10 + count);
  }

 private:
  template <int sizes>
  using Inputs = typename Of<sizes>::Inputs;
  template <int sizes>
  using Outputs = typename Of<sizes / 10>::template Outputs<sizes % 10>;
  template <int sizes>
  using Taps = typename Of<sizes / 10>::template Taps<sizes % 10>;

  template <template <int> class Op, int... compiled>
  static AxisTransform<T> find(int sizes) {
    AxisTransform<T> lines = nullptr;
    ((sizes == compiled && (lines = transform_lines<S, Op<compiled>>)), ...);
    return lines;
  }
};

// The strides of the vectors of small images; `batch` leads from one image to the next.
struct Plane {
  int64_t row, column, batch;
};

// A transform along both axes of small images, of from_h x from_w vectors to to_h x to_w.
template <class S>
class PlaneTransform {
  using T = typename S::Scalar;
  static constexpr int kMostBatches = 4;

 public:
  PlaneTransform() = default;
  PlaneTransform(AxisTransform<T> h, int from_h, int to_h, AxisTransform<T> w, int from_w, int to_w)
      : h_(h), w_(w), from_h_(from_h), to_h_(to_h), from_w_(from_w), to_w_(to_w) {}

  // Transforms up to kMostBatches images, and adds `start` unless it is null.
  void run(const T* in, const Plane& from, T* out, const Plane& to, int batches,
           const T* start = nullptr, const Plane& at = {}) const {
    const Lines to_w{to.column, to.row, to.batch}, at_w{at.column, at.row, at.batch};
    if (!h_)
      return w_(in, {from.column, from.row, from.batch}, out, to_w, from_h_, batches, start, at_w);
    const Lines from_h{from.row, from.column, from.batch};
    if (!w_)
      return h_(in, from_h, out, {to.row, to.column, to.batch}, from_w_, batches, start,
                {at.row, at.column, at.batch});
    alignas(64) T half[kMostBatches * 8 * 8 * S::lanes];
    const int64_t row = from_w_ * S::lanes;
    const int64_t image = to_h_ * row;
    h_(in, from_h, half, {row, S::lanes, image}, from_w_, batches, nullptr, {});
    w_(half, {S::lanes, row, image}, out, to_w, to_h_, batches, start, at_w);
  }

  static PlaneTransform outputs(const WinogradTile& t, int height, int width) {
    using P = AxisTransforms<S>;
    return {P::outputs(t.h, height), t.h.inputs(), height,
            P::outputs(t.w, width),  t.w.inputs(), width};
  }
  static PlaneTransform taps(const WinogradTile& t, int height, int width) {
    using P = AxisTransforms<S>;
    return {P::taps(t.h, height), height, t.h.inputs(), P::taps(t.w, width), width, t.w.inputs()};
  }

 private:
  AxisTransform<T> h_ = nullptr, w_ = nullptr;
  int from_h_ = 1, to_h_ = 1, from_w_ = 1, to_w_ = 1;
};

// Winograd is compiled only for float32, because users choose float64 for its accuracy.
template <class T, int VL>
constexpr bool kHasWinograd = sizeof(T) == 4;

SNNLSTM_END_ISA
