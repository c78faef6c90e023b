// The spikes' gradient on its way to mem in a kernel of its own, for pooling windows that cross the
// tiles of the backward step.
#pragma once

#include "fire.cuh"
#include "neuron_backward.cuh"

namespace snnlstm::cuda {

constexpr int kSpreadThreads = 128;

struct SpreadStep {
  Tiling tiling;  // its batch alone
  NeuronBackward neuron;
  Image spikes;  // (N, Ho, Wo, Cp) in the compute type: written inside of whole windows
};

// One thread a window and channel, of one sample in a block. grid: blocks_of_sample for each
// sample.
template <class R>
__global__ void __launch_bounds__(kSpreadThreads)
    spread_spikes(const __grid_constant__ SpreadStep p) {
  const Fire& f = p.neuron.fire;
  const int blocks = blocks_of_sample(f, kSpreadThreads);
  const int i = int(blockIdx.x) % blocks * kSpreadThreads + int(threadIdx.x);
  if (i >= neurons_of_sample(f)) return;
  const Block block{0, int(blockIdx.x) / blocks, 0, 0, 0, 0};
  const int c = i % f.C, x = i / f.C % f.Wp, y = i / f.C / f.Wp;
  const BackwardTile<R> tile(p.neuron, p.tiling, block, 0, 1, nullptr);
  const R threshold = threshold_of<R>(f, c);
  const int top = y * f.pool_h, left = x * f.pool_w;
  R* out = static_cast<R*>(image_of(p.spikes, 0, block.n));
  tile.spread_window(
      c, y, x, threshold,
      [&](int k, int j) { return tile.mem_at(c, top + k, left + j, threshold); },
      [&](int k, int j, R grad) { out[offset(p.spikes, 0, c, top + k, left + j)] = grad; });
}

}  // namespace snnlstm::cuda
