// What kernels are written against: inline PTX under nvcc, an emulation (tests/emulator) under g++.
//
// A kernel is ordinary CUDA C++: __global__, threadIdx, __syncthreads(), __syncwarp(),
// __shfl_xor_sync(), float4 and their like exist in both builds. This file adds what
// CUDA C++ has no short name for: the block's dynamic shared memory as one struct, asynchronous
// copies, fragments and tensor core multiply-adds, and accesses to whole vectors. The types fp16,
// bf16 and tf32 are in half.cuh, the seeded faults in fault.cuh, and a checked launch in
// launch.cuh.
//
// A kernel that runs in both builds keeps to these rules:
// - Shared memory is the one struct of shared_memory<T>(), whose size goes into Launch. The struct
//   has no constructor and no initial values. A static __shared__ variable does not compile here.
// - No thread returns before the last barrier or warp collective: threads without work take part.
//   Whole warps run collectives, and the block size is a multiple of 32.
// - All arguments are passed by value (pointers, numbers, plain structs). Kernels read neither
//   __constant__ nor __device__ variables.
// - A block neither waits for another block nor reads what another block of the launch writes.
// - Accesses of 8 and 16 bytes go through load() and store(), not through a cast pointer: g++ would
//   split the copy of a struct, and the emulation counts one access. Accesses of one element are
//   plain `p[i]`.
// - A pointer into one array is neither compared with a pointer into another array nor derived from
//   it: the emulation checks each access against the array that the address lies in.
// - fault() marks the places at which the tests can break a kernel.
// - `if constexpr (arch::has_mma)` tells architectures apart: on sm_75 a kernel that multiplies on
//   tensor cores, or copies by cp.async, traps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// In the emulation a collective knows where it was called, for the reports.
#define SNNLSTM_SITE
#else
#include "simt.h"
#define SNNLSTM_SITE , ::simt::Site site = ::simt::Site::here()
#endif

#include "fault.cuh"
#include "half.cuh"

namespace snnlstm::cuda {

constexpr unsigned full_warp = 0xffffffffu;

namespace arch {
#if !defined(__CUDA_ARCH__)
constexpr bool has_mma = true;
#else
constexpr bool has_mma = __CUDA_ARCH__ >= 800;
#endif
}  // namespace arch

// Ends a kernel for which the architecture has no instructions. An empty kernel would succeed, and
// leave the results as they were.
SNNLSTM_DEVICE void trap_without_mma() {
#if defined(__CUDA_ARCH__)
  __trap();
#endif
}

// The block's dynamic shared memory, 128-byte aligned; the emulation poisons it at the start.
template <class T>
SNNLSTM_DEVICE T& shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char snnlstm_shared[];
  return *reinterpret_cast<T*>(snnlstm_shared);
#else
  return *static_cast<T*>(::simt::shared_memory(sizeof(T)));
#endif
}

// Calls f(i) for each i < N, or f(i, j) for each j < M in turn, with the loops unrolled.
template <int N, class F>
SNNLSTM_DEVICE void unrolled(F&& f) {
#pragma unroll
  for (int i = 0; i < N; ++i) f(i);
}
template <int N, int M, class F>
SNNLSTM_DEVICE void unrolled(F&& f) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < M; ++j) f(i, j);
}

// ---- asynchronous copies -----------------------------------------------------------------------

// Copies 16 bytes from global to shared memory, bypassing L1; both addresses are aligned to 16
// bytes. If `real` is false, the target becomes zero and the source is not touched. The calling
// thread sees the data after cp_async_wait(), other threads after a barrier that follows it.
SNNLSTM_DEVICE void cp_async(void* shared, const void* global, bool real = true) {
#if !defined(__CUDACC__)
  ::simt::cp_async(shared, global, real);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto target = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
               "r"(real ? 16 : 0)
               : "memory");
#else
  trap_without_mma();
#endif
}

// Closes the group of this thread's copies since the last commit.
SNNLSTM_DEVICE void cp_async_commit() {
#if !defined(__CUDACC__)
  ::simt::cp_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Pending of this thread's latest groups are still under way.
template <int Pending>
SNNLSTM_DEVICE void cp_async_wait() {
#if !defined(__CUDACC__)
  ::simt::cp_async_wait(Pending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- fragments ---------------------------------------------------------------------------------

// Loads 4 tiles of 8 rows x 8 elements of 16 bits. Lane l passes the address of row l % 8 of
// tile l / 8, 16-byte aligned. Register i receives from tile i the elements [lane / 4][2 * (lane %
// 4)] (bits 0 to 15) and [..][.. + 1]. All 32 lanes take part.
//
// ldmatrix_transposed: the same with each tile transposed, so that register i receives
// [2 * (lane % 4)][lane / 4] and [2 * (lane % 4) + 1][lane / 4].
#if defined(__CUDACC__)
#define SNNLSTM_LDMATRIX(name, transpose)                                                        \
  SNNLSTM_DEVICE void name(uint32_t (&r)[4], const void* row) {                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" transpose ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                \
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))                                  \
                 : "memory");                                                                    \
  }
SNNLSTM_LDMATRIX(ldmatrix, "")
SNNLSTM_LDMATRIX(ldmatrix_transposed, ".trans")
#undef SNNLSTM_LDMATRIX
#else
inline void ldmatrix(uint32_t (&r)[4], const void* row SNNLSTM_SITE) {
  ::simt::ldmatrix(r, row, false, site);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row SNNLSTM_SITE) {
  ::simt::ldmatrix(r, row, true, site);
}
#endif

// mma<T>(d, a, b): d += a * b on the tensor cores, a 16 x K and b K x 8, d 16 x 8 in float.
// A lane with g = lane / 4 and t = lane % 4 holds
//   d[0], d[1]   (g, 2t), (g, 2t + 1)          d[2], d[3]   (g + 8, 2t), (g + 8, 2t + 1)
// fp16, bf16, K = 16; pairs (k, k + 1) in one register, k in bits 0 to 15
//   a[0] (g, 2t)   a[1] (g + 8, 2t)   a[2] (g, 2t + 8)   a[3] (g + 8, 2t + 8)
//   b[0] (2t, g)   b[1] (2t + 8, g)
// tf32, K = 8
//   a[0] (g, t)    a[1] (g + 8, t)    a[2] (g, t + 4)    a[3] (g + 8, t + 4)
//   b[0] (t, g)    b[1] (t + 4, g)
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".
template <class T>
SNNLSTM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4],
                        const uint32_t (&b)[2] SNNLSTM_SITE) {
  [[maybe_unused]] constexpr bool is_fp16 = std::is_same_v<T, fp16>,
                                  is_bf16 = std::is_same_v<T, bf16>;
#if !defined(__CUDACC__)
  using Type = ::simt::MmaType;
  ::simt::mma(is_fp16 ? Type::fp16 : is_bf16 ? Type::bf16 : Type::tf32, d, a, b, site);
#else
#define SNNLSTM_MMA(shape_and_types)                                              \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (!arch::has_mma)
    trap_without_mma();  // a launcher has chosen the wrong kernel
  else if constexpr (is_fp16)
    SNNLSTM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else if constexpr (is_bf16)
    SNNLSTM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    SNNLSTM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef SNNLSTM_MMA
#endif
}

// ---- vectors -----------------------------------------------------------------------------------

// One access of sizeof(V) bytes, at most 16, to global or shared memory. V and p are aligned to it.
template <class V>
SNNLSTM_DEVICE V load(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const V*>(p);
#else
  V v;
  ::simt::load(&v, p, sizeof(V));
  return v;
#endif
}

template <class V>
SNNLSTM_DEVICE void store(void* p, V v) {
#if defined(__CUDACC__)
  *static_cast<V*>(p) = v;
#else
  ::simt::store(p, &v, sizeof(V));
#endif
}

}  // namespace snnlstm::cuda
