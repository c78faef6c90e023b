// Accesses that nothing orders: within a warp, within a block, between blocks.
#include "case.h"

using namespace snnlstm::cuda;

namespace {

constexpr int kThreads = 64;

struct Shared {
  float a[64];
  alignas(16) float copied[64][4], copied_later[64][4];  // of each thread
};

// ---- within a block -----------------------------------------------------------------------------

// Without a commit of its own the first copy belongs to the second group.
CASE(wait_for_too_little) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  cp_async(s.copied[i], d.in + i / 4 * 4);
  if (!d.bad) cp_async_commit();
  cp_async(s.copied_later[i], d.in + i / 4 * 4);
  cp_async_commit();
  cp_async_wait<1>();
  d.out[i] = s.copied[i][0];
  cp_async_wait<0>();
}

CASE(return_with_copies) {
  auto& s = shared_memory<Shared>();
  cp_async(s.copied[threadIdx.x], d.in);
  cp_async_commit();
  if (!d.bad) cp_async_wait<0>();
}

CASE(overwrite_before_read) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(i);
  __syncthreads();
  const float x = s.a[(i + 32) % 64];
  if (!d.bad) __syncthreads();
  s.a[i] = x + 1;
  d.out[i] = s.a[i];
}

CASE(shuffle_is_no_fence) {
  auto& s = shared_memory<Shared>();
  const int i = int(threadIdx.x);
  s.a[i] = float(__shfl_xor_sync(full_warp, i, 1));
  const int other = __shfl_xor_sync(full_warp, i, 2);
  if (!d.bad) __syncwarp();
  d.out[i] = s.a[other];
}

CASE(same_element) {
  if (threadIdx.x % 32 == 0) d.out[d.bad ? 0 : threadIdx.x] = float(threadIdx.x);
}

CASE(bytes_of_a_word) {
  auto* byte = reinterpret_cast<unsigned char*>(shared_memory<Shared>().a);
  const int i = int(threadIdx.x);
  byte[i] = 1;
  if (!d.bad) __syncthreads();
  d.out[i] = float(reinterpret_cast<const unsigned*>(byte)[i / 4]);
}

// ---- between blocks (two of them) ---------------------------------------------------------------

CASES(blocks_write, 2) {
  if (threadIdx.x < 32) d.out[d.bad ? threadIdx.x : 32 * blockIdx.x + threadIdx.x] = 1;
}

CASES(blocks_read, 2) {
  const int i = int(threadIdx.x);
  if (i >= 32) return;
  const int own = 32 * int(blockIdx.x) + i, other = 32 * int(1 - blockIdx.x) + i;
  const float x = d.out[d.bad ? other : own];
  d.out[own] = x + 1;
}

}  // namespace
