// The CUDA half's entry points, twins of csrc/cpu/api.h. All memory is the caller's, on the device;
// nothing here allocates, synchronises or creates a stream, so every call can be captured in a
// graph. Errors (of CUDA, or a shape that cannot be run) are thrown as std::runtime_error.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace snnlstm::cuda {

// In which numbers the convolutions multiply; they always add in float (float64: double).
enum class Matrix : int {
  exact = 0,    // the states' own type; float32 without tensor cores, 16-bit types with them
  tf32 = 1,     // float32 rounded to 10 bits of mantissa
  tf32x3 = 2,   // float32 as two tf32 numbers: full precision from tensor cores
  float16 = 3,  // autocast: states stay float32
  bfloat16 = 4,
};

enum class Algorithm : int {
  automatic = 0,
  fma = 1,  // without tensor cores
  mma = 2,  // with; std::runtime_error where that cannot be
  // torch's own convolution and pointwise_forward() / pointwise_backward(): what choose_algorithm()
  // may say, but nothing that forward() and backward() do
  pointwise = 3,
  fused = 5,     // a launch for every step, with tensor cores or without
  resident = 6,  // the whole sequence in one; std::runtime_error where that cannot be
};

// A device and a way to run on it. Calls that share packed weights, saved tensors or sizes have the
// same target.
struct Target {
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // that one block may have
  void* stream = nullptr;
  Matrix matrix = Matrix::exact;
  Algorithm algorithm = Algorithm::automatic;
  // Rows of kForwardShapes and kDataShapes: the blocks that a step's tensor core kernels have. -1:
  // the largest that give each multiprocessor one.
  int forward_shape = -1, data_shape = -1;
};

// A way for the kernels to run a cell's forward or backward pass.
struct Way {
  std::string name;  // as algorithm_name()'s, with the block's warps
  Target target;
};

// What the current device is. std::runtime_error where there is none.
Target current_target(void* stream);

// Sizes in bytes.
struct Sizes {
  int64_t packed_forward, packed_backward;  // pack_weight()'s result
  int64_t saved_gates, saved_syn;           // for all T steps
  int64_t forward_workspace, backward_workspace;
  int64_t data_workspace;    // of a backward() with d_gates and without grad_weight and grad_bias
  int64_t weight_workspace;  // of weight_gradient()
};

Sizes sizes(const Cell& cell, const Target& target);

// Why no call of a cell can run: images or launches too large to be counted. Empty if it can.
std::string reason_against(const Cell& cell, const Target& target);

// The type in which gates are saved, and in which gate sums are exchanged with torch's convolution:
// the states', or under autocast the matrix type.
DType gate_type(DType states, Matrix matrix);

// C rounded up to whole vectors: saved_gates are (T, N, Ho, Wo, 4, Cp), saved_syn (T - 1, N, Ho,
// Wo, Cp) in the states' type.
int64_t padded_channels(int64_t C);

// The state quantiser's levels into (num_levels,) of the compute type on the device. values: on the
// host, where they may be freed at once.
void store_levels(const Cell& cell, const double* values, void* levels, const Target& target);

// weight: (4C, Cin + C, kernel_h, kernel_w), contiguous, in the cell's dtype.
void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed,
                 const Target& target);

void forward(const ForwardArgs& args, const Target& target);
void backward(const BackwardArgs& args, const Target& target);

// The gradients of weight and bias over the cell's T steps, from d_gates that backward() has left,
// in one call or step by step.
void weight_gradient(const WeightGradArgs& args, const Target& target);

// The neurons alone, one step (cell.T is 1), behind a convolution of torch's. gate_sums: what it
// gives for cat[x, mem], (1, N, 4C, Ho, Wo) of the gate_type(). Of args x, weight and workspace are
// unused; bias is null where the sums hold it already; saved_gates and saved_syn are this step's.
void pointwise_forward(const ForwardArgs& args, const View& gate_sums, const Target& target);

// args.d_gates must be given. mem_after: of this step, (N, Ho, Wo, Cp). Of args x, mem0, weight,
// grad_x, grad_mem0, grad_weight and grad_bias are unused. workspace: pointwise_workspace().
void pointwise_backward(const BackwardArgs& args, const Target& target);
int64_t pointwise_workspace(const Cell& cell, const Target& target);

// How float32 keeps its full precision: exact, or tf32x3 where that is likely to be faster.
Matrix full_precision(const Target& target);

// What is likely to be fastest: fma, mma, pointwise or resident. See choose.h for how it is
// estimated.
Algorithm choose_algorithm(const Cell& cell, const Target& target);

// "fma" or "mma-<operands>", behind "resident-" where a sequence is one launch: what forward() and
// backward() run for this target.
std::string algorithm_name(const Cell& cell, const Target& target);

// All ways that the kernels can run a pass of a cell, those that the estimate prefers first: a
// launch for every step, in blocks of each shape, then the whole sequence in one where that can be.
std::vector<Way> ways(const Cell& cell, const Target& target, bool backward);

}  // namespace snnlstm::cuda
