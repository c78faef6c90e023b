// Accesses that nothing orders: within a warp, within a block, between blocks.
#include "violation.h"

using namespace snnlstm::cuda;
using namespace violation;

namespace {

// ---- within a block -----------------------------------------------------------------------------

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
  uint32_t r[4];
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

// Elements that share a word of four bytes do not conflict.
__global__ void halves_of_a_word(Data d) {
  auto* half = reinterpret_cast<uint16_t*>(shared_memory<Shared>().a);
  const int i = int(threadIdx.x);
  const int own = 2 * (i % 32) + i / 32;  // neighbours belong to different warps
  half[own] = uint16_t(i);
  d.out[i] = half[d.bad ? own ^ 1 : own];
}

__global__ void bytes_of_a_word(Data d) {
  auto* byte = reinterpret_cast<unsigned char*>(shared_memory<Shared>().a);
  const int i = int(threadIdx.x);
  byte[i] = 1;
  if (!d.bad) __syncthreads();
  d.out[i] = float(reinterpret_cast<const unsigned*>(byte)[i / 4]);
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

const Case cases[] = {
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
    CASE(halves_of_a_word),
    CASE(bytes_of_a_word),
    CASE_OF_TWO(blocks_write),
    CASE_OF_TWO(blocks_read),
    CASE_OF_TWO(atomic_and_plain),
    CASE_OF_TWO(last_block_without_fence),
};

}  // namespace

bool violation::run_race(const std::string& name, const Data& data) {
  return run(cases, name, data);
}
