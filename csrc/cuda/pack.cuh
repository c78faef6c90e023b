// From the convolution's weight to the layouts that the kernels read: one thread an element.
#pragma once

#include "fma.cuh"
#include "mma.cuh"

namespace snnlstm::cuda {

// What a packed weight is for.
enum class Use : int {
  x_to_gates,    // columns: (channel, gate)         K channels: Cin
  mem_to_gates,  // columns: (channel, gate)         K channels: C
  gates_to_x,    // columns: Cin   K channels: (gate, channel), Cp of them a gate   taps reversed
  gates_to_mem,  // columns: C
};

struct WeightMap {
  const void* weight;  // (4C, Cin + C, kernel_h, kernel_w), contiguous
  DType type;
  int C, Cp, Cin, taps;
  Use use;

  SNNLSTM_BOTH bool forward() const { return use == Use::x_to_gates || use == Use::mem_to_gates; }
  SNNLSTM_BOTH int input_channels() const {
    return use == Use::x_to_gates || use == Use::gates_to_x ? Cin : C;
  }
  // Columns: channels with their gates, or channels.
  SNNLSTM_BOTH int columns() const { return forward() ? 4 * C : input_channels(); }
  SNNLSTM_BOTH int depth_channels() const { return forward() ? input_channels() : 4 * Cp; }
};

// The weight between output channel c of a gate and an input channel of the half that is packed.
template <class R>
SNNLSTM_DEVICE R weight_at(const WeightMap& map, int gate, int c, int input, int tap) {
  const bool mem = map.use == Use::mem_to_gates || map.use == Use::gates_to_mem;
  if (c >= map.C || input >= (mem ? map.C : map.Cin) || tap >= map.taps) return 0;
  const int64_t row = int64_t(gate) * map.C + c;
  const int64_t in = input + (mem ? map.Cin : 0);
  return read<R>(map.weight, map.type, (row * (map.Cin + map.C) + in) * map.taps + tap);
}

// packed: (column blocks, K, 64), see fma.cuh. One block per 64 columns and chunk of K.
template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    pack_fma(const WeightMap map, R* packed, int64_t depth, int channels) {
  const int64_t chunk = blockIdx.x;
  const int columns = int(blockIdx.y) * fma::kColumns;
  R* out = packed + (blockIdx.y * depth + chunk * fma::kDepth) * fma::kColumns;
  for (int i = int(threadIdx.x); i < fma::kDepth * fma::kColumns; i += fma::kThreads) {
    const int64_t k = chunk * fma::kDepth + i / fma::kColumns;
    const int column = columns + i % fma::kColumns;
    const int tap = int(k / channels), channel = int(k % channels);
    out[i] = map.forward() ? weight_at<R>(map, column % 4, column / 4, channel, tap)
             : tap < map.taps
                 ? weight_at<R>(map, channel / map.Cp, channel % map.Cp, column, map.taps - 1 - tap)
                 : R(0);
  }
}

// Units of one segment in the order in which mma.cuh walks; see there for what a unit holds.
struct MmaPacking {
  WeightMap map;
  Multiply multiply = Multiply::tf32;
  int channels = 0;   // of the walk: K channels, or with patches (tap, channel)
  bool patches = false;
  int taps = 1;       // of the walk
  int units = 0;      // of this segment
  int64_t pitch = 0;  // words from one column block to the next
  int tiles = 2, warp_columns = 1;
};

// One thread a word of 32 bits: two 16-bit weights of neighbouring channels, or one float.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    pack_mma(const __grid_constant__ MmaPacking p, uint32_t* packed) {
  const bool half = p.multiply == Multiply::fp16 || p.multiply == Multiply::bf16;
  const int per_word = half ? 2 : 1, per_step = 8 * per_word;
  const int unit_words = p.warp_columns * (p.tiles / 2) * (mma_gemm::kPairBytes / 4);
  const int64_t i = int64_t(blockIdx.x) * Threads + threadIdx.x;
  const int unit = int(i / unit_words);
  if (unit >= p.units) return;
  int rest = int(i % unit_words);
  const int word = rest % 4, lane = rest / 4 % 32, pair = rest / 128 % (p.tiles / 2);
  const int warp_column = rest / 128 / (p.tiles / 2);

  // K: unit = (chunk, tap, step); all chunks but the last have two steps
  const int full = 2 * p.taps, chunk = unit / full;
  const int chunks = (p.channels + 2 * per_step - 1) / (2 * per_step);
  const int steps = chunk + 1 < chunks ? 2 : (p.units - chunk * full) / p.taps;
  const int tap = (unit - chunk * full) / steps, step = (unit - chunk * full) % steps;
  const int k = (2 * chunk + step) * per_step + (lane % 4 + word % 2 * 4) * per_word;

  // N: which gate and channel the column is
  const bool forward = p.map.forward();
  const int n = lane / 4, tile = 2 * pair + word / 2;
  const int warps = int(blockIdx.y) * p.warp_columns + warp_column;
  const int of_pair = 4 * (n / 2) + 2 * (tile % 2) + n % 2;  // mma.cuh: pairs of n-tiles
  int gate = 0, column;
  if (!forward)
    column = warps * 8 * p.tiles + 16 * pair + of_pair;
  else if (p.tiles == 8)
    gate = pair, column = warps * 16 + of_pair;
  else
    gate = tile, column = warps * 8 + n;

  float value[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    int channel = k + e, source_tap = tap;
    if (p.patches) source_tap = channel / p.map.Cin, channel %= p.map.Cin;
    if (e >= per_word || channel >= p.map.depth_channels()) continue;
    value[e] = forward ? weight_at<float>(p.map, gate, column, channel, source_tap)
                       : weight_at<float>(p.map, channel / p.map.Cp, channel % p.map.Cp, column,
                                      p.map.taps - 1 - source_tap);
  }
  uint32_t bits;
  if (half)
    bits = pack16(p.multiply == Multiply::bf16 ? DType::bfloat16 : DType::float16, value[0],
                  value[1]);
  else if (p.multiply == Multiply::tf32)
    bits = from_float<tf32>(value[0]).bits;
  else
    bits = detail::bits_of(value[0]);
  packed[blockIdx.y * p.pitch + i] = bits;
}

}  // namespace snnlstm::cuda
