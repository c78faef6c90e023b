// Arithmetic of the neuron on the device: double for float64 states, float for all others.
#pragma once

#include <cmath>
#include <cstring>

#include "../../cell.h"
#include "../tile.h"
#include "primitives.cuh"

namespace snnlstm::cuda {

// Kernels are compiled for R, the type they compute in: float or double. The type of an array's
// elements is known at run time: double if R is double, else float, fp16 or bf16. (A kernel for
// each combination would make a hundred kernels.)

SNNLSTM_DEVICE float from_bits16(DType type, unsigned bits) {
  return type == DType::bfloat16 ? to_float(bf16{uint16_t(bits)}) : to_float(fp16{uint16_t(bits)});
}
SNNLSTM_DEVICE unsigned to_bits16(DType type, float x) {
  return type == DType::bfloat16 ? from_float<bf16>(x).bits : from_float<fp16>(x).bits;
}

// Element i of an array.
template <class R>
SNNLSTM_DEVICE R read(const void* array, DType type, int64_t i) {
  if constexpr (sizeof(R) == 8) {
    return static_cast<const double*>(array)[i];
  } else {
    if (type == DType::float32) return static_cast<const float*>(array)[i];
    return from_bits16(type, static_cast<const uint16_t*>(array)[i]);
  }
}
template <class R>
SNNLSTM_DEVICE void write(void* array, DType type, int64_t i, R x) {
  if constexpr (sizeof(R) == 8)
    static_cast<double*>(array)[i] = x;
  else if (type == DType::float32)
    static_cast<float*>(array)[i] = x;
  else
    static_cast<uint16_t*>(array)[i] = uint16_t(to_bits16(type, x));
}

// Returns the value that would be read back after x was stored.
template <class R>
SNNLSTM_DEVICE R rounded(DType type, R x) {
  if constexpr (sizeof(R) == 8)
    return x;
  else
    return type == DType::float32 ? x : from_bits16(type, to_bits16(type, x));
}

// Returns the unit in the last place of a number of `type`: 0 for 0, for subnormal numbers and in
// half types, and infinity for infinity.
template <class R>
SNNLSTM_DEVICE R last_place(DType type, R x) {
  if constexpr (sizeof(R) == 8) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    bits &= uint64_t(0x7ff) << 52;
    std::memcpy(&x, &bits, 8);
    return x * R(0x1p-52);
  } else {
    if (bytes_of(type) == 2) return 0;
    return detail::float_of(detail::bits_of(x) & 0x7f800000u) * R(0x1p-23);
  }
}

// Sets `count` numbers to 0.
template <int count, class R>
SNNLSTM_DEVICE void clear(R* v) {
  unrolled<count>([&](int i) { v[i] = 0; });
}

// What a kernel knows about tensors at compile time: the type of their elements, or AnyType, and
// the narrowest way in which one is accessed.
template <class T, Access narrowest>
struct Known {
  using Type = T;
  static constexpr Access kNarrowest = narrowest;
};
struct AnyType {};
using Unknown = Known<AnyType, Access::scalar>;
// The same for our own images. (nvcc's host code loses a namespace in front of Known.)
template <class Other>
using Ours = Known<typename Other::Type, Access::channels>;

// Calls f(T{}) for the type T of an array's elements: the known one, or what `type` says.
template <class R, class Known = Unknown, class F>
SNNLSTM_DEVICE void with_stored(DType type, F&& f) {
  using T = typename Known::Type;
  if constexpr (!std::is_same_v<T, AnyType>)
    f(T{});
  else if constexpr (sizeof(R) == 8)
    f(double{});
  else if (type == DType::float32)
    f(float{});
  else if (type == DType::bfloat16)
    f(bf16{});
  else
    f(fp16{});
}

// Elements that one access moves, 16 bytes at most.
template <class T, int N>
struct alignas(N * sizeof(T)) Elements {
  T number[N];
};
template <class T, int N>
constexpr int kAtOnce = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);

// Loads N (1, 2 or 4) elements, which are aligned to what one access moves.
template <class T, class R, int N>
SNNLSTM_DEVICE void load_vector(const T* p, R (&v)[N]) {
  constexpr int count = kAtOnce<T, N>;
  unrolled<N / count>([&](int k) {
    const auto part = load<Elements<T, count>>(p + k * count);
    unrolled<count>([&](int i) {
      if constexpr (sizeof(T) == 2)
        v[k * count + i] = to_float(part.number[i]);
      else
        v[k * count + i] = part.number[i];
    });
  });
}
template <class T, class R, int N>
SNNLSTM_DEVICE void store_vector(T* p, const R (&v)[N]) {
  constexpr int count = kAtOnce<T, N>;
  unrolled<N / count>([&](int k) {
    Elements<T, count> part;
    unrolled<count>([&](int i) {
      if constexpr (sizeof(T) == 2)
        part.number[i] = from_float<T>(v[k * count + i]);
      else
        part.number[i] = v[k * count + i];
    });
    store(p + k * count, part);
  });
}

// Loads from element i of an array on.
template <class R, int N>
SNNLSTM_DEVICE void read_vector(const void* array, DType type, int64_t i, R (&v)[N]) {
  with_stored<R>(type,
                 [&](auto of) { load_vector(static_cast<decltype(of) const*>(array) + i, v); });
}

#if defined(__CUDA_ARCH__)
// Double precision makes these long. They are called, because a kernel would inline 24 of them.
__device__ __noinline__ double exp_double(double x) { return exp(x); }
__device__ __noinline__ double tanh_double(double x) { return tanh(x); }
#endif

// The class M that cell.h asks for, for one real number.
template <class Real>
struct Math {
  using R = Real;
  static SNNLSTM_HD R splat(double c) { return R(c); }
  static SNNLSTM_HD R where(bool mask, R a, R b) { return mask ? a : b; }
  static SNNLSTM_HD R abs(R x) { return std::fabs(x); }
#if defined(__CUDA_ARCH__)
  static SNNLSTM_HD R exp(R x) {
    if constexpr (sizeof(R) == 8)
      return exp_double(x);
    else
      return expf(x);
  }
  static SNNLSTM_HD R tanh(R x) {
    if constexpr (sizeof(R) == 8)
      return tanh_double(x);
    else
      return tanhf(x);
  }
  static SNNLSTM_HD R sigmoid(R x) {
    const R below = R(1) + exp(-x);
    if constexpr (sizeof(R) == 8)
      return R(1) / below;
    else
      return __fdividef(1.0f, below);  // 2 ulp; an overflow of exp gives 0, as it should
  }
#else
  static SNNLSTM_HD R exp(R x) { return std::exp(x); }
  static SNNLSTM_HD R tanh(R x) { return std::tanh(x); }
  static SNNLSTM_HD R sigmoid(R x) { return R(1) / (R(1) + std::exp(-x)); }
#endif
};

// A number that is never negative carries a flag in its sign; -0 carries one, too.
template <class R>
SNNLSTM_DEVICE R flagged(R x, bool flag) {
  return std::copysign(x, flag ? R(-1) : R(1));
}
template <class R>
SNNLSTM_DEVICE bool is_flagged(R x) {
  return std::signbit(x);
}

}  // namespace snnlstm::cuda
