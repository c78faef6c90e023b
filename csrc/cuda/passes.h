// What a plan has computed for its pass: the launchers read it, and add addresses and strides.
#pragma once

#include "planning.h"

namespace snnlstm::cuda {

struct PassTypes {
  Shape s;  // of the cell as the kernels run it
  KernelTaps taps;
  DType type, real, gates;  // of the states, of sums, of gates

  // c: the caller's.
  PassTypes(const Cell& c, Matrix matrix)
      : s(as_run(c)), taps(c), type(c.dtype), real(real_of(type)), gates(gate_type(type, matrix)) {}
};

// forward.cu
struct ForwardPass : PassTypes {
  ForwardPlan step;
  PackedForward packed;
  int64_t workspace;

  ForwardPass(const Cell& cell, const Device& device, Matrix matrix, const BlockChoice& only);
  void run(const ForwardArgs& args, void* stream) const;
};

// backward.cu
struct BackwardPass : PassTypes {
  bool spreads = true;  // no pooling window crosses a tile: the step needs no kernel before it
  DataPlan to_mem, to_x;
  PackedBackward packed;
  bool hybrid;  // torch forms the gradients of weight and bias
  WeightPlans weights;
  int bias_splits;
  int64_t workspace;

  // multiply: the forward pass's.
  BackwardPass(const Cell& cell, const Device& device, Matrix matrix, Multiply multiply,
               Algorithm algorithm, const BlockChoice& only);
  void run(const BackwardArgs& args, void* stream) const;

  int64_t pixels() const { return s.c.T * s.c.N * s.pixels; }
};

// neurons.cu
struct CudnnPass : PassTypes {
  Tiling tiling;
  bool whole_windows;
  int64_t workspace;  // of the backward pass

  CudnnPass(const Cell& cell, Matrix matrix);
  void run(const ForwardArgs& args, void* stream) const;
  void run(const BackwardArgs& args, void* stream) const;
};

}  // namespace snnlstm::cuda
