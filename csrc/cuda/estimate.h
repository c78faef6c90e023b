// Estimates what is fastest for a layer: our fused kernels, or torch's convolution (cuDNN) with our
// neurons behind it. Nothing is measured: both are taken to be bound by arithmetic or by memory,
// whichever is slower.
//
//   fused      reads x, mem, syn; writes spk, syn, mem; multiplies with mma.sync
//   pointwise  also writes cat[x, mem] and the gate sums and reads both again; cuDNN multiplies
//              with the newest instructions (wgmma on sm_90, tcgen05 on sm_100), whose rate
//              mma.sync does not reach
#pragma once

#include "step_plans.h"

namespace snnlstm::cuda {

// From NVIDIA's data sheets, without sparsity.
struct Rates {
  double half, tf32, fp32;  // 10^12 multiply-adds a second, all multiprocessors together
  double bytes;             // 10^12 a second
  // The part of the rate that mma.sync can reach: 1 if it is the newest instruction; on sm_90 what
  // Luo et al. 2024 measure, https://arxiv.org/abs/2402.13499; on sm_100 a guess.
  double mma_sync;
  int multiprocessors;
};

inline Rates rates_of(const Device& t) {
  Rates r = t.compute_capability >= 120   ? Rates{210, 105, 52, 1.8, 1.0, 170}    // RTX 5090
            : t.compute_capability >= 100 ? Rates{1125, 560, 37, 8.0, 0.5, 148}   // B200
            : t.compute_capability >= 90  ? Rates{495, 247, 33, 3.35, 0.62, 132}  // H100
            : t.compute_capability >= 89  ? Rates{83, 41, 41, 1.0, 1.0, 128}      // RTX 4090
            : t.compute_capability >= 86  ? Rates{36, 18, 18, 0.94, 1.0, 82}      // RTX 3090
            : t.compute_capability >= 80  ? Rates{156, 78, 9.7, 1.55, 1.0, 108}   // A100
                                          : Rates{33, 4, 4, 0.32, 1.0, 40};       // T4
  const double part = double(t.multiprocessors) / r.multiprocessors;
  r.half *= part, r.tf32 *= part, r.fp32 *= part;
  return r;
}

// Guesses: no GPU has been timed. `python -m benchmarks --device cuda --shapes gpu --kernels` would
// measure them: it prints the time of each kernel, and the layer gives the number of operations.
namespace guessed {
// The parts of a data sheet's rates that kernels reach on the layers wide64 and wide128: cuDNN's
// convolution under snnlstm-pointwise; "forward step (mma)", as a part of what mma.sync can reach;
// "forward step (fma)" in float32.
constexpr double cudnn_part = 0.7, mma_part = 0.75, fma_part = 0.5;
// Seconds that the launches of a step around cuDNN (cat, convolution, neurons) take more than one
// launch of ours. The difference of snnlstm-pointwise and snnlstm on a layer without work, such as
// --shape "50 1 1 1 4 4 1", would measure it.
constexpr double pointwise_launches = 8e-6;
}  // namespace guessed

// Returns the multiply-adds a second of our kernels; three products of 3xTF32 are one.
inline double kernel_rate(const Rates& r, Multiply m) {
  if (m == Multiply::fma) return r.fp32 * guessed::fma_part * 1e12;
  const double of_type = is_half(m) ? r.half : m == Multiply::tf32x3 ? r.tf32 / 3 : r.tf32;
  return of_type * r.mma_sync * guessed::mma_part * 1e12;
}

// Returns whether three tf32 products take less time than one product in float32.
inline bool tensor_cores_beat_fma(const Device& device) {
  const Rates r = rates_of(device);
  return device.compute_capability >= 80 &&
         kernel_rate(r, Multiply::tf32x3) > kernel_rate(r, Multiply::fma);
}

// Returns whether a step behind torch's convolution takes less time than a fused step.
inline bool pointwise_pays(const Cell& c, const Device& device, const ForwardPlan& plan) {
  const Rates r = rates_of(device);
  const Shape s(c);
  const double neurons = double(c.N) * s.pixels * c.C;
  const double products = 4 * neurons * s.taps * (c.Cin + c.C);
  const bool half = is_half(plan.multiply);
  const double size = bytes_of(c.dtype), operand = half ? 2 : size;

  // The rate of what cuDNN would multiply with.
  const double rate = (half ? r.half : plan.multiply == Multiply::tf32 ? r.tf32 : r.fp32) * 1e12;
  const double state_bytes = (double(c.N) * c.Cin * c.H * c.W + 5 * neurons) * size;
  const double extra_bytes =
      2 * (double(c.N) * c.Cin * c.H * c.W + neurons + 4 * neurons) * operand;
  const double ours =
      std::max(products / kernel_rate(r, plan.multiply), state_bytes / (r.bytes * 1e12));
  const double theirs = products / (rate * guessed::cudnn_part) +
                        (state_bytes + extra_bytes) / (r.bytes * 1e12) +
                        guessed::pointwise_launches;
  return theirs < ours;
}

}  // namespace snnlstm::cuda
