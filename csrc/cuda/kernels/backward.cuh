// The kernels of one step of the backward pass. A convolution of the next step's d_gates with the
// transposed weights gives the gradient of mem; the neurons' backward pass of the step follows in
// the same kernel. The convolution alone (data_gradient_*) gives the gradients of x and of the
// first mem.
//
// On tensor cores columns are channels: a warp has 2, 4 or 8 n-tiles, in pairs of 16. A thread
// holds 2 pixels x 4 channels of each pair in each of its two m16 tiles. These patches lie in
// shared memory while the epilogue goes over them one by one.
#pragma once

#include "fma.cuh"
#include "mma.cuh"
#include "neuron_backward.cuh"

namespace snnlstm::cuda {

struct BackwardMma {
  Tiling tiling;
  MmaConv conv;
  int tiles = 0;  // n-tiles of a warp
  NeuronBackward neuron;
  int mem_pitch = 0;
  int mem_tile = 0, vectors = 0, row_sums = 0;  // bytes of shared memory before them
};

// A convolution whose sums are stored. One launch gives the gradients of x and of the first mem.
struct DataGradient {
  Tiling tiling;
  Tensor out;
  int height = 0, width = 0;         // of an image of `out`
  int blocks = 0;                    // 0: the job is absent
  const int64_t* lengths = nullptr;  // as Fire::lengths
};

struct DataGradientMma : DataGradient {
  MmaConv conv;
  int tiles = 0;  // n-tiles of a warp
};

constexpr int kBackwardThreads = 128;
// The number of blocks of a multiprocessor. In 3xTF32 each accumulator also has a total.
template <class Element>
constexpr int kBackwardBlocks = std::is_same_v<Element, tf32x3> ? 2 : 3;

// A block's sums of a convolution in shared memory, in patches of 2 pixels x 4 channels. If there
// are two groups of warps, each sums over one half of K, and then continues with one of the m16
// tiles.
struct ParkedSums {
  const float* parked;
  int stride;  // from a pixel's 4 channels to the next pixel's
  int pairs;   // of n-tiles
  int first_mi = 0, last_mi = 1;
  int first_pixel, first_channel;  // of the thread, in the block

  // Returns the first pixel's 4 channels.
  SNNLSTM_DEVICE const float* patch(int pair, int mi) const {
    return parked + (4 * pair + 2 * mi) * stride;
  }
  SNNLSTM_DEVICE int pixel(int mi) const { return first_pixel + 16 * mi; }
  SNNLSTM_DEVICE int channel(int pair) const { return first_channel + 16 * pair; }
};

// Runs a convolution, and parks the sums. NT: n-tiles of a warp.
template <class Element, bool Strided, int NT>
SNNLSTM_DEVICE ParkedSums park_sums(const MmaConv& conv, unsigned char* shared,
                                    const Tiling& tiling, const BlockPlace& block) {
  MmaGemm<Element, NT, false, Strided> gemm(conv, shared, tiling, block);
  const int group = gemm.k_group(), threads = int(blockDim.x) / conv.k_groups;
  const int stride = 4 * threads;
  float* parked = reinterpret_cast<float*>(shared) + 4 * (int(threadIdx.x) - group * threads);
  float acc[2][NT][4];
  gemm.run(acc);
  float* sums_of_thread = parked + group * 2 * NT * stride;
  unrolled<NT / 2, 2>([&](int pair, int mi) {
    const auto &a = acc[mi][2 * pair], &b = acc[mi][2 * pair + 1];
    store(sums_of_thread + (4 * pair + 2 * mi) * stride, make_float4(a[0], a[1], b[0], b[1]));
    store(sums_of_thread + (4 * pair + 2 * mi + 1) * stride, make_float4(a[2], a[3], b[2], b[3]));
  });
  ParkedSums sums;
  sums.parked = parked;
  sums.stride = stride;
  sums.pairs = NT / 2;
  sums.first_pixel = gemm.pixel(0);
  sums.first_channel = 4 * gemm.quad();
  if (conv.k_groups == 1) return sums;
  sums.first_mi = sums.last_mi = group;
  if (!fault(Fault::no_k_groups_barrier)) __syncthreads();
  unrolled<NT / 2, 2>([&](int pair, int px) {
    float* sum = parked + (4 * pair + 2 * group + px) * stride;
    float4 v = load<float4>(sum);
    const float4 w = load<float4>(sum + 2 * NT * stride);
    v.x += w.x;
    v.y += w.y;
    v.z += w.z;
    v.w += w.w;
    store(sum, v);
  });
  return sums;
}

template <class Element, bool Strided>
SNNLSTM_DEVICE ParkedSums sums_of(int tiles, const MmaConv& conv, unsigned char* shared,
                                  const Tiling& tiling, const BlockPlace& block) {
  if (tiles == 8) return park_sums<Element, Strided, 8>(conv, shared, tiling, block);
  if (tiles == 4) return park_sums<Element, Strided, 4>(conv, shared, tiling, block);
  return park_sums<Element, Strided, 2>(conv, shared, tiling, block);
}

// A kernel has the convolutions of all widths, but only one epilogue. plain: see is_plain().
template <class Element, bool plain>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Element>)
    backward_mma(const __grid_constant__ BackwardMma p) {
  if constexpr (arch::has_mma<Element>) {
    auto* shared = &shared_memory<unsigned char>();
    const BlockPlace block = block_of(p.tiling, blockIdx.x);
    const int channels = 8 * p.tiles;  // all warps have the same
    const BackwardTile<float, plain, KnownStates<Element, plain>, KnownGates<Element>> tile(
        p.neuron, p.tiling, block, block.column * channels, channels,
        reinterpret_cast<float*>(shared + p.vectors));
    if (tile.is_padded()) return wait_for_launch_before();
    tile.load_vectors();
    const ParkedSums sums = sums_of<Element, false>(p.tiles, p.conv, shared, p.tiling, block);
    const MemTile<float> mem_tile{reinterpret_cast<float*>(shared + p.mem_tile), p.mem_pitch};
    auto* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
    tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
      for (int pair = 0; pair < sums.pairs; ++pair)
#pragma unroll 1
        for (int mi = sums.first_mi; mi <= sums.last_mi; ++mi)
          tile.patch(sums.pixel(mi), sums.channel(pair), gather,
                     FromShared<float>{sums.patch(pair, mi), sums.stride}, mem_tile,
                     {row_sums + int(threadIdx.x) / 32 * channels, 4, mi == sums.first_mi});
    });
    __syncthreads();
    tile.write_sums(row_sums, int(blockDim.x) / 32);
  } else {
    trap_without_mma();
  }
}

template <class Element>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Element>)
    data_gradient_mma(const __grid_constant__ Jobs<DataGradientMma> jobs) {
  if constexpr (arch::has_mma<Element>) {
    unsigned index = blockIdx.x;
    const DataGradientMma& p = job_of(jobs.job, unsigned(jobs.job[0].blocks), index);
    if (is_padded(p.lengths, block_of(p.tiling, index))) return;
    auto* shared = &shared_memory<unsigned char>();
    const ParkedSums sums =
        sums_of<Element, true>(p.tiles, p.conv, shared, p.tiling, block_of(p.tiling, index));
    const BlockPlace block = block_of(p.tiling, index);  // computed again to avoid a spill
#pragma unroll 1
    for (int pair = 0; pair < sums.pairs; ++pair)
#pragma unroll 1
      for (int mi = sums.first_mi; mi <= sums.last_mi; ++mi) {
        const PixelPair at = pixel_pair(p.tiling, block, sums.pixel(mi), p.height, p.width);
        float v[2][4];
        load_vector(sums.patch(pair, mi), v[0]);
        load_vector(sums.patch(pair, mi) + sums.stride, v[1]);
        store_patch(p.out, at, block.column * 8 * p.tiles + sums.channel(pair), v);
      }
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
  int columns = 0;  // of the job's tiles
};

template <class R, class T>
__global__ void __launch_bounds__(fma::kThreads, fma::kBlocks<R>)
    backward_fma(const __grid_constant__ BackwardFma p) {
  using Shared = fma::StepShared<R, T>;
  auto* bytes = &shared_memory<unsigned char>();
  auto& shared = *reinterpret_cast<Shared*>(bytes);
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  const int c0 = block.column * T::kColumns;
  const BackwardTile<R> tile(p.neuron, p.tiling, block, c0, T::kColumns, shared.gemm.vectors);
  if (tile.is_padded()) return wait_for_launch_before();
  tile.load_vectors();
  fma::Gemm<R, T> gemm(shared.gemm, p.tiling, block);
  R acc[4][2][4] = {};
  if (!fault(Fault::no_launch_wait_backward_fma)) wait_for_launch_before();
  gemm.add(p.d_gates, acc);
  __syncthreads();

  const MemTile<R> mem_tile{&shared.gemm.a[0][0][0], Shared::kMemPitch};
  R* row_sums = shared.row_sums + fma::pixel_of<T>(0) / 64 * T::kColumns;
  tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {  // not unrolled: the accumulators move instead
      const auto recurrent = [&](R(&d_mem)[2][4]) {
        unrolled<2, 4>([&](int px, int ch) { d_mem[px][ch] = acc[0][px][ch]; });
      };
      tile.patch(fma::pixel_of<T>(i), fma::column_of<T>(), gather, recurrent, mem_tile,
                 {row_sums, 1, i == 0});
      if (!gather)
        unrolled<3, 8>([&](int k, int j) { acc[k][j / 4][j % 4] = acc[k + 1][j / 4][j % 4]; });
    }
  });
  __syncthreads();
  tile.write_sums(shared.row_sums, T::kPixels / 64);
}

template <class R, class T>
SNNLSTM_DEVICE void data_gradient_fma_of(const DataGradientFma& job, unsigned index) {
  const BlockPlace block = block_of(job.tiling, index);
  if (is_padded(job.lengths, block)) return;
  fma::Gemm<R, T> gemm(shared_memory<fma::GemmShared<R, T>>(), job.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(job.d_gates, acc);
  unrolled<4>([&](int i) {
    const PixelPair at = pixel_pair(job.tiling, block, fma::pixel_of<T>(i), job.height, job.width);
    store_patch(job.out, at, block.column * T::kColumns + fma::column_of<T>(), acc[i]);
  });
}

template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    data_gradient_fma(const __grid_constant__ Jobs<DataGradientFma> p) {
  unsigned index = blockIdx.x;
  const DataGradientFma& job = job_of(p.job, unsigned(p.job[0].blocks), index);
  if (sizeof(R) == 8 || job.columns == 64)
    return data_gradient_fma_of<R, fma::Tile<64>>(job, index);
  if constexpr (sizeof(R) == 4) {
    if (job.columns == 32)
      data_gradient_fma_of<R, fma::Tile<32>>(job, index);
    else
      data_gradient_fma_of<R, fma::Tile<16>>(job, index);
  }
}

}  // namespace snnlstm::cuda
