// Winograd's minimal filtering F(M x M, R x R) (Lavin and Gray 2016,
// https://arxiv.org/abs/1509.09308): a tile of M x M outputs from A x A inputs, A = M + R - 1, by A
// * A products a channel instead of M * M * R * R. For 3 x 3 taps and M = 4 that is a quarter of
// the work, M = 2: 4/9; for 5 x 5 and M = 2: 36/100.
//
//   outputs = AT [ (BT inputs B) * (G taps GT) ] A        sums over channels inside the brackets
//
// The interpolation points are 0, 1, -1 and infinity for A = 4, and 0, 2/3, -2/3, 3/2, -3/2 and
// infinity for A = 6, so that the transforms are the same few sums for every M and R: AT and G are
// Vandermonde matrices of the points, G's rows scaled. Pairs +-p share their even and odd sums.
// Reciprocal points near 1 keep the entries of all three matrices small: the error is less than
// half of that of the usual 0, +-1, +-2 (benchmarks/NOTES.md). The weight gradient is the same
// thing with the roles changed: R x R outputs, with the M x M gradients of a tile in the place of
// the taps.
#pragma once

#include "conv.h"

SNNLSTM_BEGIN_ISA

// One dimension of the transforms, on values of type R (vectors).
template <class R, class T, int A>
struct Transform {
  static_assert(A == 4 || A == 6);

  // The points +-p and +-q; of A = 4 only +-p.
  static constexpr double p = A == 4 ? 1 : 2. / 3, q = 1.5;
  static constexpr double pp = p * p, qq = q * q;

  // BT: A inputs to A values.
  static SNNLSTM_INLINE void inputs(const R (&x)[A], R (&y)[A]) {
    if constexpr (A == 4) {
      y[0] = x[0] - x[2];
      y[1] = x[1] + x[2];
      y[2] = x[2] - x[1];
      y[3] = x[3] - x[1];
    } else {  // with p q = 1
      const R even1 = x[4] - T(qq) * x[2], odd1 = x[3] - T(qq) * x[1];
      const R even2 = x[4] - T(pp) * x[2], odd2 = x[3] - T(pp) * x[1];
      y[0] = x[0] - T(pp + qq) * x[2] + x[4];
      y[1] = even1 + T(p) * odd1;
      y[2] = even1 - T(p) * odd1;
      y[3] = even2 + T(q) * odd2;
      y[4] = even2 - T(q) * odd2;
      y[5] = x[1] - T(pp + qq) * x[3] + x[5];
    }
  }

  // AT: A products to M outputs.
  template <int M>
  static SNNLSTM_INLINE void outputs(const R (&y)[A], R (&out)[M]) {
    const R sum1 = y[1] + y[2], difference1 = y[1] - y[2];
    for (int k = 0; k < M; ++k) out[k] = T(power(p, k)) * (k % 2 ? difference1 : sum1);
    if constexpr (A == 6) {
      const R sum2 = y[3] + y[4], difference2 = y[3] - y[4];
      for (int k = 0; k < M; ++k) out[k] += T(power(q, k)) * (k % 2 ? difference2 : sum2);
    }
    out[0] += y[0];
    out[M - 1] += y[A - 1];
  }

  // G: N taps to A values.
  template <int N>
  static SNNLSTM_INLINE void taps(const R (&x)[N], R (&y)[A]) {
    y[0] = x[0];
    pair(x, p, A == 4 ? 0.5 : 0.5 / (pp * (pp - qq)), y[1], y[2]);
    if constexpr (A == 6) pair(x, q, 0.5 / (qq * (qq - pp)), y[3], y[4]);
    y[A - 1] = x[N - 1];
  }

 private:
  static constexpr double power(double base, int n) {
    return n == 0 ? 1 : base * power(base, n - 1);
  }

  // plus, minus = scale * (the polynomial with coefficients x at r, at -r).
  template <int N>
  static SNNLSTM_INLINE void pair(const R (&x)[N], double r, double scale, R& plus, R& minus) {
    R even = T(scale) * x[0], odd = T(scale * r) * x[1];
    for (int k = 2; k < N; ++k) (k % 2 ? odd : even) += T(scale * power(r, k)) * x[k];
    plus = even + odd;
    minus = even - odd;
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
#pragma GCC unroll 6
    for (int j = 0; j < From; ++j) {
      R x[From], y[To];
#pragma GCC unroll 6
      for (int i = 0; i < From; ++i) x[i] = get(i, j);
      one(x, y);
#pragma GCC unroll 6
      for (int i = 0; i < To; ++i) half[i][j] = y[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) {
      R y[To];
      one(half[i], y);
#pragma GCC unroll 6
      for (int j = 0; j < To; ++j) put(i, j, y[j]);
    }
  }
};

// f(Winograd<S, M, R>{}) for the form that a kernel size and tile name.
template <class S, class F>
SNNLSTM_INLINE void with_winograd(int kernel, int tile, F&& f) {
  if (kernel == 5) return f(Winograd<S, 2, 5>{});
  if (tile == 4) return f(Winograd<S, 4, 3>{});
  return f(Winograd<S, 2, 3>{});
}

// Compiled for float32, in eight lanes or more where the processor has them: float64 is there for
// its accuracy, and layers of so few channels have little to gain.
template <class T, int VL>
constexpr bool kHasWinograd =
    sizeof(T) == 4 && VL * sizeof(T) >= (kWideBytes < 32 ? kWideBytes : 32);

SNNLSTM_END_ISA
