// Access patterns of one warp, whose cost is known.
#include "case.h"

using namespace snnlstm::cuda;

namespace {

constexpr int kThreads = 32;

struct Shared {
  alignas(128) float a[32][32];
  float padded[32][33];
  alignas(16) uint16_t narrow[32][32], wide[32][40];  // rows of 64 and 80 bytes
};

__device__ Shared& shared() { return shared_memory<Shared>(); }

__device__ float fill() {
  auto& s = shared();
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 32; ++i) {
    s.a[i][lane] = s.padded[i][lane] = 0;
    s.narrow[i][lane] = s.wide[i][lane] = 0;
  }
  __syncwarp();
  return 0;
}

// ---- global -------------------------------------------------------------------------------------

CASE(neighbours) { d.out[threadIdx.x] = d.in[threadIdx.x]; }
CASE(shifted) { d.out[threadIdx.x] = d.in[threadIdx.x + 1]; }
CASE(every_other) { d.out[threadIdx.x] = d.in[2 * threadIdx.x]; }
CASE(every_eighth) { d.out[threadIdx.x] = d.in[8 * threadIdx.x]; }
CASE(same_for_all) { d.out[threadIdx.x] = d.in[0]; }
CASE(vectors) { store(d.out + 4 * threadIdx.x, load<float4>(d.in + 4 * threadIdx.x)); }
CASE(some_lanes) {
  if (threadIdx.x % 2 == 0) d.out[threadIdx.x] = d.in[threadIdx.x];
}
CASE(again) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += load<float>(d.in + threadIdx.x);
  d.out[threadIdx.x] = sum;
}
// Lanes skip a turn of the loop, which must not shift the others' requests.
CASE(uneven) {
  float sum = 0;
  for (int i = 0; i < 8; ++i) {
    if (int(threadIdx.x) % 8 != i) sum += load<float>(d.in + 32 * i + threadIdx.x);
    __syncwarp();
  }
  d.out[threadIdx.x] = sum;
}

// ---- shared -------------------------------------------------------------------------------------

CASE(rows) { d.out[threadIdx.x] = fill() + shared().a[3][threadIdx.x]; }
CASE(columns) { d.out[threadIdx.x] = fill() + shared().a[threadIdx.x][3]; }
CASE(padded_columns) { d.out[threadIdx.x] = fill() + shared().padded[threadIdx.x][3]; }
CASE(two_way) { d.out[threadIdx.x] = fill() + shared().a[threadIdx.x / 16][2 * threadIdx.x % 32]; }
CASE(broadcast) { d.out[threadIdx.x] = fill() + shared().a[3][3]; }
CASE(shared_vectors) {
  d.out[threadIdx.x] = fill() + load<float4>(&shared().a[threadIdx.x / 8][4 * threadIdx.x % 32]).x;
}
__device__ float tile(const uint16_t* row) {
  const float zero = fill();
  uint32_t r[4];
  ldmatrix(r, row);
  return zero + float(r[0]);
}
CASE(narrow_tile) { d.out[threadIdx.x] = tile(shared().narrow[threadIdx.x]); }
CASE(wide_tile) { d.out[threadIdx.x] = tile(shared().wide[threadIdx.x]); }
CASE(copies) {
  auto& s = shared();
  cp_async(&s.a[threadIdx.x / 8][4 * threadIdx.x % 32], d.in + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  d.out[threadIdx.x] = s.a[threadIdx.x / 8][4 * threadIdx.x % 32];
}

CASE(only_fill) { d.out[threadIdx.x] = fill(); }

CASE(three_mma) {
  float sum[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma<bf16>(sum, a, b);
  mma<bf16>(sum, a, b);
  mma<tf32>(sum, a, b);
  d.out[threadIdx.x] = sum[0];
}

}  // namespace
