// One pass on CUDA, the counterpart of csrc/cpu's: all that follows from the cell, the device and
// the algorithm. Python makes it once for equal calls, and a call adds addresses and strides.
//
// All memory belongs to the caller, on the device. No function allocates, synchronises or creates a
// stream, so a graph can capture every call. CUDA's errors, and shapes that cannot be run, are
// thrown as std::runtime_error.
#pragma once

#include <memory>
#include <string>

#include "../args.h"

namespace snnlstm::cuda {

struct Device {
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // the most shared memory of a block
  int number = 0;                     // the runtime's
};

// Describes the device of that number. Throws std::runtime_error if there is none.
Device device_of(int number);

// The numbers that the convolutions multiply. Sums are float, or double for float64.
enum class Matrix : int {
  exact = 0,    // the states' own type; float32 without tensor cores, 16-bit types with them
  tf32 = 1,     // float32 rounded to 10 bits of mantissa
  float16 = 2,  // under autocast, like bfloat16: states stay float32
  bfloat16 = 3,
};

// All algorithms give the same results, up to rounding, and each reads what the others have saved.
enum class Algorithm : int {
  automatic = 0,  // fused, but for float32 of long sums on a GPU of 7.5
  fused = 1,      // a launch for every step, with tensor cores or without
  cudnn = 2,      // a step after torch's own convolution: ForwardArgs::gate_sums, d_gates
};

// Cp: C rounded up to whole vectors. saved_gates are (T, N, Ho, Wo, 4, Cp), saved_syn
// (T - 1, N, Ho, Wo, Cp) in the states' type.
int64_t padded_channels(int64_t C);

struct Steps;

class Pass {
 public:
  Pass(const Cell& cell, const Device& device, Matrix matrix, Algorithm algorithm, bool backward);
  Pass(Pass&&) noexcept;
  ~Pass();

  Cell cell;  // cudnn: of one step, T is 1
  Matrix matrix;
  Algorithm algorithm;  // not automatic
  bool backward;
  std::string name;            // such as "mma-tf32" or "cudnn"
  std::string reason_against;  // why no call can run, or ""
  // Sizes in bytes. A cudnn pass has no packed weight.
  int64_t packed_bytes = 0, workspace = 0;

  // weight: (4C, Cin + C, kernel_h, kernel_w), contiguous, in the cell's dtype.
  void pack(const void* weight, void* packed, void* stream) const;
  // Writes the state quantiser's levels on the device, (num_levels,) in the compute type. values:
  // on the host; the caller may free them at once.
  void store_levels(const double* values, void* levels, void* stream) const;
  void run(const ForwardArgs& args, void* stream) const;
  void run(const BackwardArgs& args, void* stream) const;

 private:
  int device_;  // on which everything is launched
  std::unique_ptr<const Steps> steps_;
};

// Launches all steps of snntorch.Leaky, on the device's `stream`: one kernel a pass.
struct Leaky {
  static void run(const Device& device, const LeakyForwardArgs& args, void* stream);
  static void run(const Device& device, const LeakyBackwardArgs& args, void* stream);
};

// Returns the type of saved gates, and of gate sums that torch's convolution writes: the states'
// type, or under autocast the matrix type.
DType gate_type(DType states, Matrix matrix);

}  // namespace snnlstm::cuda
