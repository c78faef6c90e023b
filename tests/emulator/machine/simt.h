// The part of CUDA C++ that kernels use, for g++. One host thread runs a whole grid; collectives
// are of whole warps. csrc/cuda/kernels/primitives.cuh includes this file if the compiler is not nvcc. The
// other files of this directory are the emulator behind it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t count() const { return uint64_t(x) * y * z; }
};

#define SIMT_VECTORS(T, name)                                         \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                  \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };            \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; } \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(float, float)
#undef SIMT_VECTORS

// The running thread's; every switch of threads changes them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

// The place in the source where a barrier or a collective was called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Geometry {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  const char* file;
  int line;
};

// Runs `body` once per thread of the grid. Throws std::runtime_error with what went wrong.
void run(const Geometry& geometry, void (*body)(void*), void* context);

template <class Body>
void run(const Geometry& geometry, Body& body) {
  run(geometry, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

enum class MmaType : int { fp16, bf16, tf32 };
constexpr unsigned warp_size = 32, all_lanes = 0xffffffffu;

void* shared_memory(size_t bytes);
void cp_async(void* shared, const void* global, bool real);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site);
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Site site);
void load(void* value, const void* p, size_t bytes);
void store(void* p, const void* value, size_t bytes);
void barrier(Site site);
void sync_warp(Site site);
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site);

// ---- cvt of fp16 ----

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint16_t fp16_of_float(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (a < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which one float addition rounds to
    const uint32_t scaled = bits_of(float_of(a) + 0.5f);
    return uint16_t(sign | (scaled - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13));
}

// The exponent, moved to a float's place, is too small by 112, and infinity's is the largest.
inline float float_of_fp16(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude < (0x7c00u << 13) ? scaled : magnitude | 0x7f800000u));
}
}  // namespace simt

#define SIMT_SITE ::simt::Site site = ::simt::Site::here()

__forceinline__ void __syncthreads(SIMT_SITE) { ::simt::barrier(site); }
__forceinline__ void __syncwarp(SIMT_SITE) { ::simt::sync_warp(site); }
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T v, int lanes, SIMT_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = ::simt::shuffle_xor(mask, bits, lanes, site);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
__forceinline__ int min(int a, int b) { return b < a ? b : a; }
