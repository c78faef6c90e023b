// Lists the nonzeros of x, for sparse.h and linear.h.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "layout.h"

SNNLSTM_BEGIN_ISA

#if defined(__AVX2__)
// The table lists the members of each set of 8 lanes, in order.
struct LaneTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr LaneTable() : lanes() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][n++] = uint8_t(lane);
  }
};
inline constexpr LaneTable kLaneTable;

// Returns the set of the lanes that are not zero. NaN is not.
SNNLSTM_INLINE unsigned nonzero_lanes(__m256 v) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
}
SNNLSTM_INLINE __m128i members_of(unsigned set) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[set]));
}
#endif

// Appends the nonzeros among x[0 .. count), count <= 8, to the end of a list, with label[n] = first
// + (place in x << shift) and value[n], and returns their number. The function reads x[0 .. 8) and
// writes whole vectors: kListSlack.
template <int shift, class T>
SNNLSTM_INLINE int64_t append_nonzeros(const T* x, int64_t count, int32_t first, int32_t* label,
                                       T* value) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256 v = _mm256_loadu_ps(x);
    const unsigned set = nonzero_lanes(v) & ((1u << count) - 1);
    const __m256i lanes = _mm256_cvtepu8_epi32(members_of(set));
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(v, lanes));
    const __m256i labels =
        _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_slli_epi32(lanes, shift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(label), labels);
    return __builtin_popcount(set);
  }
#endif
  int64_t n = 0;
  for (int64_t k = 0; k < count; ++k) {
    label[n] = first + int32_t(k << shift);
    value[n] = x[k];
    n += x[k] != T(0);
  }
  return n;
}

// The cost of a vector's instructions, in which costs are estimated. Short vectors are merged.
template <class T, int VL>
constexpr double kVectorCost = VL * int(sizeof(T)) / double(kNativeBytes);

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

constexpr bool fits_label(int64_t most) { return most <= INT32_MAX; }

// Vector code may touch this many entries beyond the end of a list, and values beyond the end of x.
constexpr int64_t kListSlack = 8;

// Appends the nonzeros of `rows` times `count` values, and returns their number. Rows lie row_step
// apart, and their labels begin label_step apart. The function is not inlined, because the loop
// would run out of registers beside its callers' variables.
template <int shift, class T>
__attribute__((noinline)) int64_t list_nonzeros(const T* x, int64_t row_step, int64_t rows,
                                                int64_t count, int32_t first, int32_t label_step,
                                                int32_t* label, T* value) {
  const T* const before = value;
  for (; rows > 0; --rows, x += row_step, first += label_step) {
    const auto append = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      n = append_nonzeros<shift>(x + k, n, first + int32_t(k << shift), label, value);
      label += n;
      value += n;
    };
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) append(k, 8);
    if (k < count) append(k, count - k);
  }
  return value - before;
}

SNNLSTM_END_ISA
