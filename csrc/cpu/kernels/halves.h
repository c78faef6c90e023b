// Vectors of float16 and bfloat16 in memory, which become float32 in registers. The conversions use
// no instructions for half types, because AVX2 alone has none.
#pragma once

#include "math.h"

SNNLSTM_BEGIN_ISA

enum class Float16 : uint16_t {};
enum class BFloat16 : uint16_t {};

template <class S>
struct Halves {
  static constexpr int lanes = S::lanes;
  using Words = typename VectorOf<uint32_t, lanes>::type;
  using Bits = typename VectorOf<uint16_t, lanes>::type;
  using R = typename S::R;

  static SNNLSTM_INLINE Words words(R v) { return reinterpret_cast<Words>(v); }
  static SNNLSTM_INLINE R floats(Words w) { return reinterpret_cast<R>(w); }

  static SNNLSTM_INLINE Words read(const void* p) {
    Bits bits;
    std::memcpy(&bits, p, sizeof(bits));
    return __builtin_convertvector(bits, Words);
  }
  static SNNLSTM_INLINE void write(void* p, Words halves) {
    const Bits bits = __builtin_convertvector(halves, Bits);
    std::memcpy(p, &bits, sizeof(bits));
  }

  static SNNLSTM_INLINE R load(const BFloat16* p) { return floats(read(p) << 16); }
  // A half's exponent, moved to the place of a float's exponent, is too small by 112. The exponent
  // of an infinity or NaN becomes the largest.
  static SNNLSTM_INLINE R load(const Float16* p) {
    const Words h = read(p);
    const Words magnitude = (h & 0x7fff) << 13;
    const Words scaled = words(floats(magnitude) * 0x1p112f);
    return floats((h & 0x8000) << 16 |
                  (magnitude < (0x7c00u << 13) ? scaled : magnitude | 0x7f800000));
  }

  // These round to nearest, ties to even.
  static SNNLSTM_INLINE void store(BFloat16* p, R v) {
    const Words w = words(v);
    const Words rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;
    write(p, (w & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc0 : rounded);
  }
  static SNNLSTM_INLINE void store(Float16* p, R v) {
    const Words w = words(v);
    const Words magnitude = w & 0x7fffffff;
    // Adding 0.5 rounds to the last bit of a subnormal half.
    const Words subnormal = words(floats(magnitude) + 0.5f) - 0x3f000000;
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Words special = magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
    const Words finite = magnitude < (113u << 23) ? subnormal : normal;
    write(p, (magnitude < (143u << 23) ? finite : special) | (w >> 16 & 0x8000));
  }
};

SNNLSTM_END_ISA
