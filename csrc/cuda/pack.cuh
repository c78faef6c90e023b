// From the convolution's weight to the layouts that the kernels read: one thread an element.
#pragma once

#include "fma.cuh"

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
  int C, Cp, Cin, taps;
  Use use;

  bool forward() const { return use == Use::x_to_gates || use == Use::mem_to_gates; }
  int input_channels() const {
    return use == Use::x_to_gates || use == Use::gates_to_x ? Cin : C;
  }
  // Columns: channels with their gates, or channels.
  int columns() const { return forward() ? 4 * C : input_channels(); }
  int depth_channels() const { return forward() ? input_channels() : 4 * Cp; }
};

// The weight between output channel c of a gate and an input channel of the half that is packed.
template <class S>
SNNLSTM_DEVICE RealOf<S> weight_at(const WeightMap& map, int gate, int c, int input, int tap) {
  const bool mem = map.use == Use::mem_to_gates || map.use == Use::gates_to_mem;
  if (c >= map.C || input >= (mem ? map.C : map.Cin) || tap >= map.taps) return 0;
  const int64_t row = int64_t(gate) * map.C + c;
  const int64_t in = input + (mem ? map.Cin : 0);
  return to_real(
      static_cast<const S*>(map.weight)[(row * (map.Cin + map.C) + in) * map.taps + tap]);
}

// packed: (column blocks, K, 64), see fma.cuh. One block per 64 columns and chunk of K.
template <class S>
__global__ void __launch_bounds__(fma::kThreads)
    pack_fma(const WeightMap map, RealOf<S>* packed, int64_t depth, int channels) {
  const int64_t chunk = blockIdx.x;
  const int columns = int(blockIdx.y) * fma::kColumns;
  RealOf<S>* out = packed + (blockIdx.y * depth + chunk * fma::kDepth) * fma::kColumns;
  for (int i = int(threadIdx.x); i < fma::kDepth * fma::kColumns; i += fma::kThreads) {
    const int64_t k = chunk * fma::kDepth + i / fma::kColumns;
    const int column = columns + i % fma::kColumns;
    const int tap = int(k / channels), channel = int(k % channels);
    const bool forward = map.use == Use::x_to_gates || map.use == Use::mem_to_gates;
    out[i] = forward ? weight_at<S>(map, column % 4, column / 4, channel, tap)
             : tap < map.taps
                 ? weight_at<S>(map, channel / map.Cp, channel % map.Cp, column, map.taps - 1 - tap)
                 : RealOf<S>(0);
  }
}

}  // namespace snnlstm::cuda
