// One step of the backward pass, and a convolution alone, without tensor cores: as
// backward_mma.cuh, on the tile of fma.cuh. A thread's 4 columns are 4 neighbouring channels; a
// block covers 64.
#pragma once

#include "fma.cuh"
#include "neuron_backward.cuh"

namespace snnlstm::cuda {

struct BackwardFma {
  Tiling tiling;
  Segment d_gates;  // of the step after; no channels: there is none
  NeuronBackward neuron;
};

struct DataGradientFma {
  Tiling tiling;
  Segment d_gates;
  Tensor out;
  int height = 0, width = 0;  // of its images
  int blocks = 0;             // 0: the job is absent
};

struct DataGradientsFma {
  DataGradientFma job[2];
};

namespace fma {
template <class R>
struct BackwardShared {
  Shared<R> gemm;
  R row_sums[kColumns];
  R mem[kColumns * kMemPitch];  // left out where it is not needed
  static constexpr size_t bytes(bool with_mem) {
    return with_mem ? sizeof(BackwardShared) : sizeof(BackwardShared) - sizeof(mem);
  }
};
static_assert(sizeof(Shared<float>::a) + sizeof(Shared<float>::b) >= 32 * kThreads * sizeof(float),
              "the accumulators take the place of A and B");
}  // namespace fma

template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    backward_fma(const __grid_constant__ BackwardFma p) {
  auto* bytes = &shared_memory<unsigned char>();
  auto& shared = *reinterpret_cast<fma::BackwardShared<R>*>(bytes);
  const Block block = block_of(p.tiling, blockIdx.x);
  const int c0 = block.column * fma::kColumns;
  const BackwardTile<R> tile(p.neuron, p.tiling, block, c0, fma::kColumns, shared.gemm.vectors);
  tile.load_vectors();
  fma::Gemm<R> gemm(shared.gemm, p.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(p.d_gates, acc);
  __syncthreads();

  R* parked = &shared.gemm.a[0][0][0] + 4 * threadIdx.x;
  constexpr int stride = 4 * fma::kThreads;
  unrolled<8>([&](int i) { store_vector(parked + i * stride, acc[i / 2][i % 2]); });
  const MemTile<R> mem_tile{shared.mem, fma::kMemPitch};
  tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i)
      tile.patch(fma::pixel(i), fma::column(), gather, parked + 2 * i * stride, stride, mem_tile,
                 shared.row_sums, 1, i == 0);
  });
  __syncthreads();
  tile.write_sums(shared.row_sums, 1);
}

template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    data_gradient_fma(const __grid_constant__ DataGradientsFma p) {
  auto& shared = shared_memory<fma::Shared<R>>();
  unsigned index = blockIdx.x;
  const DataGradientFma& job = job_of(p.job, unsigned(p.job[0].blocks), index);
  const Block block = block_of(job.tiling, index);
  fma::Gemm<R> gemm(shared, job.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(job.d_gates, acc);
  unrolled<4>([&](int i) {
    const PixelPair at = pixel_pair(job.tiling, block, fma::pixel(i), job.height, job.width);
    store_patch(job.out, at, block.column * fma::kColumns + fma::column(), acc[i]);
  });
}

}  // namespace snnlstm::cuda
