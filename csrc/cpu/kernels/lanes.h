// The lengths of vectors that are compiled for this instruction set, and the choice among them.
#pragma once

#include "../../args.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
struct Lanes {
  using Scalar = T;
  static constexpr int count = VL;
  template <template <class, int> class Kernels>
  using Of = Kernels<T, VL>;
};

// Narrow vectors are better if one holds all channels. With AVX-512 they are also better if they
// leave fewer lanes empty: products merge them in pairs, so only the rest of the work gets slower.
inline bool narrow_is_better(int64_t channels, int64_t narrow, int64_t wide) {
  const auto padded = [&](int64_t lanes) { return (channels + lanes - 1) / lanes * lanes; };
  return channels <= narrow || (kNarrowBytes >= 32 && padded(narrow) < padded(wide));
}

// With AVX one vector holds the four float32 gates of this many channels.
constexpr int kFewChannels = kNativeBytes >= 32 ? kNativeBytes / 16 : 0;

// Calls f(Lanes<T, VL>) with the vectors in which a cell is computed.
template <class T, class F>
auto with_lanes_of(const Cell& c, F&& f) {
  constexpr int wide = kWideBytes / sizeof(T), narrow = kNarrowBytes / sizeof(T);
  if constexpr (kFewChannels > 0 && kFewChannels < narrow)
    if (c.C <= kFewChannels) return f(Lanes<T, kFewChannels>{});
  if constexpr (narrow < wide)
    if (narrow_is_better(c.C, narrow, wide)) return f(Lanes<T, narrow>{});
  return f(Lanes<T, wide>{});
}
template <class F>
auto with_lanes(const Cell& c, F&& f) {
  return c.dtype == DType::float64 ? with_lanes_of<double>(c, f) : with_lanes_of<float>(c, f);
}

SNNLSTM_END_ISA
