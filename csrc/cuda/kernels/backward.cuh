// The kernels of one step of the backward pass. A convolution of the next step's d_gates with the
// transposed weights gives the gradient of mem; the neurons' backward pass of the step follows in
// the same kernel. The convolution alone (data_gradient_*) gives the gradients of x and of the
// first mem.
#pragma once

#include "fma.cuh"
#include "mma.cuh"
#include "neuron_backward.cuh"

namespace snnlstm::cuda {

// A convolution whose sums are stored. One launch gives the gradients of x and of the first mem.
struct DataGradient {
  Tiling tiling;
  Tensor out;
  int height = 0, width = 0;         // of an image of `out`
  int blocks = 0;                    // 0: the job is absent
  const int64_t* lengths = nullptr;  // as Fire::lengths
};

// ---- on tensor cores ----------------------------------------------------------------------------
//
// See mma.cuh for the tile. Columns are channels: a warp has one pair of n-tiles, and a thread
// holds 2 pixels x 4 channels of each m16 tile.

struct BackwardMma {
  Tiling tiling;
  MmaConv conv;
  NeuronBackward neuron;
};

struct DataGradientMma : DataGradient {
  MmaConv conv;
};

// Orders a thread's sums of an m16 tile as v[pixel][channel].
SNNLSTM_DEVICE void take(const float (&acc)[2][4], float (&v)[2][4]) {
  unrolled<2, 4>([&](int px, int ch) { v[px][ch] = acc[ch / 2][2 * px + ch % 2]; });
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 3) backward_mma(const __grid_constant__ BackwardMma p) {
  if constexpr (arch::has_mma) {
    using Gemm = MmaGemm<Element, 2>;
    auto* shared = &shared_memory<unsigned char>();
    auto* vectors = reinterpret_cast<float*>(shared + p.conv.buffer_bytes);
    float* sums = vectors + mma_tile::kVectors;
    const BlockPlace block = block_of(p.tiling, blockIdx.x);
    const BackwardTile<float, KnownStates<Element>, KnownGates<Element>> tile(
        p.neuron, p.tiling, block, block.column * mma_tile::kChannels, mma_tile::kChannels,
        vectors);
    if (tile.is_padded()) return;
    tile.load_vectors();
    typename Gemm::Accumulators acc;
    Gemm(p.conv, shared, p.tiling, block).run(acc);
    float* sums_of_warp = sums + int(threadIdx.x) / 32 * mma_tile::kChannels;
#pragma unroll 1
    for (int mi = 0; mi < 2; ++mi) {  // not unrolled: the accumulators move instead
      tile.patch(Gemm::pixel(mi), 4 * Gemm::quad(),
                 [&](float (&d_mem)[2][4]) { take(acc[0], d_mem); }, {sums_of_warp, 4, mi == 0});
      unrolled<2, 4>([&](int nt, int r) { acc[0][nt][r] = acc[1][nt][r]; });
    }
    __syncthreads();
    tile.write_sums(sums, kThreads / 32);
  } else {
    trap_without_mma();
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 3)
    data_gradient_mma(const __grid_constant__ Jobs<DataGradientMma> jobs) {
  if constexpr (arch::has_mma) {
    using Gemm = MmaGemm<Element, 2>;
    unsigned index = blockIdx.x;
    const DataGradientMma& p = job_of(jobs.job, unsigned(jobs.job[0].blocks), index);
    const BlockPlace block = block_of(p.tiling, index);
    if (is_padded(p.lengths, block)) return;
    typename Gemm::Accumulators acc;
    Gemm(p.conv, &shared_memory<unsigned char>(), p.tiling, block).run(acc);
    unrolled<2>([&](int mi) {
      const PixelPair at = pixel_pair(p.tiling, block, Gemm::pixel(mi), p.height, p.width);
      float v[2][4];
      take(acc[mi], v);
      store_patch(p.out, at, block.column * mma_tile::kChannels + 4 * Gemm::quad(), v);
    });
  } else {
    trap_without_mma();
  }
}

// ---- without tensor cores -----------------------------------------------------------------------
//
// See fma.cuh for the tile. A thread's 4 columns are 4 neighbouring channels.

struct BackwardFma {
  Tiling tiling;
  Segment d_gates;  // of the next step; without channels for the last step
  NeuronBackward neuron;
};

struct DataGradientFma : DataGradient {
  Segment d_gates;
};

template <class R>
__global__ void __launch_bounds__(kThreads, fma::kBlocks<R>)
    backward_fma(const __grid_constant__ BackwardFma p) {
  auto& shared = shared_memory<fma::GemmShared<R>>();
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  const BackwardTile<R> tile(p.neuron, p.tiling, block, block.column * fma::kColumns, fma::kColumns,
                             shared.vectors);
  if (tile.is_padded()) return;
  tile.load_vectors();
  fma::Gemm<R> gemm(shared, p.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(p.d_gates, acc);
  __syncthreads();
  R* sums_of_row = shared.sums + fma::pixel_of(0) / 64 * fma::kColumns;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {  // not unrolled: the accumulators move instead
    const auto recurrent = [&](R(&d_mem)[2][4]) {
      unrolled<2, 4>([&](int px, int ch) { d_mem[px][ch] = acc[0][px][ch]; });
    };
    tile.patch(fma::pixel_of(i), fma::column_of(), recurrent, {sums_of_row, 1, i == 0});
    unrolled<3, 8>([&](int k, int j) { acc[k][j / 4][j % 4] = acc[k + 1][j / 4][j % 4]; });
  }
  __syncthreads();
  tile.write_sums(shared.sums, 2);
}

template <class R>
__global__ void __launch_bounds__(kThreads, fma::kBlocks<R>)
    data_gradient_fma(const __grid_constant__ Jobs<DataGradientFma> p) {
  unsigned index = blockIdx.x;
  const DataGradientFma& job = job_of(p.job, unsigned(p.job[0].blocks), index);
  const BlockPlace block = block_of(job.tiling, index);
  if (is_padded(job.lengths, block)) return;
  fma::Gemm<R> gemm(shared_memory<fma::GemmShared<R>>(), job.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(job.d_gates, acc);
  unrolled<4>([&](int i) {
    const PixelPair at = pixel_pair(job.tiling, block, fma::pixel_of(i), job.height, job.width);
    store_patch(job.out, at, block.column * fma::kColumns + fma::column_of(), acc[i]);
  });
}

}  // namespace snnlstm::cuda
