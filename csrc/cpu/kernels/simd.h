// Vectors of VL numbers of type T, written with GCC's and Clang's vector extensions, from the same
// source for every instruction set. Each set compiles this header into a namespace of its own.
// Everything is inlined, because code of one set must never be linked into another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../cell.h"

#define SNNLSTM_INLINE __attribute__((always_inline)) inline
#define SNNLSTM_BEGIN_ISA \
  namespace snnlstm {     \
  namespace SNNLSTM_ISA {
#define SNNLSTM_END_ISA \
  }                     \
  }

SNNLSTM_BEGIN_ISA

// One instruction loads kNativeBytes. A cell's vectors have kWideBytes, kNarrowBytes or less.
#if defined(__AVX512F__)
constexpr int kNativeBytes = 64, kWideBytes = 64;
#elif defined(SNNLSTM_WIDE)
constexpr int kNativeBytes = 32, kWideBytes = 64;
#elif defined(__AVX2__)
constexpr int kNativeBytes = 32, kWideBytes = 32;
#else
constexpr int kNativeBytes = 16, kWideBytes = 16;
#endif
constexpr int kNarrowBytes = kWideBytes > 16 ? kWideBytes / 2 : 16;

// x86-64 has one instruction for each of these, which compilers miss if NaN must be kept.
template <class R>
SNNLSTM_INLINE R lesser_of(R a, R b) {
  return a < b ? a : b;
}
template <class R>
SNNLSTM_INLINE R greater_of(R a, R b) {
  return a > b ? a : b;
}
#if defined(__x86_64__)
SNNLSTM_INLINE __m128 lesser_of(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
SNNLSTM_INLINE __m128 greater_of(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
SNNLSTM_INLINE __m128d lesser_of(__m128d a, __m128d b) { return _mm_min_pd(a, b); }
SNNLSTM_INLINE __m128d greater_of(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
#endif
#if defined(__AVX2__)
SNNLSTM_INLINE __m256 lesser_of(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
SNNLSTM_INLINE __m256 greater_of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
SNNLSTM_INLINE __m256d lesser_of(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }
SNNLSTM_INLINE __m256d greater_of(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
#endif
#if defined(__AVX512F__)
SNNLSTM_INLINE __m512 lesser_of(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
SNNLSTM_INLINE __m512 greater_of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
SNNLSTM_INLINE __m512d lesser_of(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }
SNNLSTM_INLINE __m512d greater_of(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
#endif

// Vectors of other numbers, which are converted when they are loaded and stored.
template <class N, int count>
struct VectorOf {
  typedef N type __attribute__((vector_size(count * sizeof(N))));
};

template <class T, int VL>
struct Simd {
  using Scalar = T;
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int lanes = VL;
  typedef T R __attribute__((vector_size(VL * sizeof(T))));
  typedef Bits Mask __attribute__((vector_size(VL * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(VL * sizeof(T)), aligned(sizeof(T)), may_alias));

  static SNNLSTM_INLINE R splat(T c) { return c - R{}; }  // c - 0 keeps the sign of a zero
  static SNNLSTM_INLINE R load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static SNNLSTM_INLINE void store(T* p, R v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static SNNLSTM_INLINE R where(Mask m, R a, R b) { return m ? a : b; }
  // These return a < b ? a : b and a > b ? a : b, that is, b where a is NaN.
  static SNNLSTM_INLINE R lesser(R a, R b) { return lesser_of(a, b); }
  static SNNLSTM_INLINE R greater(R a, R b) { return greater_of(a, b); }
  static SNNLSTM_INLINE R abs(R v) {
    return reinterpret_cast<R>(reinterpret_cast<Mask>(v) & ~sign_bit());
  }
  static SNNLSTM_INLINE Mask sign_bit() { return reinterpret_cast<Mask>(splat(T(-0.0))); }

  // Puts a flag into the sign of a number that is never negative, or is NaN.
  static SNNLSTM_INLINE R flag(R v, Mask m) {
    return reinterpret_cast<R>(reinterpret_cast<Mask>(abs(v)) | (m & sign_bit()));
  }
  static SNNLSTM_INLINE Mask flagged(R v) { return reinterpret_cast<Mask>(v) < Mask{}; }

  // rows[a][b] becomes rows[b][a], in log2(VL) rounds of interleaving.
  static SNNLSTM_INLINE void transpose(R (&rows)[VL]) {
#pragma GCC unroll 8
    for (int round = 1; round < VL; round *= 2) {
      R out[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL / 2; ++k) {
        out[2 * k] = interleave<0>(rows[k], rows[k + VL / 2]);
        out[2 * k + 1] = interleave<VL / 2>(rows[k], rows[k + VL / 2]);
      }
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) rows[k] = out[k];
    }
  }

  // Returns a[from], b[from], a[from + 1], b[from + 1], ...: half of the lanes of each vector.
  template <int from>
  static SNNLSTM_INLINE R interleave(R a, R b) {
    return interleave<from>(a, b, Lanes());
  }
  // Returns a[0], a[2], ..., b[1], b[3], ...
  static SNNLSTM_INLINE R every_other(R a, R b) { return every_other(a, b, Lanes()); }
  // Returns v with zeros in its first `count` lanes.
  static SNNLSTM_INLINE R without(R v, int64_t count) { return without(v, count, Lanes()); }

 private:
  using Lanes = std::make_integer_sequence<int, VL>;

  // Returns lanes of a, whose numbers are 0 to VL - 1, and b.
  template <int... lane>
  static SNNLSTM_INLINE R shuffle(R a, R b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, lane...);
#else  // GCC before version 12 has only this function
    return __builtin_shuffle(a, b, Mask{lane...});
#endif
  }
  template <int from, int... lane>
  static SNNLSTM_INLINE R interleave(R a, R b, std::integer_sequence<int, lane...>) {
    return shuffle<(lane % 2 * VL + lane / 2 + from)...>(a, b);
  }
  template <int... lane>
  static SNNLSTM_INLINE R every_other(R a, R b, std::integer_sequence<int, lane...>) {
    return shuffle<(2 * lane + (2 * lane >= VL))...>(a, b);
  }
  template <int... lane>
  static SNNLSTM_INLINE R without(R v, int64_t count, std::integer_sequence<int, lane...>) {
    return where(Mask{lane...} >= Mask{} + Bits(count), v, R{});
  }
};

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls f(Count<n>()) if n lies between 1 and `most`, for the largest n first.
template <int most, class F>
SNNLSTM_INLINE void with_count(int64_t n, F&& f) {
  if (n == most) return f(Count<most>());
  if constexpr (most > 1) with_count<most - 1>(n, f);
}

// Takes NV neighbouring vectors as fewer, longer ones, if the processor's vectors are longer. The
// value of a sum does not depend on its lane.
template <class S, int NV,
          bool longer =
              NV % 2 == 0 && 2 * S::lanes * int(sizeof(typename S::Scalar)) <= kNativeBytes>
struct Merged {
  using Vector = S;
  static constexpr int count = NV;
};
template <class S, int NV>
struct Merged<S, NV, true> : Merged<Simd<typename S::Scalar, 2 * S::lanes>, NV / 2> {};

SNNLSTM_END_ISA
