// Divergence, and accesses beside an array. The bad form of a kernel must be reported, the innocent
// form must not.
#include "case.h"

using namespace snnlstm::cuda;

namespace {

constexpr int kThreads = 64;

struct Shared {
  float a[64];
  alignas(16) float b[64];
};

int static_variable = 0;

// ---- barriers and collectives -------------------------------------------------------------------

CASE(divergent_barriers) {
  if (threadIdx.x < 32 || !d.bad)
    __syncthreads();
  else
    __syncthreads();
  d.out[threadIdx.x] = 1;
}

CASE(return_before_barrier) {
  if (d.bad && threadIdx.x == 5) return;
  __syncthreads();
  d.out[threadIdx.x] = 1;
}

CASE(barrier_in_one_warp) {
  if (!d.bad || threadIdx.x < 32) __syncthreads();
  d.out[threadIdx.x] = float(__shfl_xor_sync(full_warp, int(threadIdx.x), 1));
  if (d.bad && threadIdx.x >= 32) __syncthreads();
}

CASE(barrier_against_shuffle) {
  const bool odd = d.bad && threadIdx.x == 3;
  if (!odd) d.out[threadIdx.x] = float(__shfl_xor_sync(full_warp, int(threadIdx.x), 1));
  __syncthreads();
}

CASE(places_differ) {
  int v = int(threadIdx.x);
  if (threadIdx.x % 32 < 16 || !d.bad)
    v = __shfl_xor_sync(full_warp, v, 1);
  else
    v = __shfl_xor_sync(full_warp, v, 1);
  d.out[threadIdx.x] = float(v);
}

CASE(lane_has_returned) {
  if (d.bad && threadIdx.x % 32 == 31) return;
  __syncwarp();
  d.out[threadIdx.x] = 1;
}

CASE(part_of_a_warp) {
  const unsigned mask = d.bad ? 0x0000ffffu : full_warp;
  d.out[threadIdx.x] = float(__shfl_xor_sync(mask, int(threadIdx.x), 1));
}

// ---- bounds -------------------------------------------------------------------------------------

CASE(shared_index) {
  auto& s = shared_memory<Shared>();
  s.a[threadIdx.x] = 1;
  s.b[threadIdx.x] = 2;
  __syncthreads();
  d.out[threadIdx.x] = s.a[threadIdx.x + (d.bad ? 1 : 0)];
}

CASE(shared_pointer) {
  float* all = reinterpret_cast<float*>(&shared_memory<Shared>());
  const int end = int(sizeof(Shared) / sizeof(float));
  all[end - 64 + int(threadIdx.x) + (d.bad ? 1 : 0)] = 1;
  d.out[threadIdx.x] = 1;
}

CASE(vector_behind) {
  if (threadIdx.x < 16) {
    const int i = 4 * int(threadIdx.x) + (d.bad ? 4 : 0);
    d.out[threadIdx.x] = load<float4>(d.in + i).w;
  }
}

CASE(copy_from_behind) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  if (i < 16) {
    cp_async(&s.b[4 * i], d.in + 4 * (i + d.bad));
    cp_async_commit();
    cp_async_wait<0>();
    d.out[i] = s.b[4 * i];
  }
}

CASE(write_input) {
  float* to = d.bad ? const_cast<float*>(d.in) : d.out;
  to[threadIdx.x] = 1;
}

CASE(write_static) {
  if (d.bad) static_variable = 1;
  d.out[threadIdx.x] = float(static_variable);
}

CASE(misaligned_copy) {
  auto& s = shared_memory<Shared>();
  if (threadIdx.x < 8) {
    cp_async(&s.b[4 * threadIdx.x + d.bad], d.in + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
  }
}

CASE(misaligned_rows) {
  auto& s = shared_memory<Shared>();
  s.a[threadIdx.x] = 0;
  s.b[threadIdx.x] = 0;
  __syncthreads();
  uint32_t r[4];
  ldmatrix(r, reinterpret_cast<const char*>(&s.b[0]) + 16 * (threadIdx.x % 8) + 4 * d.bad);
  d.out[threadIdx.x] = float(r[0]);
}

CASE(copy_to_register) {
  auto& s = shared_memory<Shared>();
  alignas(16) float local[4] = {};
  if (threadIdx.x < 16) {
    cp_async(d.bad ? local : &s.b[4 * threadIdx.x], d.in + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    d.out[threadIdx.x] = local[0];
  }
}

CASE(overflow) {
  int big = 0x7fffff00 + int(threadIdx.x);
  if (d.bad) big += 0x100;
  d.out[threadIdx.x] = float(big);
}

__global__ void nothing(Data) {}

}  // namespace

ENTRY run_case(const char* name, int bad, const float* in, float* out) {
  return guarded([&] {
    const Case& c = cases.at(name);
    const Launch how{cases.find(name)->first.c_str(), c.blocks, c.threads, c.shared_bytes};
    launch(how, c.kernel, Data{in, out, bad});
  });
}

ENTRY launch_nothing(int blocks, int block_y, int threads, int shared_bytes) {
  return guarded([&] {
    launch(Launch{"nothing", dim3(blocks, block_y), threads, size_t(shared_bytes)}, nothing,
           Data{});
  });
}
