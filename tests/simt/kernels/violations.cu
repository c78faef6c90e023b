// What no kernel may do: divergence, and accesses beside an array. The tests see that the bad form
// is reported and the innocent one is not.
#include "violation.h"

using namespace snnlstm::cuda;
using namespace violation;

namespace {

int static_variable = 0;

// ---- barriers and collectives -------------------------------------------------------------------

__global__ void divergent_barriers(Data d) {
  if (threadIdx.x < 32 || !d.bad) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  d.out[threadIdx.x] = 1;
}

__global__ void return_before_barrier(Data d) {
  if (d.bad && threadIdx.x == 5) return;
  __syncthreads();
  d.out[threadIdx.x] = 1;
}

__global__ void uneven_loop(Data d) {
  const int trips = d.bad && threadIdx.x >= 32 ? 3 : 2;
  for (int i = 0; i < trips; ++i) __syncthreads();
  d.out[threadIdx.x] = 1;
}

__global__ void barrier_in_one_warp(Data d) {
  if (!d.bad || threadIdx.x < 32) __syncthreads();
  d.out[threadIdx.x] = float(__shfl_xor_sync(full_warp, int(threadIdx.x), 1));
  if (d.bad && threadIdx.x >= 32) __syncthreads();
}

__global__ void barrier_against_shuffle(Data d) {
  const bool odd = d.bad && threadIdx.x == 3;
  if (!odd) d.out[threadIdx.x] = float(__shfl_xor_sync(full_warp, int(threadIdx.x), 1));
  __syncthreads();
}

__global__ void mask_without_self(Data d) {
  const unsigned mask = d.bad && threadIdx.x == 7 ? ~(1u << 7) : full_warp;
  __syncwarp(mask);
  d.out[threadIdx.x] = 1;
}

__global__ void masks_differ(Data d) {
  const bool upper = threadIdx.x % 32 >= 16;
  const unsigned lower_mask = d.bad ? full_warp : 0x0000ffffu;
  __syncwarp(upper ? 0xffff0000u : lower_mask);
  d.out[threadIdx.x] = 1;
}

__global__ void places_differ(Data d) {
  int v = int(threadIdx.x);
  if (threadIdx.x % 32 < 16 || !d.bad) {
    v = __shfl_xor_sync(full_warp, v, 1);
  } else {
    v = __shfl_xor_sync(full_warp, v, 1);
  }
  d.out[threadIdx.x] = float(v);
}

__global__ void lane_has_returned(Data d) {
  const int lane = int(threadIdx.x) % 32;
  if (lane == 31) return;
  __syncwarp(d.bad ? full_warp : 0x7fffffffu);
  d.out[threadIdx.x] = 1;
}

__global__ void shuffle_from_outside_mask(Data d) {
  const int lane = int(threadIdx.x) % 32;
  if (lane < 16) {
    const int from = d.bad ? 16 : 15;
    d.out[threadIdx.x] = float(__shfl_sync(0x0000ffffu, lane, from));
  }
}

__global__ void width_of_three(Data d) {
  d.out[threadIdx.x] = float(__shfl_xor_sync(full_warp, int(threadIdx.x), 1, d.bad ? 3 : 4));
}

__global__ void active_mask(Data d) { d.out[threadIdx.x] = d.bad ? float(__activemask()) : 1.0f; }

// ---- bounds -------------------------------------------------------------------------------------

__global__ void shared_index(Data d) {
  auto& s = shared_memory<Shared>();
  s.a[threadIdx.x] = 1;
  s.b[threadIdx.x] = 2;
  __syncthreads();
  d.out[threadIdx.x] = s.a[threadIdx.x + (d.bad ? 1 : 0)];
}

__global__ void shared_pointer(Data d) {
  float* all = reinterpret_cast<float*>(&shared_memory<Shared>());
  const int end = int(sizeof(Shared) / sizeof(float));
  all[end - 64 + int(threadIdx.x) + (d.bad ? 1 : 0)] = 1;
  d.out[threadIdx.x] = 1;
}

__global__ void read_behind(Data d) { d.out[threadIdx.x] = d.in[threadIdx.x + (d.bad ? 1 : 0)]; }

__global__ void write_before(Data d) { d.out[int(threadIdx.x) - (d.bad ? 1 : 0)] = 1; }

__global__ void vector_behind(Data d) {
  if (threadIdx.x < 16) {
    const int i = 4 * int(threadIdx.x) + (d.bad ? 4 : 0);
    d.out[threadIdx.x] = load<float4>(d.in + i).w;
  }
}

__global__ void copy_from_behind(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async<4>(&s.a[i], d.in + i + (d.bad ? 1 : 0));
  cp_async_commit();
  cp_async_wait<0>();
  d.out[i] = s.a[i];
}

__global__ void write_input(Data d) {
  float* to = d.bad ? const_cast<float*>(d.in) : d.out;
  to[threadIdx.x] = 1;
}

__global__ void write_static(Data d) {
  if (d.bad) static_variable = 1;
  d.out[threadIdx.x] = float(static_variable);
}

__global__ void misaligned_vector(Data d) {
  if (threadIdx.x < 8) d.out[threadIdx.x] = load<float2>(d.in + 2 * threadIdx.x + d.bad).x;
}

__global__ void misaligned_copy(Data d) {
  auto& s = shared_memory<Shared>();
  if (threadIdx.x < 8) {
    cp_async<16>(&s.b[4 * threadIdx.x + d.bad], d.in + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
  }
}

__global__ void misaligned_rows(Data d) {
  auto& s = shared_memory<Shared>();
  s.a[threadIdx.x] = 0;
  s.b[threadIdx.x] = 0;
  __syncthreads();
  uint32_t r[4];
  ldmatrix(r, reinterpret_cast<const char*>(&s.b[0]) + 16 * (threadIdx.x % 8) + 4 * d.bad);
  d.out[threadIdx.x] = float(r[0]);
}

__global__ void copy_to_register(Data d) {
  auto& s = shared_memory<Shared>();
  float local = 0;
  cp_async<4>(d.bad ? &local : &s.a[threadIdx.x], d.in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  d.out[threadIdx.x] = local;
}

__global__ void overflow(Data d) {
  int big = 0x7fffff00 + int(threadIdx.x);
  if (d.bad) big += 0x100;
  d.out[threadIdx.x] = float(big);
}

__global__ void nothing(Data) {}

const Case cases[] = {
    CASE(divergent_barriers),
    CASE(return_before_barrier),
    CASE(uneven_loop),
    CASE(barrier_in_one_warp),
    CASE(barrier_against_shuffle),
    CASE(mask_without_self),
    CASE(masks_differ),
    CASE(places_differ),
    CASE(lane_has_returned),
    CASE(shuffle_from_outside_mask),
    CASE(width_of_three),
    CASE(active_mask),
    CASE(shared_index),
    CASE(shared_pointer),
    CASE(read_behind),
    CASE(write_before),
    CASE(vector_behind),
    CASE(copy_from_behind),
    CASE(write_input),
    CASE(write_static),
    CASE(misaligned_vector),
    CASE(misaligned_copy),
    CASE(misaligned_rows),
    CASE(copy_to_register),
    CASE(overflow),
};

}  // namespace

ENTRY violate(const char* name, int bad, const float* in, float* out, unsigned* counter) {
  return guarded([&] {
    const Data data{in, out, counter, bad};
    if (run(cases, name, data) || run_race(name, data)) return;
    throw std::runtime_error(std::string("there is no case ") + name);
  });
}

ENTRY launch_nothing(int blocks, int block_y, int threads, int shared_bytes) {
  return guarded([&] {
    launch(Launch{"nothing", dim3(blocks, block_y), threads, size_t(shared_bytes)}, nothing,
           Data{});
  });
}
