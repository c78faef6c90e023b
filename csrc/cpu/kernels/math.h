// exp, sigmoid and tanh of a vector, from one polynomial for exp(r) - 1 on |r| <= ln(2) / 2.
// Errors are stated and tested in tests/kernels/test_math.py.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int mantissa = 23, bias = 127;
  // ln(2) in two parts, the first with few enough digits that n * ln2_high is exact
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float limit = 87.0f;        // exp(-limit) is still a normal number
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // (exp(r) - 1 - r) / r^2, from r^0 upwards: 1/2!, 1/3!, ... economised (minimax)
  static constexpr int terms = 6;
  static constexpr float c[6] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                 8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
};

template <>
struct ExpConstants<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double ln2_high = 6.93145751953125e-1;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr double limit = 708.0;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int terms = 12;
  static constexpr double c[12] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                   1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                   1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

template <class T, int VL>
struct Math : Simd<T, VL> {
  using S = Simd<T, VL>;
  using R = typename S::R;
  using Mask = typename S::Mask;
  using K = ExpConstants<T>;
  using S::splat;
  using S::where;

  // Sets power to 2^n and fraction to exp(r) - 1, where x = n ln(2) + r and |x| <= limit. NaN gives
  // NaN.
  static SNNLSTM_INLINE void exp_parts(R x, R& power, R& fraction) {
    const R shifted = x * T(1.44269504088896340736) + K::round;
    const R n = shifted - K::round;
    R r = x - n * K::ln2_high;
    r = r - n * K::ln2_low;
    R p = splat(K::c[K::terms - 1]);
#pragma GCC unroll 16
    for (int k = K::terms - 2; k >= 0; --k) p = p * r + K::c[k];
    fraction = p * (r * r) + r;
    // The low bits of `shifted` hold n. This moves them, biased, to the place of the exponent.
    power = reinterpret_cast<R>((reinterpret_cast<Mask>(shifted) + typename S::Bits(K::bias))
                                << K::mantissa);
  }

  static SNNLSTM_INLINE R exp(R x) {
    R power, fraction;
    x = S::greater(splat(-K::limit), S::lesser(splat(K::limit), x));
    exp_parts(x, power, fraction);
    return power * fraction + power;
  }

  // Returns the unit in the last place: 0 for 0 and for subnormal numbers, infinity for infinity.
  static SNNLSTM_INLINE R last_place(R x) {
    const typename S::Bits exponent = ((typename S::Bits(2) * K::bias) + 1) << K::mantissa;
    const R power = reinterpret_cast<R>(reinterpret_cast<Mask>(x) & exponent);
    return power / T(typename S::Bits(1) << K::mantissa);
  }

  static SNNLSTM_INLINE R sigmoid(R x) { return T(1) / (T(1) + exp(-x)); }

  // tanh is e / (e + 2). e = exp(2|x|) - 1 is computed without cancellation, so that the relative
  // error stays small near 0.
  static SNNLSTM_INLINE R tanh(R x) {
    const R bounded = S::lesser(splat(T(20)), S::abs(x));
    R power, fraction;
    exp_parts(bounded + bounded, power, fraction);
    const R e = power * fraction + (power - T(1));
    const R t = e / (e + T(2));
    return reinterpret_cast<R>(reinterpret_cast<Mask>(t) |
                               (reinterpret_cast<Mask>(x) & S::sign_bit()));
  }
};

SNNLSTM_END_ISA
