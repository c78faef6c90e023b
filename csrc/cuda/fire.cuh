// Spikes from mem in a kernel of their own: pooling windows that cross the tiles of the forward
// step, and inhibition, which looks at a whole sample.
#pragma once

#include "neuron_forward.cuh"

namespace snnlstm::cuda {

constexpr int kFireThreads = 256;

struct FireStep {
  Fire fire;
  Tensor mem;  // (T, N, C, Ho, Wo), one step of it
  int N;
  int64_t* winner;  // (N,), inhibition alone; may be null
};

// The i-th of a sample's thresholded neurons, neighbouring numbers side by side in memory.
struct PooledIndex {
  int c, y, x;
  SNNLSTM_DEVICE PooledIndex(const Fire& f, int i) {
    if (f.spk.c == 1) {
      c = i % f.C, i /= f.C;
      x = i % f.Wp, y = i / f.Wp;
    } else {
      x = i % f.Wp, i /= f.Wp;
      y = i % f.Hp, c = i / f.Hp;
    }
  }
  SNNLSTM_DEVICE int flat(const Fire& f) const { return (c * f.Hp + y) * f.Wp + x; }
};

template <class R>
SNNLSTM_DEVICE R thresholded_mem(const FireStep& p, int n, const PooledIndex& at) {
  const Fire& f = p.fire;
  const void* mem = image_of(p.mem, 0, n);
  const int first = offset(p.mem, at.c, at.y * f.pool_h, at.x * f.pool_w);
  const auto value = [&](int i, int j) {
    return read<R>(mem, p.mem.type, first + i * p.mem.h + j * p.mem.w);
  };
  int where;
  return f.pool == Pool::none ? value(0, 0) : pooled<R>(f, value, where);
}

// One thread a pooled neuron, of one sample in a block. grid: blocks_of_sample for each sample.
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
  if (i >= neurons_of_sample(f)) return;
  const PooledIndex at(f, i);
  write(image_of(f.spk, 0, n), f.spk.type, offset(f.spk, at.c, at.y, at.x),
        spike_of(f, thresholded_mem<R>(p, n, at), threshold_of<R>(f, at.c)));
}

template <class R>
struct WinnerShared {
  R value[kFireThreads];
  int index[kFireThreads];
};

// Under inhibition the neuron with the highest (pooled) mem may spike, among equals the one with
// the lowest index in (C, Hp, Wp); a NaN counts as highest, as in torch.argmax.
template <class R>
struct Winner {
  R mem = 0;
  int index = -1;  // -1: no neuron

  SNNLSTM_DEVICE bool beats(const Winner& other) const {
    if (index < 0 || other.index < 0) return other.index < 0 && index >= 0;
    const bool nan = mem != mem, other_nan = other.mem != other.mem;
    if (nan || other_nan) return nan && (!other_nan || index < other.index);
    return mem > other.mem || (mem == other.mem && index < other.index);
  }
};

// Only the winner of a sample may spike. One block a sample.
template <class R>
__global__ void __launch_bounds__(kFireThreads, 2) fire_winner(const __grid_constant__ FireStep p) {
  auto& shared = shared_memory<WinnerShared<R>>();
  const Fire& f = p.fire;
  const int n = int(blockIdx.x), tid = int(threadIdx.x);
  const int count = neurons_of_sample(f);
  Winner<R> best;
  for (int i = tid; i < count; i += kFireThreads) {
    const PooledIndex at(f, i);
    const Winner<R> here{thresholded_mem<R>(p, n, at), at.flat(f)};
    if (here.beats(best)) best = here;
    write(image_of(f.spk, 0, n), f.spk.type, offset(f.spk, at.c, at.y, at.x),
          R(0) * graded_of<R>(f));
  }
  shared.value[tid] = best.mem, shared.index[tid] = best.index;
  for (int half = kFireThreads / 2; half > 0; half /= 2) {
    if (!fault(Fault::missing_barrier_read, 5)) __syncthreads();
    if (tid >= half) continue;
    const Winner<R> mine{shared.value[tid], shared.index[tid]};
    const Winner<R> other{shared.value[tid + half], shared.index[tid + half]};
    if (other.beats(mine)) {
      shared.value[tid] = shared.value[tid + half];
      shared.index[tid] = shared.index[tid + half];
    }
  }
  __syncthreads();
  if (tid > 0) return;
  const int winner = shared.index[0];
  if (p.winner != nullptr) p.winner[n] = winner;
  if (winner < 0) return;
  const int c = winner / (f.Hp * f.Wp), y = winner / f.Wp % f.Hp;
  write(image_of(f.spk, 0, n), f.spk.type, offset(f.spk, c, y, winner % f.Wp),
        spike_of(f, shared.value[0], threshold_of<R>(f, c)));
}

}  // namespace snnlstm::cuda
