// The part of CUDA C++ that kernels use, for g++: one host thread plays a whole grid.
// csrc/cuda/primitives.cuh includes this file where there is no nvcc. The emulator behind it is in
// the other files of this directory; machine.h is its inside.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SIMT_VECTORS(T, name)                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }            \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(unsigned char, uchar)
SIMT_VECTORS(unsigned short, ushort)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
#undef SIMT_VECTORS

// Of the thread that is running. Not const: they change under the compiler's feet at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Where in the source a barrier or a collective was called.
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
enum class Shuffle : int { index, up, down, exclusive_or };
enum class Vote : int { ballot, any, all };

void* shared_memory(size_t bytes);
void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site);
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Site site);
void load(void* value, const void* p, size_t bytes);
void store(void* p, const void* value, size_t bytes);
void barrier(Site site);
void sync_warp(unsigned mask, Site site);
uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int lane, int width, Site site);
unsigned vote(Vote mode, unsigned mask, bool predicate, Site site);
unsigned active_mask();
void fence();
// The two halves of an atomic change of the element at p.
uint64_t begin_atomic(void* p, size_t bytes);
void end_atomic(void* p, uint64_t value, size_t bytes);

template <class T>
__forceinline__ T shuffle_value(Shuffle mode, unsigned mask, T value, int lane, int width,
                                Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mode, mask, bits, lane, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Both in the emulator, out of reach of the compiler's instrumentation.
template <class T, class Next>
__forceinline__ T change(T* p, Next&& next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 4 or 8 bytes");
  const uint64_t before = begin_atomic(p, sizeof(T));
  T old;
  std::memcpy(&old, &before, sizeof(T));
  const T value = next(old);
  uint64_t after = 0;
  std::memcpy(&after, &value, sizeof(T));
  end_atomic(p, after, sizeof(T));
  return old;
}

// A parameter that takes no part in deducing T, so that atomicAdd(float*, 1) works as in CUDA.
template <class T>
struct Same {
  using type = T;
};

}  // namespace simt

#define SIMT_SITE ::simt::Site site = ::simt::Site::here()

__forceinline__ void __syncthreads(SIMT_SITE) { ::simt::barrier(site); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  ::simt::sync_warp(mask, site);
}
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::index, mask, v, lane, width, site);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::up, mask, v, int(delta), width, site);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::down, mask, v, int(delta), width, site);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::exclusive_or, mask, v, lanes, width, site);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return ::simt::vote(::simt::Vote::ballot, mask, predicate != 0, site);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return int(::simt::vote(::simt::Vote::any, mask, predicate != 0, site));
}
__forceinline__ int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return int(::simt::vote(::simt::Vote::all, mask, predicate != 0, site));
}
__forceinline__ unsigned __activemask() { return ::simt::active_mask(); }
__forceinline__ void __threadfence() { ::simt::fence(); }
__forceinline__ void __threadfence_block() { ::simt::fence(); }

template <class T>
__forceinline__ T atomicAdd(T* p, typename ::simt::Same<T>::type v) {
  return ::simt::change(p, [v](T old) { return T(old + v); });
}
template <class T>
__forceinline__ T atomicMax(T* p, typename ::simt::Same<T>::type v) {
  return ::simt::change(p, [v](T old) { return old < v ? v : old; });
}
template <class T>
__forceinline__ T atomicMin(T* p, typename ::simt::Same<T>::type v) {
  return ::simt::change(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
__forceinline__ T atomicExch(T* p, typename ::simt::Same<T>::type v) {
  return ::simt::change(p, [v](T) { return v; });
}
template <class T>
__forceinline__ T atomicCAS(T* p, typename ::simt::Same<T>::type compare,
                            typename ::simt::Same<T>::type v) {
  return ::simt::change(p, [compare, v](T old) { return old == compare ? v : old; });
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  T v;
  ::simt::load(&v, p, sizeof(T));
  return v;
}

__forceinline__ unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
__forceinline__ float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
__forceinline__ int __float_as_int(float x) { return int(__float_as_uint(x)); }
__forceinline__ float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
__forceinline__ float __expf(float x) { return std::exp(x); }
__forceinline__ float __logf(float x) { return std::log(x); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
__forceinline__ float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

#define SIMT_MIN_MAX(T)                                     \
  __forceinline__ T min(T a, T b) { return b < a ? b : a; } \
  __forceinline__ T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
__forceinline__ float min(float a, float b) { return std::fmin(a, b); }
__forceinline__ float max(float a, float b) { return std::fmax(a, b); }
__forceinline__ double min(double a, double b) { return std::fmin(a, b); }
__forceinline__ double max(double a, double b) { return std::fmax(a, b); }
