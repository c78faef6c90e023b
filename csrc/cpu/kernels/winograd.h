// Winograd's minimal filtering F(M x M, R x R) (Lavin and Gray 2016,
// https://arxiv.org/abs/1509.09308): a tile of M x M outputs from A x A inputs, A = M + R - 1, by A
// * A products a channel instead of M * M * R * R. Of direct convolution's work that is
//
//   3 x 3 taps    M = 4: 25 %    M = 2: 44 %
//   5 x 5         M = 4: 16 %    M = 2: 36 %
//   7 x 7                        M = 2: 33 %
//
//   outputs = AT [ (BT inputs B) * (G taps GT) ] A        sums over channels inside the brackets
//
// The interpolation points are 0, infinity and +-1 for A = 4, +-2/3, +-3/2 for A = 6, +-1/2, +-1,
// +-2 for A = 8, so that the transforms are the same few sums for every M and R: AT and G are
// Vandermonde matrices of the points, G's rows scaled. Pairs +-p share their even and odd sums.
// Reciprocal points near 1 keep the entries of all three matrices small: for A = 6 the error is
// less than half of that of the usual 0, +-1, +-2 (benchmarks/NOTES.md). The weight gradient is the
// same thing with the roles changed: R x R outputs, with the M x M gradients of a tile in the place
// of the taps.
#pragma once

#include "conv.h"

SNNLSTM_BEGIN_ISA

// One dimension of the transforms, on values of type R (vectors).
template <class R, class T, int A>
struct Transform {
  static_assert(A == 4 || A == 6 || A == 8);

  // The points +-p, +-q and +-r, as far as A has them. Their product is 1.
  static constexpr int pairs = A / 2 - 1;
  static constexpr double p = A == 4 ? 1 : A == 6 ? 2. / 3 : 0.5, q = A == 6 ? 1.5 : 1, r = 2;
  static constexpr double pp = p * p, qq = q * q, rr = r * r;

  // BT: A inputs to A values.
  static SNNLSTM_INLINE void inputs(const R (&x)[A], R (&y)[A]) {
    if constexpr (A == 4) {
      y[0] = x[0] - x[2];
      plus_minus(x[2], x[1], y[1], y[2]);
      y[3] = x[3] - x[1];
    } else if constexpr (A == 6) {
      y[0] = x[0] - T(pp + qq) * x[2] + x[4];
      plus_minus(x[4] - T(qq) * x[2], T(p) * (x[3] - T(qq) * x[1]), y[1], y[2]);
      plus_minus(x[4] - T(pp) * x[2], T(q) * (x[3] - T(pp) * x[1]), y[3], y[4]);
      y[5] = x[1] - T(pp + qq) * x[3] + x[5];
    } else {
      constexpr double sum = pp + qq + rr;  // and, with these points, pp qq + pp rr + qq rr
      y[0] = x[0] - x[6] + T(sum) * (x[4] - x[2]);
      plus_minus(quartic(x, 6, qq, rr), T(p) * quartic(x, 5, qq, rr), y[1], y[2]);
      plus_minus(quartic(x, 6, pp, rr), T(q) * quartic(x, 5, pp, rr), y[3], y[4]);
      plus_minus(quartic(x, 6, pp, qq), T(r) * quartic(x, 5, pp, qq), y[5], y[6]);
      y[7] = x[7] - x[1] + T(sum) * (x[3] - x[5]);
    }
  }

  // AT: A products to M outputs.
  template <int M>
  static SNNLSTM_INLINE void outputs(const R (&y)[A], R (&out)[M]) {
    const R even = y[1] + y[2], odd = y[1] - y[2];
    for (int k = 0; k < M; ++k) out[k] = T(power(p, k)) * (k % 2 ? odd : even);
    if constexpr (pairs > 1) add_pair(y[3], y[4], q, out);
    if constexpr (pairs > 2) add_pair(y[5], y[6], r, out);
    out[0] += y[0];
    out[M - 1] += y[A - 1];
  }

  // G: N taps to A values.
  template <int N>
  static SNNLSTM_INLINE void taps(const R (&x)[N], R (&y)[A]) {
    constexpr double of_p = (pairs > 1 ? pp - qq : 1) * (pairs > 2 ? pp - rr : 1);
    constexpr double of_q = (qq - pp) * (pairs > 2 ? qq - rr : 1), of_r = (rr - pp) * (rr - qq);
    y[0] = x[0];
    pair(x, p, 0.5 / (pp * of_p), y[1], y[2]);
    if constexpr (pairs > 1) pair(x, q, 0.5 / (qq * of_q), y[3], y[4]);
    if constexpr (pairs > 2) pair(x, r, 0.5 / (rr * of_r), y[5], y[6]);
    y[A - 1] = x[N - 1];
  }

 private:
  static constexpr double power(double base, int n) {
    return n == 0 ? 1 : base * power(base, n - 1);
  }

  static SNNLSTM_INLINE void plus_minus(R even, R odd, R& plus, R& minus) {
    plus = even + odd;
    minus = even - odd;
  }

  // The coefficients of (z^2 - a) (z^2 - b), with x[k] in the place of z^4.
  static SNNLSTM_INLINE R quartic(const R (&x)[A], int k, double a, double b) {
    return x[k] - T(a + b) * x[k - 2] + T(a * b) * x[k - 4];
  }

  // The products at z and -z, added to the outputs.
  template <int M>
  static SNNLSTM_INLINE void add_pair(R plus, R minus, double z, R (&out)[M]) {
    const R even = plus + minus, odd = plus - minus;
    for (int k = 0; k < M; ++k) out[k] += T(power(z, k)) * (k % 2 ? odd : even);
  }

  // plus, minus = scale * (the polynomial with coefficients x at z, at -z).
  template <int N>
  static SNNLSTM_INLINE void pair(const R (&x)[N], double z, double scale, R& plus, R& minus) {
    R even = T(scale) * x[0], odd = T(scale * z) * x[1];
    for (int k = 2; k < N; ++k) (k % 2 ? odd : even) += T(scale * power(z, k)) * x[k];
    plus_minus(even, odd, plus, minus);
  }
};

template <class S, int M, int R_>
struct Winograd {
  using T = typename S::Scalar;
  using R = typename S::R;
  static constexpr int tile = M, kernel = R_, A = M + R_ - 1, points = A * A;
  using D = Transform<R, T, A>;

  // A x A pixels of VL channels; value k goes to out + k * stride.
  static SNNLSTM_INLINE void inputs(const T* in, int64_t row, int64_t pixel, T* out,
                                    int64_t stride) {
    both<A, A>([&](int i, int j) { return S::load(in + i * row + j * pixel); },
               [](const R(&x)[A], R(&y)[A]) { D::inputs(x, y); },
               [&](int i, int j, R v) { S::store(out + (i * A + j) * stride, v); });
  }

  // The products of VL output channels, `stride` apart, to N x N outputs: put(i, j, vector).
  template <int N, class Put>
  static SNNLSTM_INLINE void outputs(const T* in, int64_t stride, Put&& put) {
    both<A, N>([&](int i, int j) { return S::load(in + (i * A + j) * stride); },
               [](const R(&x)[A], R(&y)[N]) { D::template outputs<N>(x, y); }, put);
  }

  // N x N taps, get(i, j), to A x A values: put(i, j, vector).
  template <int N, class Get, class Put>
  static SNNLSTM_INLINE void taps(Get&& get, Put&& put) {
    both<N, A>(get, [](const R(&x)[N], R(&y)[A]) { D::template taps<N>(x, y); }, put);
  }

 private:
  // One transform along both dimensions of a From x From square, to To x To.
  template <int From, int To, class Get, class One, class Put>
  static SNNLSTM_INLINE void both(Get&& get, One&& one, Put&& put) {
    R half[To][From];
#pragma GCC unroll 8
    for (int j = 0; j < From; ++j) {
      R x[From], y[To];
#pragma GCC unroll 8
      for (int i = 0; i < From; ++i) x[i] = get(i, j);
      one(x, y);
#pragma GCC unroll 8
      for (int i = 0; i < To; ++i) half[i][j] = y[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < To; ++i) {
      R y[To];
      one(half[i], y);
#pragma GCC unroll 8
      for (int j = 0; j < To; ++j) put(i, j, y[j]);
    }
  }
};

// f(Winograd<S, M, R>{}) for the form that a kernel size and tile name.
template <class S, class F>
SNNLSTM_INLINE void with_winograd(int kernel, int tile, F&& f) {
  if (kernel == 7) return f(Winograd<S, 2, 7>{});
  if (kernel == 5) return tile == 4 ? f(Winograd<S, 4, 5>{}) : f(Winograd<S, 2, 5>{});
  return tile == 4 ? f(Winograd<S, 4, 3>{}) : f(Winograd<S, 2, 3>{});
}

// The same for the weight gradient (Cell::grad_tile).
template <class S, class F>
SNNLSTM_INLINE void with_grad_winograd(int kernel, int tile, F&& f) {
  if (kernel == 5) return f(Winograd<S, 2, 5>{});
  return tile == 4 ? f(Winograd<S, 4, 3>{}) : f(Winograd<S, 2, 3>{});
}

// Compiled for float32, in eight lanes or more where the processor has them: float64 is there for
// its accuracy, and layers of so few channels have little to gain.
template <class T, int VL>
constexpr bool kHasWinograd =
    sizeof(T) == 4 && VL * sizeof(T) >= (kWideBytes < 32 ? kWideBytes : 32);

SNNLSTM_END_ISA
