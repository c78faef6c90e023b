// Adds the parts of the gradients of weight, bias and threshold that blocks have written, in order
// and in one launch.
#pragma once

#include "../images.h"
#include "tile.cuh"

namespace snnlstm::cuda {

constexpr int kReduceThreads = 256;

struct ReduceWeight {
  const void* parts = nullptr;
  int splits = 1, part_rows = 0, part_columns = 0;
  int channels = 0, tap_stride = 0;  // columns of the parts: tap * tap_stride + ci
  int first_channel = 0;             // among the weight's input channels
};

// Returns the sums of an input channel in shared memory: odd, so that channels lie in other banks.
SNNLSTM_BOTH int64_t channel_pitch(int64_t taps) { return taps | 1; }

// Both halves of the weight in one launch.
struct ReduceWeights {
  ReduceWeight half[2];
  int C = 0, Cp = 0, taps = 1;
  int all_channels = 0;  // Cin + C
  int chunk = 32;        // input channels that a block takes
  KernelTaps places;
  void* grad = nullptr;  // (4C, all_channels, places.all)
  DType type = DType::float32;

  SNNLSTM_BOTH int pitch() const { return int(channel_pitch(taps)); }
  SNNLSTM_BOTH int chunks(int k) const { return (half[k].channels + chunk - 1) / chunk; }
};

// A block adds the parts of one of 4C rows, for a chunk of input channels of x or of mem. The sums
// pass through shared memory, (chunk, pitch), because the parts have the channels innermost but the
// gradient has the taps.
template <class R>
SNNLSTM_DEVICE void reduce_weight(const ReduceWeights& p, int index) {
  R* sums = &shared_memory<R>();
  const int row = index % (4 * p.C);
  int chunk = index / (4 * p.C);
  const ReduceWeight& h = job_of(p.half, p.chunks(0), chunk);
  const int c0 = chunk * p.chunk;
  const int channels = h.channels - c0 < p.chunk ? h.channels - c0 : p.chunk;
  const int gate = row / p.C, c = row % p.C;
  const R* parts = static_cast<const R*>(h.parts) + int64_t(gate * p.Cp + c) * h.part_columns + c0;
  const int64_t part = int64_t(h.part_rows) * h.part_columns;
  for (int i = int(threadIdx.x); i < p.taps * p.chunk; i += kReduceThreads) {
    const int tap = i / p.chunk, ci = i % p.chunk;
    const int tap_stride = fault(Fault::wrong_tap_stride) ? h.channels : h.tap_stride;
    if (ci >= channels) continue;
    R sum = 0;
#pragma unroll 4
    for (int k = fault(Fault::lost_part) ? 1 : 0; k < h.splits; ++k)
      sum += parts[k * part + tap * tap_stride + ci];
    sums[ci * p.pitch() + tap] = sum;
  }
  __syncthreads();
  const int64_t out = (int64_t(row) * p.all_channels + h.first_channel + c0) * p.places.all;
  if (p.places.all == p.taps) {
    for (int i = int(threadIdx.x); i < channels * p.taps; i += kReduceThreads)
      write(p.grad, p.type, out + i, sums[i / p.taps * p.pitch() + i % p.taps]);
    return;
  }
  for (int64_t i = threadIdx.x; i < channels * p.places.all; i += kReduceThreads) {
    const int tap = p.places.tap(i % p.places.all);
    const R sum = tap < 0 ? R(0) : sums[i / p.places.all * p.pitch() + tap];
    write(p.grad, p.type, out + i, sum);
  }
}

// out[k * columns + c] = sum over blocks b of parts[b][k][c].
struct ReduceSums {
  const void* parts = nullptr;  // (blocks, rows, pitch) in the compute type
  int64_t blocks = 0;
  int rows = 1, pitch = 0, columns = 0;
  void* out = nullptr;
  DType type = DType::float32;

  SNNLSTM_BOTH int row_blocks() const { return (columns + 31) / 32; }
  SNNLSTM_BOTH int launched() const { return out == nullptr ? 0 : row_blocks() * rows; }
};

template <class R>
struct ReduceShared {
  R sum[kReduceThreads / 32][32];
};

// A block adds 32 columns of a row.
template <class R>
SNNLSTM_DEVICE void reduce_sums(const ReduceSums& p, int index) {
  auto& shared = shared_memory<ReduceShared<R>>();
  constexpr int kRows = kReduceThreads / 32;
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32;
  const int c = index % p.row_blocks() * 32 + lane, k = index / p.row_blocks();
  const R* from = static_cast<const R*>(p.parts) + int64_t(k) * p.pitch + c;
  R sum = 0;
  if (c < p.columns)
    for (int64_t b = row; b < p.blocks; b += kRows) sum += from[b * p.rows * p.pitch];
  shared.sum[row][lane] = sum;
  __syncthreads();
  if (row > 0 || c >= p.columns) return;
  for (int i = 1; i < kRows; ++i) sum += shared.sum[i][lane];
  write(p.out, p.type, k * p.columns + c, sum);
}

// The sums to be computed. A gradient without an address, or a weight without blocks, is absent.
struct AddGradients {
  ReduceWeights weight;
  int of_weight = 0;   // blocks
  ReduceSums sums[2];  // of the bias, of the threshold
};

template <class R>
__global__ void __launch_bounds__(kReduceThreads)
    add_gradients(const __grid_constant__ AddGradients p) {
  int index = int(blockIdx.x);
  if (index < p.of_weight) return reduce_weight<R>(p.weight, index);
  index -= p.of_weight;
  const ReduceSums& sums = job_of(p.sums, p.sums[0].launched(), index);
  reduce_sums<R>(sums, index);
}

}  // namespace snnlstm::cuda
