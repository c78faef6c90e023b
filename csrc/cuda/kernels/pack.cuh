// Converts the quantiser's levels and the convolution's weight to what the kernels read.
#pragma once

#include "../planning.h"
#include "mma.cuh"

namespace snnlstm::cuda {

// A kernel's argument passes the levels in stream order, so streams and graphs share no memory.
struct StoreLevels {
  static constexpr int kMost = 256;
  double value[kMost];
  int count = 0;
  void* levels = nullptr;
};

template <class R>
__global__ void __launch_bounds__(StoreLevels::kMost)
    store_levels_kernel(const __grid_constant__ StoreLevels p) {
  const int i = int(threadIdx.x);
  if (i < p.count) static_cast<R*>(p.levels)[i] = R(p.value[i]);
}

// One segment of a pass, and what its kernel packs.
struct Packing {
  PackedPart part;
  void* packed = nullptr;  // of the segment's first block of columns
  const void* weight;      // (4C, Cin + C, places.all), contiguous
  DType type;
  int C, Cp, Cin, taps;
  KernelTaps places;
  int64_t blocks = 0;  // of the launch; 0: the segment is absent

  SNNLSTM_BOTH bool is_mem() const {
    return part.use == Use::mem_to_gates || part.use == Use::gates_to_mem;
  }
  SNNLSTM_BOTH int input_channels() const { return is_mem() ? C : Cin; }
  SNNLSTM_BOTH int depth_channels() const { return part.forward() ? input_channels() : 4 * Cp; }

  // Returns the weight between output channel c of a gate and an input channel of x or mem, or 0 if
  // one of them does not exist.
  template <class R>
  SNNLSTM_DEVICE R at(int gate, int c, int input, int tap) const {
    if (c >= C || input >= input_channels() || tap < 0 || tap >= taps) return 0;
    const int64_t row = int64_t(gate) * C + c;
    const int64_t in = input + (is_mem() ? Cin : 0);
    return read<R>(weight, type, (row * (Cin + C) + in) * places.all + places.place(tap));
  }
  // The same for the backward pass, which reverses the taps. k: a channel of d_gates.
  template <class R>
  SNNLSTM_DEVICE R transposed(int k, int input, int tap) const {
    return k < 4 * Cp ? at<R>(k / Cp, k % Cp, input, taps - 1 - tap) : R(0);
  }
};

// A block packs a chunk of K of a block of columns: fma.cuh. The blocks of the first segment come
// first.
template <class R>
__global__ void __launch_bounds__(kThreads) pack_fma(const __grid_constant__ Jobs<Packing> p) {
  int64_t index = blockIdx.x;
  const Packing& job = job_of(p.job, p.job[0].blocks, index);
  const int64_t chunk = index % job.part.chunks, block = index / job.part.chunks;
  constexpr int kNumbers = fma::kDepth * fma::kColumns;
  R* out = reinterpret_cast<R*>(static_cast<char*>(job.packed) + block * job.part.pitch) +
           chunk * kNumbers;
  const int channels = job.depth_channels();
  for (int i = int(threadIdx.x); i < kNumbers; i += kThreads) {
    const int64_t k = chunk * fma::kDepth + i / fma::kColumns;
    const int column = int(block) * fma::kColumns + i % fma::kColumns;
    const int tap = int(k / channels), channel = int(k % channels);
    out[i] = job.part.forward() ? job.at<R>(column % 4, column / 4, channel, tap)
                                : job.transposed<R>(channel, column, tap);
  }
}

// A block packs a chunk of K of a pair of n-tiles, 16 columns, in the order in which mma.cuh walks.
// The L1 cache holds the block's piece of the weight, some 10 KiB, of which a warp's loads take
// scattered elements. A lane loads 4 words of a k-step: 2 of a column of the first tile, whose
// places in K are 4 words apart, and the same 2 of the second tile.
template <class Element>
__global__ void __launch_bounds__(kThreads) pack_mma(const __grid_constant__ Jobs<Packing> p) {
  using E = MmaElement<Element>;
  constexpr int kPerWord = E::kHalf ? 2 : 1, kPairWords = mma_tile::kPairBytes / 4;
  constexpr int kStepWords = 8, kLaneWords = 4;  // of K in a k-step; of a lane
  int64_t index = blockIdx.x;
  const Packing& job = job_of(p.job, p.job[0].blocks, index);
  const PackedPart& part = job.part;
  const int chunk = int(index % part.chunks), pairs = part.pairs();
  const int pair = int(index / part.chunks) % pairs, block = int(index / part.chunks) / pairs;
  const int steps = chunk + 1 < part.chunks ? 2 : part.tail_steps;
  auto* out = reinterpret_cast<uint32_t*>(static_cast<char*>(job.packed) + block * part.pitch) +
              (int64_t(chunk) * 2 * job.taps * pairs + pair) * kPairWords;
  // Returns the weight for column n of a tile of the pair, channel k of K. Forward the pair is that
  // of a gate. The channels of a pair are ordered as mma.cuh says.
  const auto value = [&](int tile, int n, int k, int tap) {
    const int channel = mma_tile::kChannels * block + 4 * (n / 2) + 2 * tile + n % 2;
    return part.forward() ? job.at<float>(pair, channel, k, tap)
                          : job.transposed<float>(k, channel, tap);
  };
  for (int i = int(threadIdx.x); i < job.taps * steps * kPairWords; i += kThreads) {
    const int unit = i / kPairWords, lane = i / kLaneWords % 32, word = i % kLaneWords;
    const int tap = unit / steps, step = unit % steps;
    const int k = chunk * E::kPerChunk + (step * kStepWords + lane % 4 + word % 2 * 4) * kPerWord;
    const float v = value(word / 2, lane / 4, k, tap);
    uint32_t bits;
    if constexpr (E::kHalf)
      bits = pack<Element>(v, value(word / 2, lane / 4, k + 1, tap));
    else
      bits = from_float<tf32>(v).bits;
    out[int64_t(unit) * pairs * kPairWords + i % kPairWords] = bits;
  }
}

}  // namespace snnlstm::cuda
