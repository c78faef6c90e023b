// One step of the backward pass on tensor cores: the gradient of mem through the gates of the step
// after (a convolution with the transposed weights), and behind it the pointwise backward of this
// step. The same convolution alone gives the gradients of x and of the first mem.
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
  Tensor out;  // present: the convolution is stored here, and nothing else is done
  // in shared memory, bytes
  int mem_tile = 0, mem_pitch = 0;
  int vectors = 0, row_sums = 0;
};

constexpr int kBackwardThreads = 128;

template <class Element, int NT>
__global__ void __launch_bounds__(kBackwardThreads,
                                  std::is_same_v<Element, mma_gemm::Parts> ? 2 : 3)
    backward_mma(const __grid_constant__ BackwardMma p) {
  if constexpr (arch::has_mma) {
    auto* shared = &shared_memory<unsigned char>();
    const Block block = block_of(p.tiling, blockIdx.x);
    const int channels = p.conv.warp_columns * 8 * NT, c0 = block.column * channels;
    const BackwardTile<float> tile(p.neuron, p.tiling, block, c0, channels,
                                   reinterpret_cast<float*>(shared + p.vectors));
    if (!p.out.present()) tile.load_vectors();
    MmaGemm<Element, NT, false> gemm(p.conv, shared, p.tiling, block);
    float acc[2][NT][4];
    gemm.run(acc);

    // Of two groups of warps, which have summed over the two halves of K, the first goes on with
    // the first m16 tile and the second with the second.
    const int groups = p.conv.k_groups, group = gemm.k_group();
    const int threads = int(blockDim.x) / groups;
    auto* parked = reinterpret_cast<float*>(shared) + 4 * (int(threadIdx.x) - group * threads);
    auto* own = parked + group * 8 * NT * threads;
    const int stride = 4 * threads;
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair)
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        const auto &a = acc[mi][2 * pair], &b = acc[mi][2 * pair + 1];
        store(own + (4 * pair + 2 * mi) * stride, make_float4(a[0], a[1], b[0], b[1]));
        store(own + (4 * pair + 2 * mi + 1) * stride, make_float4(a[2], a[3], b[2], b[3]));
      }
    if (groups == 2) {
      if (!fault(Fault::missing_barrier_read, 7)) __syncthreads();
#pragma unroll
      for (int pair = 0; pair < NT / 2; ++pair)
#pragma unroll
        for (int px = 0; px < 2; ++px) {
          float* sum = parked + (4 * pair + 2 * group + px) * stride;
          float4 v = load<float4>(sum);
          const float4 w = load<float4>(sum + 8 * NT * threads);
          v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
          store(sum, v);
        }
    }
    const int first_mi = groups == 2 ? group : 0, last_mi = groups == 2 ? group : 1;
    const MemTile<float> mem_tile{reinterpret_cast<float*>(shared + p.mem_tile), p.mem_pitch};
    const int rows = threads / 32 / p.conv.warp_columns;
    auto* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
    float* own_sums = row_sums + (group * rows + gemm.warp_row()) * channels;
#pragma unroll 1
    for (int phase = tile.gathers() && !p.out.present() ? 0 : 1; phase < 2; ++phase) {
#pragma unroll 1
      for (int pair = 0; pair < NT / 2; ++pair) {
        const int first = gemm.warp_column() * 8 * NT + 16 * pair + 4 * gemm.quad();
#pragma unroll 1
        for (int mi = first_mi; mi <= last_mi; ++mi) {
          const float* patch = parked + (4 * pair + 2 * mi) * stride;
          if (p.out.present()) {
            const Place at = place_of(p.tiling, block, gemm.pixel(mi), p.neuron.Ho, p.neuron.Wo);
            float v[2][4];
            load_vector(patch, v[0]), load_vector(patch + stride, v[1]);
            store_patch(p.out, at, c0 + first, v);
          } else {
            tile.patch(gemm.pixel(mi), first, phase == 0, patch, stride, mem_tile, own_sums, 4,
                       mi == first_mi);
          }
        }
      }
      if (phase == 0) {
        __syncthreads();
        tile.spread(mem_tile);
        __syncthreads();
      }
    }
    if (p.out.present()) return;
    __syncthreads();
    tile.write_sums(row_sums, groups * rows);
  }
}

}  // namespace snnlstm::cuda
