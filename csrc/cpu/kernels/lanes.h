// The vector lengths that are compiled for this instruction set, and the choice between them.
#pragma once

#include "../../args.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Lanes {
  using Scalar = T;
  static constexpr int count = VL;
};

// f(Lanes<T, VL>): the wide vectors, unless the narrow ones hold all channels.
template <class F>
auto with_lanes(const Cell& c, F&& f) {
  const auto choose = [&](auto number) {
    using T = decltype(number);
    constexpr int wide = kWideBytes / sizeof(T), narrow = kNarrowBytes / sizeof(T);
    if constexpr (narrow < wide)
      if (c.C <= narrow) return f(Lanes<T, narrow>{});
    return f(Lanes<T, wide>{});
  };
  return c.dtype == DType::float64 ? choose(double{}) : choose(float{});
}

SNNLSTM_END_ISA
