// One small sin per case, each with the innocent form beside it (bad == 0): the tests see that the
// first is reported and the second is not. 64 threads a block.
#include "entry.h"
#include "primitives.cuh"

using namespace snnlstm::cuda;

namespace {

struct Shared {
  float a[64];
  alignas(16) float b[64];
  alignas(16) float tiles[2][8][4];
};

struct Data {
  const float* in;  // 64 floats, registered read-only
  float* out;       // 64 floats, registered writable
  unsigned* counter;
  int bad;
};

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
  uint32_t r[1];
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

// ---- order --------------------------------------------------------------------------------------

__global__ void read_before_wait(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async<4>(&s.a[i], d.in + i);
  cp_async_commit();
  if (!d.bad) cp_async_wait<0>();
  d.out[i] = s.a[i];
  cp_async_wait<0>();
}

__global__ void wait_for_too_little(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async<4>(&s.a[i], d.in + i);
  cp_async_commit();
  cp_async<4>(&s.b[i], d.in + i);
  cp_async_commit();
  cp_async_wait<1>();
  d.out[i] = d.bad ? s.b[i] : s.a[i];
  cp_async_wait<0>();
}

__global__ void wait_without_commit(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async<4>(&s.a[i], d.in + i);
  if (!d.bad) cp_async_commit();
  cp_async_wait<0>();
  d.out[i] = s.a[i];
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void return_with_copies(Data d) {
  auto& s = shared_memory<Shared>();
  cp_async<4>(&s.a[threadIdx.x], d.in + threadIdx.x);
  cp_async_commit();
  if (!d.bad) cp_async_wait<0>();
}

__global__ void wait_without_barrier(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async<4>(&s.a[i], d.in + i);
  cp_async_commit();
  cp_async_wait<0>();
  if (!d.bad) __syncthreads();
  d.out[i] = s.a[63 - i];
}

__global__ void read_before_write(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(i);
  if (!d.bad) __syncthreads();
  d.out[i] = s.a[(i + 32) % 64];
}

__global__ void overwrite_before_read(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(i);
  __syncthreads();
  const float x = s.a[(i + 32) % 64];
  if (!d.bad) __syncthreads();
  s.a[i] = x + 1;
  d.out[i] = s.a[i];
}

__global__ void lanes_without_syncwarp(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(i);
  if (!d.bad) __syncwarp();
  d.out[i] = s.a[i ^ 1];
}

__global__ void syncwarp_of_others(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x), lane = i % 32;
  s.a[i] = float(i);
  // Half warps: the exchange must stay within them.
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  d.out[i] = s.a[i ^ (d.bad ? 16 : 8)];
}

__global__ void shuffle_is_no_fence(Data d) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(__shfl_xor_sync(full_warp, i, 1));
  const int other = __shfl_xor_sync(full_warp, i, 2);
  if (!d.bad) __syncwarp();
  d.out[i] = s.a[other];
}

__global__ void rows_without_syncwarp(Data d) {
  auto& s = shared_memory<Shared>();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  s.tiles[warp][7 - lane / 4][lane % 4] = float(lane);
  if (!d.bad) __syncwarp();
  uint32_t r[1];
  ldmatrix(r, &s.tiles[warp][lane % 8][0]);
  d.out[threadIdx.x] = __uint_as_float(r[0]);
}

__global__ void never_written(Data d) {
  auto& s = shared_memory<Shared>();
  if (!d.bad || threadIdx.x != 9) s.a[threadIdx.x] = 1;
  __syncthreads();
  d.out[threadIdx.x] = s.a[threadIdx.x];
}

__global__ void same_element(Data d) {
  if (threadIdx.x % 32 == 0) d.out[d.bad ? 0 : threadIdx.x] = float(threadIdx.x);
}

// ---- between blocks (two of them) ---------------------------------------------------------------

__global__ void blocks_write(Data d) {
  if (threadIdx.x < 32) d.out[d.bad ? threadIdx.x : 32 * blockIdx.x + threadIdx.x] = 1;
}

__global__ void blocks_read(Data d) {
  const int i = int(threadIdx.x);
  if (i >= 32) return;
  const int own = 32 * int(blockIdx.x) + i, other = 32 * int(1 - blockIdx.x) + i;
  const float x = d.out[d.bad ? other : own];
  d.out[own] = x + 1;
}

__global__ void atomic_and_plain(Data d) {
  if (threadIdx.x == 0) {
    atomicAdd(&d.out[0], 1.0f);
    if (d.bad) d.out[1] = d.out[0];
  }
}

__global__ void last_block_without_fence(Data d) {
  if (threadIdx.x != 0) return;
  d.out[blockIdx.x] = float(blockIdx.x + 1);
  if (!d.bad) __threadfence();
  if (atomicAdd(d.counter, 1u) == gridDim.x - 1) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += d.out[b];
    d.out[63] = sum;
  }
}

__global__ void nothing(Data) {}

struct Case {
  const char* name;
  void (*kernel)(Data);
  int blocks;
};

#define CASE(name) {#name, name, 1}
#define CASE_OF_TWO(name) {#name, name, 2}
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
    CASE(read_before_wait),
    CASE(wait_for_too_little),
    CASE(wait_without_commit),
    CASE(return_with_copies),
    CASE(wait_without_barrier),
    CASE(read_before_write),
    CASE(overwrite_before_read),
    CASE(lanes_without_syncwarp),
    CASE(syncwarp_of_others),
    CASE(shuffle_is_no_fence),
    CASE(rows_without_syncwarp),
    CASE(never_written),
    CASE(same_element),
    CASE_OF_TWO(blocks_write),
    CASE_OF_TWO(blocks_read),
    CASE_OF_TWO(atomic_and_plain),
    CASE_OF_TWO(last_block_without_fence),
};

}  // namespace

ENTRY violate(const char* name, int bad, const float* in, float* out, unsigned* counter) {
  return guarded([&] {
    for (const Case& c : cases) {
      if (std::string(c.name) != name) continue;
      launch(Launch{c.name, c.blocks, 64, sizeof(Shared)}, c.kernel, Data{in, out, counter, bad});
      return;
    }
    throw std::runtime_error(std::string("there is no case ") + name);
  });
}

ENTRY launch_nothing(int blocks, int block_y, int threads, int shared_bytes) {
  return guarded([&] {
    launch(Launch{"nothing", dim3(blocks, block_y), threads, size_t(shared_bytes)}, nothing,
           Data{});
  });
}
