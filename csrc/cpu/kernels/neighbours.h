// Joins the vectors of neighbouring pixels into one longer vector, for the work on single neurons.
// If the processor's vectors are longer than a cell's, this takes half or a quarter of the
// instructions.
#pragma once

#include "math.h"

SNNLSTM_BEGIN_ISA

// P pixels, which lie `stride` apart in memory. Four pixels lie side by side, because vectors so
// short hold all channels (lanes.h).
template <class T, int VL, int P>
struct Neighbours : Math<T, P * VL> {
  using M = Math<T, P * VL>;
  using R = typename M::R;

  static SNNLSTM_INLINE R load(const T* p, int64_t stride) {
    if constexpr (P == 1 || P == 4)
      return M::load(p);
    else
      return join(Half::load(p, stride), Half::load(p + P / 2 * stride, stride), Lanes());
  }
  static SNNLSTM_INLINE void store(T* p, int64_t stride, R v) {
    if constexpr (P == 1 || P == 4) {
      M::store(p, v);
    } else {
      Half::store(p, stride, half<0>(v, HalfLanes()));
      Half::store(p + P / 2 * stride, stride, half<P / 2 * VL>(v, HalfLanes()));
    }
  }
  // Loads one vector for all pixels.
  static SNNLSTM_INLINE R repeat(const T* p) {
    if constexpr (P == 1)
      return M::load(p);
    else
      return join(Half::repeat(p), Half::repeat(p), Lanes());
  }

  // These load and store the four gates of each pixel, which lie side by side.
  static SNNLSTM_INLINE Gates<R> load_gates(const T* p, int64_t stride) {
    R v[4];
    for (int k = 0; k < 4; ++k) v[k] = P == 4 ? M::load(p + k * P * VL) : load(p + k * VL, stride);
    if constexpr (P == 4) transpose(v, Lanes());
    return {v[0], v[1], v[2], v[3]};
  }
  static SNNLSTM_INLINE void store_gates(T* p, int64_t stride, const Gates<R>& gates) {
    R v[4] = {gates.i, gates.f, gates.o, gates.g};
    if constexpr (P == 4) transpose(v, Lanes());
    for (int k = 0; k < 4; ++k)
      P == 4 ? M::store(p + k * P * VL, v[k]) : store(p + k * VL, stride, v[k]);
  }

  // Adds up the pixels.
  static SNNLSTM_INLINE typename Simd<T, VL>::R sum(R v) {
    if constexpr (P == 1)
      return v;
    else
      return Half::sum(half<0>(v, HalfLanes()) + half<P / 2 * VL>(v, HalfLanes()));
  }

 private:
  using Half = Neighbours<T, VL, (P > 1 ? P / 2 : 1)>;
  using HalfR = typename Simd<T, (P > 1 ? P / 2 : 1) * VL>::R;
  using Lanes = std::make_integer_sequence<int, P * VL>;
  using HalfLanes = std::make_integer_sequence<int, (P > 1 ? P / 2 : 1) * VL>;

  // Turns four gates of each pixel into four pixels of each gate, and back.
  template <int... lane>
  static SNNLSTM_INLINE void transpose(R (&v)[4], std::integer_sequence<int, lane...>) {
    constexpr int L = P * VL;
    R pair[4];
    for (int k = 0; k < 4; k += 2) {
      pair[k] = __builtin_shufflevector(v[k], v[k + 1], (lane / VL % 2 * (L - VL) + lane)...);
      pair[k + 1] =
          __builtin_shufflevector(v[k], v[k + 1], (lane / VL % 2 * (L - VL) + lane + VL)...);
    }
    for (int k = 0; k < 2; ++k) {
      v[k] = __builtin_shufflevector(pair[k], pair[k + 2], (lane / (2 * VL) * (L / 2) + lane)...);
      v[k + 2] = __builtin_shufflevector(pair[k], pair[k + 2],
                                         (lane / (2 * VL) * (L / 2) + lane + L / 2)...);
    }
  }
  template <int... lane>
  static SNNLSTM_INLINE R join(HalfR a, HalfR b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, lane...);
  }
  template <int from, int... lane>
  static SNNLSTM_INLINE HalfR half(R v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (from + lane)...);
  }
};

// The number of pixels that fill one of the processor's vectors. GCC before version 12 has no
// __builtin_shufflevector.
#if defined(__clang__) || __GNUC__ >= 12
template <class T, int VL>
constexpr int kNeighbours =
    VL * int(sizeof(T)) < kNativeBytes ? kNativeBytes / (VL * int(sizeof(T))) : 1;
#else
template <class T, int VL>
constexpr int kNeighbours = 1;
#endif

// Calls f(first pixel, Count<P>()) for `count` pixels: for kNeighbours at a time, and then for
// single pixels.
template <class T, int VL, class F>
SNNLSTM_INLINE void each_neighbours(int64_t count, F&& f) {
  constexpr int P = kNeighbours<T, VL>;
  int64_t w = 0;
  for (; w + P <= count; w += P) f(w, Count<P>());
  if constexpr (P > 1)
    for (; w < count; ++w) f(w, Count<1>());
}

SNNLSTM_END_ISA
