// The kernels of one forward step. A thread has the four gates of its channels. If the cell pools,
// fire.cuh forms the spikes.
#pragma once

#include "fma.cuh"
#include "mma.cuh"
#include "neuron_forward.cuh"

namespace snnlstm::cuda {

// ---- on tensor cores ----------------------------------------------------------------------------
//
// See mma.cuh for the tile. A warp has a pair of n-tiles for each gate, and a thread holds 2 pixels
// x 4 channels of each m16 tile.

struct ForwardMma {
  Tiling tiling;
  MmaConv conv;
  NeuronForward neuron;
};

// Moves the sums of the first m16 tile to sum[gate][pixel][channel], and the second tile's up.
SNNLSTM_DEVICE void take_tile(float (&acc)[2][8][4], float (&sum)[4][2][4]) {
  unrolled<4, 2>([&](int gate, int half) {
    unrolled<4>([&](int r) {
      const int tile = 2 * gate + half;
      sum[gate][r / 2][2 * half + r % 2] = acc[0][tile][r];
      acc[0][tile][r] = acc[1][tile][r];
    });
  });
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 2) forward_mma(const __grid_constant__ ForwardMma p) {
  if constexpr (arch::has_mma) {
    using Gemm = MmaGemm<Element, 8>;
    constexpr int kChannels = mma_tile::kChannels;
    auto* shared = &shared_memory<unsigned char>();
    const BlockPlace block = block_of(p.tiling, blockIdx.x);
    if (p.neuron.fire.is_padded(block.n)) return;
    const ForwardTile<float, KnownStates<Element>, KnownGates<Element>> tile(
        p.neuron, p.tiling, block, block.column * kChannels, kChannels,
        reinterpret_cast<float*>(shared + p.conv.buffer_bytes));
    tile.load_vectors();
    typename Gemm::Accumulators acc;
    Gemm(p.conv, shared, p.tiling, block).run(acc);
#pragma unroll 1
    for (int mi = 0; mi < 2; ++mi) {  // not unrolled: the accumulators move instead
      float sum[4][2][4];
      take_tile(acc, sum);
      tile.patch(Gemm::pixel(mi), 4 * Gemm::quad(), sum);
    }
  } else {
    trap_without_mma();
  }
}

// ---- without tensor cores -----------------------------------------------------------------------
//
// See fma.cuh for the tile. A thread's 4 columns are the four gates of one channel, so a block
// covers 8 channels.

struct ForwardFma {
  Tiling tiling;
  Segment x, mem;
  NeuronForward neuron;
};

// Moves the gate sums of the first pair of pixels out of the accumulators, and the others up.
template <class R>
SNNLSTM_DEVICE void take_pair(R (&acc)[4][2][4], R (&sum)[4][2][1]) {
  unrolled<4, 2>([&](int gate, int px) {
    sum[gate][px][0] = acc[0][px][gate];
    unrolled<3>([&](int k) { acc[k][px][gate] = acc[k + 1][px][gate]; });
  });
}

template <class R>
__global__ void __launch_bounds__(kThreads, fma::kBlocks<R>)
    forward_fma(const __grid_constant__ ForwardFma p) {
  constexpr int kChannels = fma::kColumns / 4;
  auto& shared = shared_memory<fma::GemmShared<R>>();
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  if (p.neuron.fire.is_padded(block.n)) return;
  const ForwardTile<R> tile(p.neuron, p.tiling, block, block.column * kChannels, kChannels,
                            shared.vectors);
  tile.load_vectors();
  fma::Gemm<R> gemm(shared, p.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(p.x, acc);
  gemm.add(p.mem, acc);
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {  // not unrolled: the accumulators move instead
    R sum[4][2][1];
    take_pair(acc, sum);
    tile.patch(fma::pixel_of(i), fma::column_of() / 4, sum);
  }
}

}  // namespace snnlstm::cuda
