// What a plan has computed for its pass. The launchers add addresses and strides.
#pragma once

#include <stdexcept>

#include "planning.h"

namespace snnlstm::cuda {

struct Pass {
  Shape s;  // of the cell as the kernels run it
  KernelTaps taps;
  DType type, real, gates;  // of the states, of sums, of gates
  Packed packed;            // cudnn: nothing
  int64_t workspace = 0;

  // c: the caller's.
  Pass(const Cell& c, Matrix matrix)
      : s(as_run(c)), taps(c), type(c.dtype), real(real_of(type)), gates(gate_type(type, matrix)) {}
  virtual ~Pass() = default;
  virtual void forward(const ForwardArgs&, void*) const { refuse(); }
  virtual void backward(const BackwardArgs&, void*) const { refuse(); }
  virtual const Tiling& tiling() const = 0;  // of a step

 private:
  static void refuse() { throw std::logic_error("the plan is for the other pass"); }
};

// forward.cu
struct ForwardPass : Pass {
  ForwardPlan step;

  ForwardPass(const Cell& cell, const Device& device, Matrix matrix, const BlockChoice& only);
  void forward(const ForwardArgs& args, void* stream) const override;
  const Tiling& tiling() const override { return step.tiling; }
};

// backward.cu
struct BackwardPass : Pass {
  bool spreads = true;  // no pooling window crosses a tile: the step needs no kernel before it
  DataPlan to_mem, to_x;
  bool hybrid;  // torch forms the gradients of weight and bias
  WeightPlans weights;
  int bias_splits;

  // multiply: the forward pass's.
  BackwardPass(const Cell& cell, const Device& device, Matrix matrix, Multiply multiply,
               Algorithm algorithm, const BlockChoice& only);
  void backward(const BackwardArgs& args, void* stream) const override;
  const Tiling& tiling() const override { return to_mem.tiling; }
  int64_t pixels() const { return s.c.T * s.c.N * s.pixels; }
};

// neurons.cu
struct CudnnPass : Pass {
  Tiling of_step;
  bool whole_windows;
  int64_t sums_bytes = 0;  // backward: the threshold's gradient, (tiles, pitch), before the spikes'

  CudnnPass(const Cell& cell, Matrix matrix, bool backward);
  void forward(const ForwardArgs& args, void* stream) const override;
  void backward(const BackwardArgs& args, void* stream) const override;
  const Tiling& tiling() const override { return of_step; }
  int pitch() const;  // channels of all blocks
};

}  // namespace snnlstm::cuda
