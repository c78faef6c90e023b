// The kernels of one forward step. A thread has the four gates of its channels.
#pragma once

#include "fma.cuh"
#include "mma.cuh"
#include "neuron_forward.cuh"

namespace snnlstm::cuda {

// ---- on tensor cores ----------------------------------------------------------------------------
//
// See mma.cuh for the tile. A warp's n-tiles are
//   Tiles = 2: 4 gates x (pair of tiles of 16 channels), a thread holds 4 neighbouring channels
//   Tiles = 1: 4 gates x (tile of 8 channels), a thread holds 2

struct ForwardMma {
  Tiling tiling;
  MmaConv conv;
  NeuronForward neuron;
  int mem_pitch = 0;  // of the mem tile
  int vectors = 0;    // bytes of shared memory before the biases and thresholds
};

constexpr int kMmaThreads = 256;

// The number of blocks of a multiprocessor. In 3xTF32 each accumulator also has a total.
template <class Element>
constexpr int kMmaBlocks = std::is_same_v<Element, tf32x3> ? 1 : 2;

// Orders the sums that a thread holds of an m16 tile as sum[gate][pixel][channel].
template <int Tiles>
SNNLSTM_DEVICE void take(const float (&acc)[4 * Tiles][4], float (&sum)[4][2][2 * Tiles]) {
  unrolled<4, Tiles>([&](int gate, int half) {
    unrolled<4>([&](int r) { sum[gate][r / 2][2 * half + r % 2] = acc[gate * Tiles + half][r]; });
  });
}

// plain: see is_plain().
template <class Element, int Tiles, bool plain>
__global__ void __launch_bounds__(kMmaThreads, kMmaBlocks<Element>)
    forward_mma(const __grid_constant__ ForwardMma p) {
  if constexpr (arch::has_mma<Element>) {
    constexpr int kTiles = 4 * Tiles;
    constexpr int kPerThread = 2 * Tiles;
    constexpr int kChannels = 8 * Tiles;
    auto* shared = &shared_memory<unsigned char>();
    // The place is computed twice, because ptxas spills on sm_90 if it is kept from here on.
    if (!plain && p.neuron.fire.is_padded(block_of(p.tiling, blockIdx.x).n))
      return wait_for_launch_before();
    const BlockPlace block = block_of(p.tiling, blockIdx.x);
    const int channels = p.conv.warp_columns * kChannels;
    auto* vectors = reinterpret_cast<float*>(shared + p.vectors);
    const ForwardTile<float, plain, KnownStates<Element, plain>, KnownGates<Element>> tile(
        p.neuron, p.tiling, block, block.column * channels, channels, vectors);
    tile.load_vectors();
    MmaGemm<Element, kTiles, true> gemm(p.conv, shared, p.tiling, block);
    float acc[2][kTiles][4];
    gemm.run(acc);

    // The second m16 tile waits in shared memory, since the epilogue needs its registers.
    auto* parked = reinterpret_cast<float*>(shared);
    const int stride = 4 * int(blockDim.x), offset = 4 * int(threadIdx.x);
    const auto place = [&](int k) { return parked + (k * stride + offset); };
    float sum[4][2][kPerThread], *flat = &sum[0][0][0];
    take<Tiles>(acc[1], sum);
    unrolled<kTiles>([&](int k) {
      store(place(k), make_float4(flat[4 * k], flat[4 * k + 1], flat[4 * k + 2], flat[4 * k + 3]));
    });
    take<Tiles>(acc[0], sum);
    const MemTile<float> mem_tile{parked + 8 * kPerThread * int(blockDim.x), p.mem_pitch};
    const int first = gemm.warp_column() * kChannels + kPerThread * gemm.quad();
#pragma unroll 1
    for (int mi = 0; mi < 2; ++mi) {
      if (mi == 1)
        unrolled<kTiles>([&](int k) {
          const auto v = load<float4>(place(k));
          flat[4 * k] = v.x;
          flat[4 * k + 1] = v.y;
          flat[4 * k + 2] = v.z;
          flat[4 * k + 3] = v.w;
        });
      tile.patch(gemm.pixel(mi), first, sum, mem_tile);
    }
    __syncthreads();
    tile.finish(mem_tile);
  } else {
    trap_without_mma();
  }
}

// ---- without tensor cores -----------------------------------------------------------------------
//
// See fma.cuh for the tile. A thread's 4 columns are the four gates of one channel, so a block
// covers 16 channels, or 8.

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

template <class R, class T>
__global__ void __launch_bounds__(fma::kThreads, fma::kBlocks<R>)
    forward_fma(const __grid_constant__ ForwardFma p) {
  constexpr int kChannels = T::kColumns / 4;
  static_assert(kChannels * T::kMemPitch * sizeof(R) <= sizeof(fma::GemmShared<R, T>::a),
                "the mem tile overwrites A");
  auto& shared = shared_memory<fma::GemmShared<R, T>>();
  const BlockPlace block = block_of(p.tiling, blockIdx.x);
  if (p.neuron.fire.is_padded(block.n)) return wait_for_launch_before();
  const ForwardTile<R> tile(p.neuron, p.tiling, block, block.column * kChannels, kChannels,
                            shared.vectors);
  tile.load_vectors();
  fma::Gemm<R, T> gemm(shared, p.tiling, block);
  R acc[4][2][4] = {};
  gemm.add(p.x, acc);
  if (!fault(Fault::no_launch_wait_forward_fma)) wait_for_launch_before();
  gemm.add(p.mem, acc);
  __syncthreads();  // shared memory becomes the mem tile

  const MemTile<R> mem_tile{&shared.a[0][0][0], T::kMemPitch};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {  // not unrolled: the accumulators move instead
    R sum[4][2][1];
    take_pair(acc, sum);
    tile.patch(fma::pixel_of<T>(i), fma::column_of<T>() / 4, sum, mem_tile);
  }
  __syncthreads();
  tile.finish(mem_tile);
}

}  // namespace snnlstm::cuda
