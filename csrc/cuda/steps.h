// What a pass has computed for its steps. The launchers add addresses and strides.
#pragma once

#include <stdexcept>

#include "planning.h"

namespace snnlstm::cuda {

struct Steps {
  Shape s;  // of the cell as the kernels run it
  KernelTaps taps;
  DType type, real, gates;  // of the states, of sums, of gates
  Packed packed;            // cudnn: nothing
  int64_t workspace = 0;
  Multiply multiply = Multiply::fma;  // cudnn: unused
  int64_t blocks = 0;                 // of the largest launch
  int64_t shared_bytes = 0;           // that a block needs, whatever the plan

  // c: the caller's.
  Steps(const Cell& c, Matrix matrix)
      : s(as_run(c)), taps(c), type(c.dtype), real(real_of(type)), gates(gate_type(type, matrix)) {}
  virtual ~Steps() = default;
  virtual void forward(const ForwardArgs&, void*) const { refuse(); }
  virtual void backward(const BackwardArgs&, void*) const { refuse(); }

 private:
  static void refuse() { throw std::logic_error("the pass has the other direction"); }
};

// forward.cu
struct ForwardSteps : Steps {
  StepBlocks step;

  ForwardSteps(const Cell& cell, const Device& device, Matrix matrix);
  void forward(const ForwardArgs& args, void* stream) const override;
};

// backward.cu
struct BackwardSteps : Steps {
  StepBlocks to_mem, to_x;
  WeightBlocks weights;
  int bias_splits;

  BackwardSteps(const Cell& cell, const Device& device, Matrix matrix);
  void backward(const BackwardArgs& args, void* stream) const override;
  int64_t pixels() const { return s.c.T * s.c.N * s.pixels; }
};

// neurons.cu
struct CudnnSteps : Steps {
  Tiling tiling;
  int64_t sums_bytes = 0;  // backward: the threshold's gradient, (tiles, pitch), before the spikes'

  CudnnSteps(const Cell& cell, Matrix matrix, bool backward);
  void forward(const ForwardArgs& args, void* stream) const override;
  void backward(const BackwardArgs& args, void* stream) const override;
  int pitch() const;  // channels of all blocks
};

}  // namespace snnlstm::cuda
