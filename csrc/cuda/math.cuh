// Arithmetic of the neuron on the device: double for float64 states, float for all others.
#pragma once

#include <cmath>

#include "../cell.h"
#include "primitives.cuh"

namespace snnlstm::cuda {

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
// What numbers stored as S are computed in.
template <class S>
using RealOf = typename Compute<S>::type;

SNNLSTM_BOTH double to_real(double x) { return x; }
template <class S>
SNNLSTM_BOTH float to_real(S x) {
  return to_float(x);
}

template <class S>
SNNLSTM_BOTH S from_real(RealOf<S> x) {
  if constexpr (sizeof(S) == 8)
    return x;
  else
    return from_float<S>(x);
}

// As it would be read back after having been stored.
template <class S>
SNNLSTM_BOTH RealOf<S> rounded(RealOf<S> x) {
  if constexpr (sizeof(S) == 2)
    return to_float(from_float<S>(x));
  else
    return x;
}

// cell.h's M for one real number.
template <class Real>
struct Math {
  using R = Real;
  static SNNLSTM_HD R splat(double c) { return R(c); }
  static SNNLSTM_HD R where(bool mask, R a, R b) { return mask ? a : b; }
  static SNNLSTM_HD R exp(R x) { return std::exp(x); }
  static SNNLSTM_HD R tanh(R x) { return std::tanh(x); }
  static SNNLSTM_HD R abs(R x) { return std::fabs(x); }
  static SNNLSTM_HD R sigmoid(R x) {
    const R below = R(1) + std::exp(-x);
#if defined(__CUDA_ARCH__)
    // 2 ulp; an overflow of exp gives 0, as it should.
    if constexpr (sizeof(R) == 4) return __fdividef(1.0f, below);
#endif
    return R(1) / below;
  }
};

// A flag that rides in the sign of a number that is never negative, -0 included.
template <class R>
SNNLSTM_DEVICE R flagged(R x, bool flag) {
  return std::copysign(x, flag ? R(-1) : R(1));
}
template <class R>
SNNLSTM_DEVICE bool is_flagged(R x) {
  return std::signbit(x);
}

}  // namespace snnlstm::cuda
