// A matrix product with what the real kernels use: double-buffered cp.async with zero fill,
// ldmatrix, mma, an epilogue through shared memory with 128-bit stores, and a split of K.
//   d (M, N) = a (M, K) * b (K, N), all row-major, K and N multiples of 8
#include "case.h"

using namespace snnlstm::cuda;

namespace {

constexpr int tile = 32, depth = 32, threads = 128;

struct GemmShared {
  bf16 a[2][tile][depth + 8];  // rows 80 bytes apart: 8 of them lie in different banks
  bf16 b[2][depth][tile + 8];
  float out[4][16][20];  // per warp
};

__global__ void __launch_bounds__(threads)
    gemm(const bf16* a, const bf16* b, float* d, int M, int N, int K, int k_per_split) {
  auto& s = shared_memory<GemmShared>();
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row0 = int(blockIdx.y) * tile, column0 = int(blockIdx.x) * tile;
  const int k0 = int(blockIdx.z) * k_per_split;
  const int k1 = min(K, k0 + k_per_split);

  auto fetch = [&](int k, int buffer) {
    const int row = thread / 4, part = thread % 4 * 8;
    // What the last tile has behind the matrix must become zero.
    const int limit = M + (fault(Fault::wrong_tail_mask) ? 1 : 0);
    const bool a_there = row0 + row < limit && k + part < k1;
    const bool b_there = k + row < k1 && column0 + part < N;
    const bf16* from_a = a + size_t(row0 + row) * K + k + part;
    const bf16* from_b = b + size_t(k + row) * N + column0 + part;
    if (!fault(Fault::missing_zero_fill) || a_there)
      cp_async(&s.a[buffer][row][part], from_a, a_there);
    cp_async(&s.b[buffer][row][part], from_b, b_there);
    cp_async_commit();
  };

  float acc[2][4] = {};
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;
  fetch(k0, 0);
  int buffer = 0;
  for (int k = k0; k < k1; k += depth, buffer ^= 1) {
    if (k + depth < k1) {
      fetch(k + depth, buffer ^ 1);
      if (!fault(Fault::missing_wait)) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (!fault(Fault::missing_barrier_read)) __syncthreads();
    for (int step = 0; step < depth; step += 16) {
      uint32_t fa[4], fb[4];
      const int r = lane % 16, c = lane / 16 * 8;
      ldmatrix(fa, &s.a[buffer][warp_row + r][step + c]);
      ldmatrix_transposed(fb, &s.b[buffer][step + r][warp_column + c]);
      const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
      if constexpr (arch::has_mma<bf16>) {
        mma<bf16>(acc[0], fa, left);
        mma<bf16>(acc[1], fa, right);
      }
    }
    if (!fault(Fault::missing_barrier_overwrite)) __syncthreads();
  }

  // In shared memory a lane finds four neighbours of a row.
  auto& out = s.out[warp];
  const int g = lane / 4, t = lane % 4;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int upper = fault(Fault::wrong_fragment_row) ? i % 2 : i / 2;
      out[g + 8 * upper][8 * half + 2 * t + i % 2] = acc[half][i];
    }
  }
  if (!fault(Fault::missing_syncwarp)) __syncwarp();
  float* base = d + size_t(blockIdx.z) * M * N;
  for (int i = lane; i < 64; i += 32) {
    const int row = i / 4, part = i % 4 * 4;
    const int y = row0 + warp_row + row, x = column0 + warp_column + part;
    if (y < M && x < N) store(base + size_t(y) * N + x, load<float4>(&out[row][part]));
  }
}

__global__ void add_splits(const float* parts, float* d, int elements, int splits) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= elements) return;
  float sum = 0;
  const int first = fault(Fault::wrong_split_k) ? 1 : 0;
  for (int s = first; s < splits; ++s) sum += parts[size_t(s) * elements + i];
  d[i] = sum;
}

}  // namespace

ENTRY run_gemm(const bf16* a, const bf16* b, float* parts, float* d, int M, int N, int K,
               int splits) {
  return guarded([&] {
    const int steps = (K + depth - 1) / depth;
    const int per_split = (steps + splits - 1) / splits * depth;
    const dim3 grid((N + tile - 1) / tile, (M + tile - 1) / tile, splits);
    launch(Launch{"gemm", grid, threads, sizeof(GemmShared)}, gemm, a, b, splits > 1 ? parts : d, M,
           N, K, per_split);
    if (splits > 1)
      launch(Launch{"add_splits", (M * N + 127) / 128, 128}, add_splits, parts, d, M * N, splits);
  });
}
