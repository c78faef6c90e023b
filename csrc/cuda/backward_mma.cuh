// One step of the backward pass on tensor cores: the gradient of mem through the gates of the step
// after (a convolution with the transposed weights), and behind it the pointwise backward of this
// step. The same convolution alone, data_gradient_mma, gives the gradients of x and of the first
// mem.
//
// Columns are channels: NT n-tiles a warp, in pairs of 16 channels. A thread holds 2 pixels x 4
// channels of each pair in each of its two m16 tiles; these lie in shared memory while the epilogue
// goes over them one by one.
#pragma once

#include "mma.cuh"
#include "neuron_backward.cuh"

namespace snnlstm::cuda {

struct BackwardMma {
  Tiling tiling;
  MmaConv conv;
  NeuronBackward neuron;
  // in shared memory, bytes
  int mem_tile = 0, mem_pitch = 0;
  int vectors = 0, row_sums = 0;
};

// A convolution whose sums are stored, for images of height x width.
struct DataGradientMma {
  Tiling tiling;
  MmaConv conv;
  Tensor out;
  int height = 0, width = 0;
  int tiles = 0;   // n-tiles of a warp
  int blocks = 0;  // 0: the job is absent
};

// The gradients of x and of the first mem come from one launch.
struct DataGradientsMma {
  DataGradientMma job[2];
};

constexpr int kBackwardThreads = 128;
// Blocks that a multiprocessor holds: in parts, each accumulator has a total beside it.
template <class Element>
constexpr int kBackwardBlocks = std::is_same_v<Element, mma_gemm::Parts> ? 2 : 3;

// A block's sums in shared memory, in patches of 2 pixels x 4 channels. Two groups of warps sum
// over one half of K each; then each group goes on with one of the m16 tiles.
template <class Element, int NT, bool Strided>
class BackwardSums {
 public:
  SNNLSTM_DEVICE BackwardSums(const MmaConv& conv, unsigned char* shared, const Tiling& tiling,
                              const Block& block)
      : gemm_(conv, shared, tiling, block) {
    const int group = gemm_.k_group(), threads = int(blockDim.x) / conv.k_groups;
    float acc[2][NT][4];
    gemm_.run(acc);
    parked_ = reinterpret_cast<float*>(shared) + 4 * (int(threadIdx.x) - group * threads);
    float* own = parked_ + group * 8 * NT * threads;
    stride = 4 * threads;
    unrolled<NT / 2, 2>([&](int pair, int mi) {
      const auto &a = acc[mi][2 * pair], &b = acc[mi][2 * pair + 1];
      store(own + (4 * pair + 2 * mi) * stride, make_float4(a[0], a[1], b[0], b[1]));
      store(own + (4 * pair + 2 * mi + 1) * stride, make_float4(a[2], a[3], b[2], b[3]));
    });
    if (conv.k_groups == 1) return;
    first_mi = last_mi = group;
    if (!fault(Fault::missing_barrier_read, 7)) __syncthreads();
    unrolled<NT / 2, 2>([&](int pair, int px) {
      float* sum = parked_ + (4 * pair + 2 * group + px) * stride;
      float4 v = load<float4>(sum);
      const float4 w = load<float4>(sum + 8 * NT * threads);
      v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
      store(sum, v);
    });
  }

  // The first pixel's 4 channels; the second's lie `stride` behind.
  SNNLSTM_DEVICE const float* patch(int pair, int mi) const {
    return parked_ + (4 * pair + 2 * mi) * stride;
  }
  // The patch's first pixel, and the first of its channels in the block.
  SNNLSTM_DEVICE int pixel(int mi) const { return gemm_.pixel(mi); }
  SNNLSTM_DEVICE int channel(int pair) const {
    return gemm_.warp_column() * 8 * NT + 16 * pair + 4 * gemm_.quad();
  }
  // The warp's number among those of the same channels: (pixels of the block / 32) * groups of
  // them.
  SNNLSTM_DEVICE int row() const { return gemm_.k_group() * rows_of_group() + gemm_.warp_row(); }
  SNNLSTM_DEVICE int rows_of_group() const { return gemm_.rows(); }

  int stride;
  int first_mi = 0, last_mi = 1;

 private:
  MmaGemm<Element, NT, false, Strided> gemm_;
  float* parked_;
};

template <class Element, int NT>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Element>)
    backward_mma(const __grid_constant__ BackwardMma p) {
  if constexpr (arch::has_mma) {
    auto* shared = &shared_memory<unsigned char>();
    const Block block = block_of(p.tiling, blockIdx.x);
    const int channels = p.conv.warp_columns * 8 * NT;
    const BackwardTile<float> tile(p.neuron, p.tiling, block, block.column * channels, channels,
                                   reinterpret_cast<float*>(shared + p.vectors));
    tile.load_vectors();
    const BackwardSums<Element, NT, false> sums(p.conv, shared, p.tiling, block);
    const MemTile<float> mem_tile{reinterpret_cast<float*>(shared + p.mem_tile), p.mem_pitch};
    auto* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
    tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
      for (int pair = 0; pair < NT / 2; ++pair)
#pragma unroll 1
        for (int mi = sums.first_mi; mi <= sums.last_mi; ++mi)
          tile.patch(sums.pixel(mi), sums.channel(pair), gather, sums.patch(pair, mi), sums.stride,
                     mem_tile, row_sums + sums.row() * channels, 4, mi == sums.first_mi);
    });
    __syncthreads();
    tile.write_sums(row_sums, p.conv.k_groups * sums.rows_of_group());
  }
}

template <class Element, int NT>
SNNLSTM_DEVICE void data_gradient(const DataGradientMma& p, unsigned index) {
  const Block block = block_of(p.tiling, index);
  const BackwardSums<Element, NT, true> sums(p.conv, &shared_memory<unsigned char>(), p.tiling,
                                             block);
  const int c0 = block.column * p.conv.warp_columns * 8 * NT;
#pragma unroll 1
  for (int pair = 0; pair < NT / 2; ++pair)
#pragma unroll 1
    for (int mi = sums.first_mi; mi <= sums.last_mi; ++mi) {
      const PixelPair at = pixel_pair(p.tiling, block, sums.pixel(mi), p.height, p.width);
      float v[2][4];
      load_vector(sums.patch(pair, mi), v[0]);
      load_vector(sums.patch(pair, mi) + sums.stride, v[1]);
      store_patch(p.out, at, c0 + sums.channel(pair), v);
    }
}

template <class Element>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Element>)
    data_gradient_mma(const __grid_constant__ DataGradientsMma p) {
  if constexpr (arch::has_mma) {
    unsigned index = blockIdx.x;
    const DataGradientMma& job = job_of(p.job, unsigned(p.job[0].blocks), index);
    if (job.tiles == 8)
      data_gradient<Element, 8>(job, index);
    else
      data_gradient<Element, 2>(job, index);
  }
}

}  // namespace snnlstm::cuda
