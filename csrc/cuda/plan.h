// The CUDA backend's plan, twin of csrc/cpu's: all that follows for one pass of a call from the
// cell, the device and the algorithm. Python makes it once for each kind of call; a call adds
// addresses and strides.
//
// All memory is the caller's, on the device. No function allocates, synchronises or creates a
// stream, so a graph can capture every call. CUDA's errors, and shapes that cannot be run, are
// thrown as std::runtime_error.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../args.h"

namespace snnlstm::cuda {

// The constants of the estimate (estimate.h). No GPU has been timed: those without a source are
// guesses.
struct Model {
  // The parts of a card's rates that convolutions reach on wide layers. cuDNN's, in whatever it
  // multiplies with: Luo et al. 2024 measure 60 to 80 % for dense products.
  double cudnn_part = 0.65;
  // cuDNN's float32 convolution of 3 x 3 taps, as a multiple of the plain cores' rate: it takes
  // Winograd's form with 2.25 times fewer products, and a kernel at 93 % of the peak was 1.5 to
  // 2.65 times as fast (Yan, Wang and Chu 2020, https://doi.org/10.1145/3332466.3374520).
  double cudnn_winograd = 1.05;
  double mma_part = 0.75;  // of our kernels, as a part of what mma.sync can reach
  // Of our kernels on plain cores. The loop of sm_75 has 512 multiply-adds in 730 instructions; a
  // multiprocessor of 128 lanes has no more load units than one of 64.
  double fma_part = 0.7, fma_part_of_128 = 0.4;
  // Warps of a multiprocessor from which its tensor cores, or its plain ones, are kept busy.
  double warps = 6;
  // Bytes a cycle that a multiprocessor gets from the level-2 cache: 1270 GB/s on a T4 (Jia et al.
  // 2019, https://arxiv.org/abs/1903.07486).
  double cache_bytes = 20;
  double memory_part = 0.85;  // of the data sheet's bandwidth
  // Cycles of a multiprocessor for a neuron without its products: 400 instructions of a warp, 520
  // backward, counted in PTX, at 3 a cycle.
  double neuron = 4.2, neuron_backward = 5.4;
  // Seconds. From a kernel's last work to the first of the next one; until a block multiplies.
  double launch = 3.5e-6, block = 1e-6;
  // Seconds of Python and torch for the forward step that torch convolves, which hide the GPU's if
  // they are longer; a backward step takes half as long again. From the 50 and 75 us of a step
  // call.
  double host = 40e-6;
};

struct Device {
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // the most shared memory of a block
  double clock = 0, bandwidth = 0;    // Hz, bytes a second; 0: those of cards.h
  Model model;
};

// Describes the current device. Throws std::runtime_error if there is none.
Device current_device();

// The numbers that the convolutions multiply. Sums are in float (of float64: in double).
enum class Matrix : int {
  exact = 0,    // the states' own type; float32 without tensor cores, 16-bit types with them
  tf32 = 1,     // float32 rounded to 10 bits of mantissa
  tf32x3 = 2,   // float32 as two tf32 numbers: full precision from tensor cores
  float16 = 3,  // under autocast, as the next: states stay float32
  bfloat16 = 4,
};

// Returns the seconds that cuDNN is estimated to take for the convolutions of one step of a cell in
// plain torch: forward one, backward both gradients.
double cudnn_seconds(const Cell& cell, const Device& device, Matrix matrix, bool backward);

// Returns how float32 keeps its full precision: exact, or tf32x3 if that is likely to be faster.
Matrix full_precision(const Device& device);

// All algorithms give the same results, up to rounding, and each reads what the others have saved.
enum class Algorithm : int {
  automatic = 0,  // whichever of those below choice.h expects to be fastest
  fused = 1,      // a launch for every step, with tensor cores or without
  // fused, but the backward pass leaves d_gates and mem_after for torch, which forms the gradients
  // of the weight and the bias
  hybrid = 2,
  pointwise = 3,  // a step behind torch's own convolution: ForwardArgs::gate_sums, d_gates
};

// Cp: C rounded up to whole vectors. saved_gates are (T, N, Ho, Wo, 4, Cp), saved_syn
// (T - 1, N, Ho, Wo, Cp) in the states' type.
int64_t padded_channels(int64_t C);

struct ForwardPass;
struct BackwardPass;
struct PointwisePass;

class Plan {
 public:
  // shape: a row of kForwardShapes or kDataShapes, the only blocks on tensor cores that the steps
  // may have; -1 leaves them to the plan.
  Plan(const Cell& cell, const Device& device, Matrix matrix, Algorithm algorithm, bool backward,
       int shape = -1);
  Plan(Plan&&) noexcept;
  ~Plan();

  // Returns the plans of a pass that are worth timing: fused for each kind of block, what an
  // estimate chooses first, then the other algorithms that can run the cell.
  static std::vector<Plan> candidates(const Cell& cell, const Device& device, Matrix matrix,
                                      bool backward);

  Cell cell;  // pointwise: of one step, T is 1
  Matrix matrix;
  Algorithm algorithm;  // not automatic
  bool backward;
  int shape = -1;              // the steps' row; -1 without tensor cores
  std::string name;            // such as "mma-tf32" or "hybrid-fma"
  std::string reason_against;  // why no call can run, or ""
  double seconds = 0;          // of the whole pass on the plan's device, estimated
  // Sizes in bytes. A pointwise plan has no packed weight.
  int64_t packed_bytes = 0, workspace = 0;

  // Whether the backward pass leaves d_gates, and mem_after if given, and no parameters' gradients.
  bool leaves_d_gates() const {
    return algorithm == Algorithm::hybrid || algorithm == Algorithm::pointwise;
  }

  // Returns the height and width of a step's tiles.
  std::pair<int, int> tile() const;
  // Returns the seconds of the whole pass on a device, estimated (choice.h).
  double seconds_on(const Device& device) const;

  // weight: (4C, Cin + C, kernel_h, kernel_w), contiguous, in the cell's dtype.
  void pack(const void* weight, void* packed, void* stream) const;
  // Writes the state quantiser's levels on the device, (num_levels,) in the compute type. values:
  // on the host; the caller may free them at once.
  void store_levels(const double* values, void* levels, void* stream) const;
  void run(const ForwardArgs& args, void* stream) const;
  void run(const BackwardArgs& args, void* stream) const;

 private:
  // The one that the pass and the algorithm ask for.
  std::unique_ptr<const ForwardPass> forward_;
  std::unique_ptr<const BackwardPass> backward_;
  std::unique_ptr<const PointwisePass> pointwise_;
};

// Returns the type of saved gates, and of gate sums that torch's convolution writes: the states'
// type, or under autocast the matrix type.
DType gate_type(DType states, Matrix matrix);

}  // namespace snnlstm::cuda
