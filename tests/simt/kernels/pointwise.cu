// Small kernels without tensor cores: a stencil with a halo, LSTM gates, a sum by shuffles that the
// last block finishes, and sums by atomics.
#include "case.h"

using namespace snnlstm::cuda;

namespace {

// ---- 3x3 box sums with zero padding, (H, W) -----------------------------------------------------

constexpr int stencil_tile = 16;

struct StencilShared {
  float x[stencil_tile + 2][stencil_tile + 2];
};

__global__ void box_sum(const float* x, float* y, int H, int W) {
  auto& s = shared_memory<StencilShared>();
  const int thread = int(threadIdx.x);
  const int row0 = int(blockIdx.y) * stencil_tile, column0 = int(blockIdx.x) * stencil_tile;
  constexpr int side = stencil_tile + 2;
  const int halo = fault(Fault::wrong_halo) ? 0 : 1;
  for (int i = thread; i < side * side; i += int(blockDim.x)) {
    const int r = row0 + i / side - halo, c = column0 + i % side - halo;
    const bool there = r >= 0 && r < H && c >= 0 && c < W;
    cp_async<4>(&s.x[i / side][i % side], x + size_t(r) * W + c, there);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = thread; i < stencil_tile * stencil_tile; i += int(blockDim.x)) {
    const int r = i / stencil_tile, c = i % stencil_tile;
    float sum = 0;
    for (int dy = 0; dy < 3; ++dy)
      for (int dx = 0; dx < 3; ++dx) sum += s.x[r + dy][c + dx];
    if (row0 + r < H && column0 + c < W) y[size_t(row0 + r) * W + column0 + c] = sum;
  }
}

// ---- LSTM update: gates (n, 4) as i, f, o, g; syn (n,) is updated -------------------------------

__global__ void lstm_update(const float* gates, float* syn, float* mem, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float4 v = load<float4>(gates + 4 * size_t(i));
  if (fault(Fault::swapped_gates)) v = make_float4(v.y, v.x, v.z, v.w);
  const float next = v.y * syn[i] + v.x * v.w;
  syn[i] = next;
  mem[i] = v.z * tanhf(next);
}

// ---- sum of n numbers; the block that comes last adds up what the others left -------------------

struct SumShared {
  float warp_sum[8];
  int last;
};

__global__ void sum_all(const float* x, float* parts, unsigned* counter, float* sum, int n) {
  auto& s = shared_memory<SumShared>();
  const int thread = int(threadIdx.x);
  float v = 0;
  for (int i = int(blockIdx.x) * 256 + thread; i < n; i += int(gridDim.x) * 256) v += x[i];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(full_warp, v, step);
  if (thread % 32 == 0) s.warp_sum[thread / 32] = v;
  __syncthreads();
  if (thread == 0) {
    float total = 0;
    for (int w = 0; w < 8; ++w) total += s.warp_sum[w];
    parts[blockIdx.x] = total;
    if (!fault(Fault::missing_wait, 1)) __threadfence();
    s.last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (s.last && thread == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += parts[b];
    *sum = total;
  }
}

// A column sum with atomics: x (rows, columns), sums (columns,) zeroed by the caller.
__global__ void sum_columns(const float* x, float* sums, int rows, int columns) {
  const int row = int(blockIdx.x), c = int(threadIdx.x);
  if (c < columns && row < rows) atomicAdd(&sums[c], x[size_t(row) * columns + c]);
}

}  // namespace

ENTRY run_box_sum(const float* x, float* y, int H, int W) {
  return guarded([&] {
    const dim3 grid((W + stencil_tile - 1) / stencil_tile, (H + stencil_tile - 1) / stencil_tile);
    launch(Launch{"box_sum", grid, 128, sizeof(StencilShared)}, box_sum, x, y, H, W);
  });
}

ENTRY run_lstm_update(const float* gates, float* syn, float* mem, int n) {
  return guarded([&] {
    launch(Launch{"lstm_update", (n + 127) / 128, 128}, lstm_update, gates, syn, mem, n);
  });
}

ENTRY run_sum_all(const float* x, float* parts, unsigned* counter, float* sum, int n, int blocks) {
  return guarded([&] {
    launch(Launch{"sum_all", blocks, 256, sizeof(SumShared)}, sum_all, x, parts, counter, sum, n);
  });
}

ENTRY run_sum_columns(const float* x, float* sums, int rows, int columns) {
  return guarded(
      [&] { launch(Launch{"sum_columns", rows, 64}, sum_columns, x, sums, rows, columns); });
}
