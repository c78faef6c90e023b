// One forward step without tensor cores. See fma.cuh for the tile; a thread's 4 columns are the
// four gates of one channel, so a block covers 16 channels.
#pragma once

#include "fma.cuh"
#include "neuron_forward.cuh"

namespace snnlstm::cuda {

struct ForwardFma {
  Tiling tiling;
  Segment x, mem;
  NeuronForward neuron;
};

namespace fma {
constexpr int kChannels = kColumns / 4;
static_assert(kChannels * kMemPitch * sizeof(float) <= sizeof(Shared<float>), "it takes its place");
}  // namespace fma

// Moves the gate sums of the first pair of pixels out of the accumulators, and the others up.
template <class R>
SNNLSTM_DEVICE void take_pair(R (&acc)[4][2][4], R (&sum)[4][2][1]) {
  unrolled<4, 2>([&](int gate, int px) {
    sum[gate][px][0] = acc[0][px][gate];
    unrolled<3>([&](int k) { acc[k][px][gate] = acc[k + 1][px][gate]; });
  });
}

template <class R>
__global__ void __launch_bounds__(fma::kThreads) forward_fma(const __grid_constant__ ForwardFma p) {
  auto& shared = shared_memory<fma::Shared<R>>();
  const Block block = block_of(p.tiling, blockIdx.x);
  const ForwardTile<R> tile(p.neuron, p.tiling, block, block.column * fma::kChannels,
                            fma::kChannels, shared.vectors);
  tile.load_vectors();
  fma::Gemm<R> gemm(shared, p.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(p.x, acc);
  gemm.add(p.mem, acc);
  __syncthreads();  // shared memory becomes the mem tile

  const MemTile<R> mem_tile{&shared.a[0][0][0], fma::kMemPitch};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {  // a loop that stays one: the accumulators are moved instead
    R sum[4][2][1];
    take_pair(acc, sum);
    tile.patch(fma::pixel(i), fma::column() / 4, sum, mem_tile);
  }
  __syncthreads();
  tile.finish(mem_tile);
}

}  // namespace snnlstm::cuda
