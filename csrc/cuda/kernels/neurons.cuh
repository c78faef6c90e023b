// The neurons of one step, forward and backward, after a convolution that torch has computed. A
// thread has a patch of 2 pixels x 4 channels, a block 64 pixels x 16 channels.
#pragma once

#include "neuron_backward.cuh"

namespace snnlstm::cuda {

namespace neurons {
constexpr int kThreads = 128, kPixels = 64, kChannels = 16;
// The number of blocks of a multiprocessor. Without it ptxas aims at 6 on sm_90, and spills.
template <class R>
constexpr int kBlocks = sizeof(R) == 4 ? 4 : 1;

template <class R>
struct PatchShared {
  R vectors[5 * kChannels];
  R sums[kChannels * kThreads / 32];
};

// The thread's first pixel, and its first channel in the block.
SNNLSTM_DEVICE int pixel() { return int(threadIdx.x) / 32 * 16 + 2 * (int(threadIdx.x) % 32 / 4); }
SNNLSTM_DEVICE int channel() { return 4 * (int(threadIdx.x) % 4); }
}  // namespace neurons

struct ForwardNeurons {
  Tiling tiling;
  Tensor sums[4];  // of each gate, (1, N, C, Ho, Wo) in any layout
  NeuronForward neuron;
};

template <class R>
__global__ void __launch_bounds__(neurons::kThreads, neurons::kBlocks<R>)
    neurons_forward(const __grid_constant__ ForwardNeurons p) {
  auto& shared = shared_memory<neurons::PatchShared<R>>();
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  const int c0 = block.column * neurons::kChannels;
  if (p.neuron.fire.is_padded(block.n)) return;
  const ForwardTile<R> tile(p.neuron, p.tiling, block, c0, neurons::kChannels, shared.vectors);
  tile.load_vectors();
  const PixelPair at = pixel_pair(p.tiling, block, neurons::pixel(), p.neuron.Ho, p.neuron.Wo);
  R sum[4][2][4];
  unrolled<4>([&](int gate) { load_patch(p.sums[gate], at, c0 + neurons::channel(), sum[gate]); });
  if (!fault(Fault::no_vectors_barrier)) __syncthreads();
  tile.patch(neurons::pixel(), neurons::channel(), sum);
}

struct BackwardNeurons {
  Tiling tiling;
  NeuronBackward neuron;
};

template <class R>
__global__ void __launch_bounds__(neurons::kThreads, neurons::kBlocks<R>)
    neurons_backward(const __grid_constant__ BackwardNeurons p) {
  auto& shared = shared_memory<neurons::PatchShared<R>>();
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  const int c0 = block.column * neurons::kChannels;
  const BackwardTile<R> tile(p.neuron, p.tiling, block, c0, neurons::kChannels, shared.vectors);
  if (tile.is_padded()) return;
  tile.load_vectors();
  __syncthreads();
  R* row_sums = shared.sums + int(threadIdx.x) / 32 * neurons::kChannels;
  tile.patch(neurons::pixel(), neurons::channel(), [](auto&) {}, {row_sums, 4, true});
  __syncthreads();
  tile.write_sums(shared.sums, neurons::kThreads / 32);
}

}  // namespace snnlstm::cuda
