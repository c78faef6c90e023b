// Kernels for spikes that a step's tiles cannot compute, because pooling windows cross the tiles.
#pragma once

#include "neuron_backward.cuh"

namespace snnlstm::cuda {

constexpr int kFireThreads = 256;

struct FireStep {
  Fire fire;
  Tensor mem;  // of one step, (1, N, C, Ho, Wo)
  int N;
};

// Thresholded neuron i of a sample. Neighbouring numbers lie side by side in memory.
struct PooledIndex {
  int c, y, x;
  SNNLSTM_DEVICE PooledIndex(const Fire& f, int i) {
    if (f.spk.c == 1) {
      c = i % f.C;
      i /= f.C;
      x = i % f.Wp;
      y = i / f.Wp;
    } else {
      x = i % f.Wp;
      i /= f.Wp;
      y = i % f.Hp;
      c = i / f.Hp;
    }
  }
};

template <class R>
SNNLSTM_DEVICE R thresholded_mem(const FireStep& p, int n, const PooledIndex& at) {
  const void* mem = image_of(p.mem, 0, n);
  const int first = offset(p.mem, at.c, at.y * p.fire.pool_h, at.x * p.fire.pool_w);
  return thresholded<R>(p.fire, p.fire.pooled_index(n, at.c, at.y, at.x), [&](int i, int j) {
    return read<R>(mem, p.mem.type, first + i * p.mem.h + j * p.mem.w);
  });
}

// A thread has one pooled neuron, a block one sample. grid: blocks_of_sample() for each sample.
SNNLSTM_BOTH int neurons_of_sample(const Fire& f) { return f.C * f.Hp * f.Wp; }
SNNLSTM_BOTH int blocks_of_sample(const Fire& f, int threads) {
  return (neurons_of_sample(f) + threads - 1) / threads;
}

template <class R>
__global__ void __launch_bounds__(kFireThreads) fire_windows(const __grid_constant__ FireStep p) {
  const Fire& f = p.fire;
  const int blocks = blocks_of_sample(f, kFireThreads);
  const int n = int(blockIdx.x) / blocks;
  const int i = int(blockIdx.x) % blocks * kFireThreads + int(threadIdx.x);
  if (i >= neurons_of_sample(f) || f.is_padded(n)) return;
  const PooledIndex at(f, i);
  write(image_of(f.spk, 0, n), f.spk.type, offset(f.spk, at.c, at.y, at.x),
        spike_of(f, thresholded_mem<R>(p, n, at), threshold_of<R>(f, at.c)));
}

// ---- the backward pass --------------------------------------------------------------------------
//
// If pooling windows cross the step's tiles, a separate kernel passes the gradients of the spikes
// to the mem that they came from.

constexpr int kSpreadThreads = 128;

// Writes p.spikes_in inside whole windows. A thread has one window of one channel, a block one
// sample; grid: blocks_of_sample() for each sample. Without the least number of blocks ptxas keeps
// numbers in local memory on sm_80.
template <class R>
__global__ void __launch_bounds__(kSpreadThreads, 8)
    spread_spikes(const __grid_constant__ NeuronBackward p) {
  const Fire& f = p.fire;
  const int blocks = blocks_of_sample(f, kSpreadThreads);
  const int i = int(blockIdx.x) % blocks * kSpreadThreads + int(threadIdx.x);
  if (i >= neurons_of_sample(f)) return;
  const BlockPlace block{0, int(blockIdx.x) / blocks, 0, 0, 0, 0};
  if (f.is_padded(block.n)) return;
  const int c = i % f.C;
  const int x = i / f.C % f.Wp;
  const int y = i / f.C / f.Wp;
  const Tiling tiling;
  const BackwardTile<R> tile(p, tiling, block, 0, 1, nullptr);
  const R threshold = threshold_of<R>(f, c);
  R* out = static_cast<R*>(image_of(p.spikes_in, 0, block.n));
  tile.spread_window(
      c, y, x, threshold,
      [&](int k, int j) { return tile.mem_at(c, y * f.pool_h + k, x * f.pool_w + j, threshold); },
      [&](int k, int j, R grad) {
        out[offset(p.spikes_in, c, y * f.pool_h + k, x * f.pool_w + j)] = grad;
      });
}

}  // namespace snnlstm::cuda
