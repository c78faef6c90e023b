// The kernels of one step of the backward pass. A convolution of the next step's d_gates with the
// transposed weights gives the gradient of mem; the neurons' backward pass of the step follows in
// the same kernel. The convolution alone (data_gradient_*) gives the gradients of x and of the
// first mem.
//
// On tensor cores columns are channels: a warp has NT n-tiles, in pairs of 16 channels. A thread
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
// Blocks that a multiprocessor holds. In parts, each accumulator has a total beside it.
template <class Element>
constexpr int kBackwardBlocks = std::is_same_v<Element, mma_gemm::Parts> ? 2 : 3;

// A block's sums of a convolution in shared memory, in patches of 2 pixels x 4 channels. If there
// are two groups of warps, each sums over one half of K, and then goes on with one of the m16
// tiles.
template <class Element, int NT, bool Strided>
class BackwardSums {
 public:
  SNNLSTM_DEVICE BackwardSums(const MmaConv& conv, unsigned char* shared, const Tiling& tiling,
                              const BlockPlace& block)
      : gemm_(conv, shared, tiling, block) {
    const int group = gemm_.k_group(), threads = int(blockDim.x) / conv.k_groups;
    parked_ = reinterpret_cast<float*>(shared) + 4 * (int(threadIdx.x) - group * threads);
    stride = 4 * threads;
    if (conv.k_groups > 1) first_mi = last_mi = group;
  }

  // Runs the convolution, and parks the sums.
  SNNLSTM_DEVICE void run() {
    float acc[2][NT][4];
    gemm_.run(acc);
    const int group = gemm_.k_group();
    float* own = parked_ + group * 2 * NT * stride;
    unrolled<NT / 2, 2>([&](int pair, int mi) {
      const auto &a = acc[mi][2 * pair], &b = acc[mi][2 * pair + 1];
      store(own + (4 * pair + 2 * mi) * stride, make_float4(a[0], a[1], b[0], b[1]));
      store(own + (4 * pair + 2 * mi + 1) * stride, make_float4(a[2], a[3], b[2], b[3]));
    });
    if (gemm_.k_groups() == 1) return;
    if (!fault(Fault::no_k_groups_barrier)) __syncthreads();
    unrolled<NT / 2, 2>([&](int pair, int px) {
      float* sum = parked_ + (4 * pair + 2 * group + px) * stride;
      float4 v = load<float4>(sum);
      const float4 w = load<float4>(sum + 2 * NT * stride);
      v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
      store(sum, v);
    });
  }

  // Returns the first pixel's 4 channels; the second pixel's lie `stride` behind them.
  SNNLSTM_DEVICE const float* patch(int pair, int mi) const {
    return parked_ + (4 * pair + 2 * mi) * stride;
  }
  // The patch's first pixel, and the first of its channels in the block.
  SNNLSTM_DEVICE int pixel(int mi) const { return gemm_.pixel(mi); }
  SNNLSTM_DEVICE int channel(int pair) const {
    return gemm_.warp_column() * 8 * NT + 16 * pair + 4 * gemm_.quad();
  }
  // The warp's number among all warps, of all groups, that have its channels.
  SNNLSTM_DEVICE int row() const { return gemm_.k_group() * gemm_.rows() + gemm_.warp_row(); }
  SNNLSTM_DEVICE int rows() const { return gemm_.k_groups() * gemm_.rows(); }

  int stride;
  int first_mi = 0, last_mi = 1;

 private:
  MmaGemm<Element, NT, false, Strided> gemm_;
  float* parked_;
};

template <class Element, int NT>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<Element>)
    backward_mma(const __grid_constant__ BackwardMma p) {
  if constexpr (arch::has_mma<Element>) {
    auto* shared = &shared_memory<unsigned char>();
    const BlockPlace block = block_of(p.tiling, blockIdx.x);
    const int channels = p.conv.warp_columns * 8 * NT;
    const BackwardTile<float> tile(p.neuron, p.tiling, block, block.column * channels, channels,
                                   reinterpret_cast<float*>(shared + p.vectors));
    if (tile.is_finished()) return wait_for_launch_before();
    tile.load_vectors();
    BackwardSums<Element, NT, false> sums(p.conv, shared, p.tiling, block);
    sums.run();
    const MemTile<float> mem_tile{reinterpret_cast<float*>(shared + p.mem_tile), p.mem_pitch};
    auto* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
    tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
      for (int pair = 0; pair < NT / 2; ++pair)
#pragma unroll 1
        for (int mi = sums.first_mi; mi <= sums.last_mi; ++mi)
          tile.patch(sums.pixel(mi), sums.channel(pair), gather,
                     FromShared<float>{sums.patch(pair, mi), sums.stride}, mem_tile,
                     {row_sums + sums.row() * channels, 4, mi == sums.first_mi});
    });
    __syncthreads();
    tile.write_sums(row_sums, sums.rows());
  } else {
    trap_without_mma();
  }
}

template <class Element, int NT>
SNNLSTM_DEVICE void data_gradient(const DataGradientMma& p, unsigned index) {
  const BlockPlace block = block_of(p.tiling, index);
  if (is_finished(p.lengths, block)) return;
  BackwardSums<Element, NT, true> sums(p.conv, &shared_memory<unsigned char>(), p.tiling, block);
  sums.run();
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
    data_gradient_mma(const __grid_constant__ Jobs<DataGradientMma> p) {
  if constexpr (arch::has_mma<Element>) {
    unsigned index = blockIdx.x;
    const DataGradientMma& job = job_of(p.job, unsigned(p.job[0].blocks), index);
    if (job.tiles == 8)
      data_gradient<Element, 8>(job, index);
    else
      data_gradient<Element, 2>(job, index);
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

namespace fma {
template <class R, class T>
struct StepShared {
  R row_sums[T::kPixels / 64 * T::kColumns];  // of each row of warps
  GemmShared<R, T> gemm;

  // The mem tile takes the place of A and of what comes behind. Four channels lie on other banks.
  static constexpr int kMemPitch = T::kPixels + 4;
  static constexpr size_t bytes(bool with_mem) {
    constexpr size_t before = sizeof(row_sums) + sizeof(gemm.vectors);
    constexpr size_t pooled = before + sizeof(R) * T::kColumns * kMemPitch;
    return with_mem && pooled > sizeof(StepShared) ? pooled : sizeof(StepShared);
  }
};
}  // namespace fma

template <class R, class T>
__global__ void __launch_bounds__(fma::kThreads, fma::kBlocks<R>)
    backward_fma(const __grid_constant__ BackwardFma p) {
  using Shared = fma::StepShared<R, T>;
  auto* bytes = &shared_memory<unsigned char>();
  auto& shared = *reinterpret_cast<Shared*>(bytes);
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  const int c0 = block.column * T::kColumns;
  const BackwardTile<R> tile(p.neuron, p.tiling, block, c0, T::kColumns, shared.gemm.vectors);
  if (tile.is_finished()) return wait_for_launch_before();
  tile.load_vectors();
  fma::Gemm<R, T> gemm(shared.gemm, p.tiling, block);
  R acc[4][2][4] = {};
  if (!fault(Fault::no_launch_wait_backward_fma)) wait_for_launch_before();
  gemm.add(p.d_gates, acc);
  __syncthreads();

  const MemTile<R> mem_tile{&shared.gemm.a[0][0][0], Shared::kMemPitch};
  R* row_sums = shared.row_sums + T::pixel(0) / 64 * T::kColumns;
  tile.in_phases(mem_tile, [&](bool gather) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {  // not unrolled: the accumulators move instead
      const auto recurrent = [&](R(&d_mem)[2][4]) {
        unrolled<2, 4>([&](int px, int ch) { d_mem[px][ch] = acc[0][px][ch]; });
      };
      tile.patch(T::pixel(i), T::column(), gather, recurrent, mem_tile, {row_sums, 1, i == 0});
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
  if (is_finished(job.lengths, block)) return;
  fma::Gemm<R, T> gemm(shared_memory<fma::GemmShared<R, T>>(), job.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(job.d_gates, acc);
  unrolled<4>([&](int i) {
    const PixelPair at = pixel_pair(job.tiling, block, T::pixel(i), job.height, job.width);
    store_patch(job.out, at, block.column * T::kColumns + T::column(), acc[i]);
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
