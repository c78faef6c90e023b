// The CUDA half's entry points, twins of csrc/cpu/api.h. All memory is the caller's, on the device.
// No function allocates, synchronises or creates a stream, so a graph can capture every call.
// CUDA's errors, and shapes that cannot be run, are thrown as std::runtime_error.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace snnlstm::cuda {

// The numbers that the convolutions multiply. Sums are in float (of float64: in double).
enum class Matrix : int {
  exact = 0,    // the states' own type; float32 without tensor cores, 16-bit types with them
  tf32 = 1,     // float32 rounded to 10 bits of mantissa
  tf32x3 = 2,   // float32 as two tf32 numbers: full precision from tensor cores
  float16 = 3,  // under autocast, as the next: states stay float32
  bfloat16 = 4,
};

enum class Algorithm : int {
  automatic = 0,
  fma = 1,  // no tensor cores
  mma = 2,  // tensor cores, or std::runtime_error
  // torch's own convolution with pointwise_forward() or pointwise_backward() behind it:
  // choose_algorithm() may answer so, forward() and backward() do no such thing
  pointwise = 3,
  fused = 5,     // a launch for every step, with tensor cores or without
  resident = 6,  // one launch for the whole sequence, or std::runtime_error
};

// A device and a way to run on it. Calls that share packed weights, saved tensors or sizes must
// have the same target.
struct Target {
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // the most shared memory of a block
  void* stream = nullptr;
  Matrix matrix = Matrix::exact;
  Algorithm algorithm = Algorithm::automatic;
  // Rows of kForwardShapes and kDataShapes: the blocks of a step's tensor core kernels. -1: the
  // largest shape that gives each multiprocessor a block.
  int forward_shape = -1, data_shape = -1;
};

// A way in which the kernels can run a cell's forward or backward pass.
struct Way {
  std::string name;  // algorithm_name()'s, and the warps of a block
  Target target;
};

// Describes the current device. Throws std::runtime_error if there is none.
Target current_target();

// Sizes in bytes.
struct Sizes {
  int64_t packed_forward, packed_backward;  // pack_weight()'s result
  int64_t forward_workspace, backward_workspace;
  int64_t data_workspace;  // for a backward() with d_gates and neither grad_weight nor grad_bias
};

Sizes sizes(const Cell& cell, const Target& target);

// Says why no call of a cell can run (images or launches are too large to be counted), or "".
std::string reason_against(const Cell& cell, const Target& target);

// The type of saved gates, and of gate sums that torch's convolution writes: the states' type, or
// under autocast the matrix type.
DType gate_type(DType states, Matrix matrix);

// Cp: C rounded up to whole vectors. saved_gates are (T, N, Ho, Wo, 4, Cp), saved_syn
// (T - 1, N, Ho, Wo, Cp) in the states' type.
int64_t padded_channels(int64_t C);

// Writes the state quantiser's levels on the device, (num_levels,) in the compute type. values: on
// the host; the caller may free them at once.
void store_levels(const Cell& cell, const double* values, void* levels, const Target& target);

// weight: (4C, Cin + C, kernel_h, kernel_w), contiguous, in the cell's dtype.
void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed,
                 const Target& target);

void forward(const ForwardArgs& args, const Target& target);
void backward(const BackwardArgs& args, const Target& target);

// Runs the neurons of one step (cell.T is 1) behind a convolution of torch's. gate_sums: the
// convolution of cat[x, mem], (1, N, 4C, Ho, Wo) of the gate_type(). args.x, weight and workspace
// are unused; bias is null if the sums hold it already; saved_gates and saved_syn are this step's.
void pointwise_forward(const ForwardArgs& args, const View& gate_sums, const Target& target);

// The same backward. args.d_gates must be given; mem_after is this step's, (N, Ho, Wo, Cp); x,
// mem0, weight, grad_x, grad_mem0, grad_weight and grad_bias are unused.
void pointwise_backward(const BackwardArgs& args, const Target& target);
int64_t pointwise_workspace(const Cell& cell, const Target& target);

// Returns how float32 keeps its full precision: exact, or tf32x3 if that is likely to be faster.
Matrix full_precision(const Target& target);

// Returns what is likely to be fastest: fma, mma, pointwise or resident. estimate.h and
// resident_plan.h estimate it.
Algorithm choose_algorithm(const Cell& cell, const Target& target);

// Names what forward() and backward() run for this target: "fma" or "mma-<operands>", with
// "resident-" before it if a sequence is one launch.
std::string algorithm_name(const Cell& cell, const Target& target);

// Returns all ways in which the kernels can run a pass of a cell: a launch for every step, in
// blocks of each shape, the estimate's choice first; then, if possible, one launch for all steps.
std::vector<Way> ways(const Cell& cell, const Target& target, bool backward);

}  // namespace snnlstm::cuda
