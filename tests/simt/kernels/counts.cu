// Access patterns whose cost is known, for the counters. One warp, unless the case says otherwise.
#include <string>

#include "entry.h"
#include "primitives.cuh"

using namespace snnlstm::cuda;

namespace {

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

__global__ void neighbours(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void shifted(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void every_other(const float* x, float* y) { y[threadIdx.x] = x[2 * threadIdx.x]; }
__global__ void every_eighth(const float* x, float* y) { y[threadIdx.x] = x[8 * threadIdx.x]; }
__global__ void same_for_all(const float* x, float* y) { y[threadIdx.x] = x[0]; }
__global__ void vectors(const float* x, float* y) {
  store(y + 4 * threadIdx.x, load<float4>(x + 4 * threadIdx.x));
}
__global__ void some_lanes(const float* x, float* y) {
  if (threadIdx.x % 2 == 0) y[threadIdx.x] = x[threadIdx.x];
}
__global__ void again(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += load<float>(x + threadIdx.x);
  y[threadIdx.x] = sum;
}
// Lanes that skip a turn of a loop must not shift the others' requests.
__global__ void uneven(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i < 8; ++i) {
    if (int(threadIdx.x) % 8 != i) sum += load<float>(x + 32 * i + threadIdx.x);
    __syncwarp();
  }
  y[threadIdx.x] = sum;
}

// ---- shared -------------------------------------------------------------------------------------

__global__ void rows(const float*, float* y) {
  y[threadIdx.x] = fill() + shared().a[3][threadIdx.x];
}
__global__ void columns(const float*, float* y) {
  y[threadIdx.x] = fill() + shared().a[threadIdx.x][3];
}
__global__ void padded_columns(const float*, float* y) {
  y[threadIdx.x] = fill() + shared().padded[threadIdx.x][3];
}
__global__ void two_way(const float*, float* y) {
  y[threadIdx.x] = fill() + shared().a[threadIdx.x / 16][2 * threadIdx.x % 32];
}
__global__ void broadcast(const float*, float* y) { y[threadIdx.x] = fill() + shared().a[3][3]; }
__global__ void shared_vectors(const float*, float* y) {
  y[threadIdx.x] = fill() + load<float4>(&shared().a[threadIdx.x / 8][4 * threadIdx.x % 32]).x;
}
__global__ void narrow_tile(const float*, float* y) {
  const float zero = fill();
  uint32_t r[4];
  ldmatrix(r, &shared().narrow[threadIdx.x][0]);
  y[threadIdx.x] = zero + float(r[0]);
}
__global__ void wide_tile(const float*, float* y) {
  const float zero = fill();
  uint32_t r[4];
  ldmatrix(r, &shared().wide[threadIdx.x][0]);
  y[threadIdx.x] = zero + float(r[0]);
}
__global__ void copies(const float* x, float* y) {
  auto& s = shared();
  cp_async<16>(&s.a[threadIdx.x / 8][4 * threadIdx.x % 32], x + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = s.a[threadIdx.x / 8][4 * threadIdx.x % 32];
}

__global__ void only_fill(const float*, float* y) { y[threadIdx.x] = fill(); }

__global__ void three_mma(const float*, float* y) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if constexpr (arch::has_mma) {
    mma<bf16>(d, a, b);
    mma<bf16>(d, a, b);
    mma<tf32>(d, a, b);
  }
  y[threadIdx.x] = d[0];
}

__global__ void atomics(const float*, float* y) { atomicAdd(y, 1.0f); }

struct Case {
  const char* name;
  void (*kernel)(const float*, float*);
};
#define CASE(name) {#name, name}
const Case cases[] = {
    CASE(neighbours),   CASE(shifted),   CASE(every_other),    CASE(every_eighth),
    CASE(same_for_all), CASE(vectors),   CASE(some_lanes),     CASE(again),
    CASE(uneven),       CASE(rows),      CASE(columns),        CASE(padded_columns),
    CASE(two_way),      CASE(broadcast), CASE(shared_vectors), CASE(narrow_tile),
    CASE(wide_tile),    CASE(copies),    CASE(only_fill),      CASE(three_mma),
    CASE(atomics),
};

}  // namespace

// x: 512 floats, y: 128.
ENTRY count_case(const char* name, const float* x, float* y) {
  return guarded([&] {
    for (const Case& c : cases) {
      if (std::string(c.name) != name) continue;
      launch(Launch{c.name, 1, 32, sizeof(Shared)}, c.kernel, x, y);
      return;
    }
    throw std::runtime_error(std::string("there is no case ") + name);
  });
}
