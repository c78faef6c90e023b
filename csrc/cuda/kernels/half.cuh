// The types fp16, bf16 and tf32. They are for storage: computation is in float.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include "simt.h"
#endif
#include "../tile.h"

namespace snnlstm::cuda {

struct alignas(2) fp16 {  // IEEE binary16: 1 + 5 + 10 bits
  uint16_t bits;
};
struct alignas(2) bf16 {  // the upper half of a float: 1 + 8 + 7 bits
  uint16_t bits;
};
struct alignas(4) tf32 {  // a float: 1 + 8 + 10 bits, and 13 that the tensor core ignores
  uint32_t bits;
};

namespace detail {

SNNLSTM_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  return ::simt::bits_of(x);
#endif
}

SNNLSTM_DEVICE float float_of(uint32_t u) {
#if defined(__CUDACC__)
  return __uint_as_float(u);
#else
  return ::simt::float_of(u);
#endif
}

// Round to nearest, ties to even, as cvt.rn does. NaN becomes the canonical 0x7fff.
SNNLSTM_DEVICE uint16_t float_to_bf16_software(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace detail

SNNLSTM_DEVICE float to_float(bf16 x) { return detail::float_of(uint32_t(x.bits) << 16); }

SNNLSTM_DEVICE float to_float(tf32 x) { return detail::float_of(x.bits); }

SNNLSTM_DEVICE float to_float(fp16 x) {
#if defined(__CUDACC__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return ::simt::float_of_fp16(x.bits);
#endif
}

// Rounds x to T. fp16 and bf16: to nearest, ties to even; tf32: to nearest, ties away from zero
// (cvt.rna, the one rounding that every architecture has).
template <class T>
SNNLSTM_DEVICE T from_float(float x);

template <>
SNNLSTM_DEVICE fp16 from_float<fp16>(float x) {
#if defined(__CUDACC__)
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return fp16{::simt::fp16_of_float(x)};
#endif
}

template <>
SNNLSTM_DEVICE bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  return bf16{detail::float_to_bf16_software(x)};
#endif
}

template <>
SNNLSTM_DEVICE tf32 from_float<tf32>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  tf32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y.bits) : "f"(x));
  return y;
#else
  uint32_t u = detail::bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return tf32{0x7fffe000u};  // a NaN stays one
  if ((u & 0x7f800000u) != 0x7f800000u) u += 0x1000u;
  return tf32{u & 0xffffe000u};
#endif
}

// Packs two neighbours of a fragment into one register, lo into bits 0 to 15.
template <class T>
SNNLSTM_DEVICE uint32_t pack(float lo, float hi) {
  static_assert(sizeof(T) == 2, "pack<T>() is for fp16 and bf16");
  return uint32_t(from_float<T>(lo).bits) | (uint32_t(from_float<T>(hi).bits) << 16);
}

}  // namespace snnlstm::cuda
