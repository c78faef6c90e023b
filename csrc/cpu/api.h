// The entry points of the CPU backend, in float32 and float64; csrc/cuda/pass.h has those of the
// CUDA backend. The caller allocates all memory, and asks for its sizes first.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../args.h"

namespace snnlstm::cpu {

// The forms of a weight. The first three are ForwardArgs' weight, weight_mem and weight_x, the
// others are BackwardArgs'.
enum class Form : int {
  forward = 0,
  forward_mem_tiles = 1,
  forward_x_tiles = 2,
  backward = 3,
  backward_mem_tiles = 4,
  backward_x_tiles = 5,
};

// Says whether a call reads this form. grad_x says whether the call is a backward pass that gives x
// a gradient.
inline bool reads(const Cell& c, Form form, bool grad_x) {
  const bool tiles = c.tiled();
  const bool tiles_of_x = tiles && c.stride_h == 1 && c.stride_w == 1;
  switch (form) {
    case Form::forward:
      return !tiles || c.keeps_equal() || c.x_algorithm != CpuAlgorithm::winograd;
    case Form::forward_x_tiles:
      return c.x_algorithm == CpuAlgorithm::winograd;
    case Form::backward:
      return !tiles || (grad_x && !tiles_of_x);
    case Form::backward_x_tiles:
      return tiles_of_x && grad_x;
    default:
      return tiles;
  }
}

// Returns a name for the form's order of weights, such as "3x3:4x4". The order also depends on the
// channels and the instruction set.
std::string form_name(const Cell& cell, Form form);

// What the values of an x say about the algorithms. NaN is a nonzero without a magnitude.
struct Seen {
  int64_t values = 0, nonzero = 0;
  double largest = 1;  // magnitude, or 1 if all are smaller
};

// The functions that are compiled for each instruction set.
struct Kernels {
  // Says whether there are Winograd kernels for the cell's type and number of channels.
  bool (*has_tiles)(const Cell&);
  // Returns the cost of the forward pass's input half by lists of its nonzeros, divided by its cost
  // by direct sums. It is infinity if the image is too large for lists.
  double (*sparse_cost)(const Cell&, double density);

  // Looks at every `distance`-th value or row of the images from begin to end, which are numbered
  // step by step, but not at padded images.
  Seen (*look_at)(const Cell&, const View& x, const int64_t* lengths, int64_t begin, int64_t end,
                  int64_t distance);

  // These return the size of a call's workspace in bytes. `weight` says whether the backward pass
  // computes the weight's gradient.
  int64_t (*forward_workspace)(const Cell&, int threads);
  int64_t (*backward_workspace)(const Cell&, int threads, bool weight);

  // Returns C rounded up to whole vectors, which is the number of values in a pixel of saved_syn. A
  // pixel of saved_gates has four times as many.
  int64_t (*padded_channels)(const Cell&);

  // The weight is (4C, Cin + C, rows, columns), contiguous, and includes the outer taps.
  int64_t (*packed_bytes)(const Cell&, Form);
  void (*pack_weight)(const Cell&, Form, int threads, const void* weight, void* packed);

  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  // A convolution in float32, over lists or by Winograd: y or, if grad_weight is given, the gradients
  // of weight and bias. The weight has Form::forward or Form::forward_x_tiles.
  void (*convolve)(const ConvolutionArgs&);
  int64_t (*convolution_workspace)(const Cell&, int threads, bool backward);
  void (*leaky_forward)(const LeakyForwardArgs&);
  void (*leaky_backward)(const LeakyBackwardArgs&);
  void (*pool_forward)(const PoolForwardArgs&);
  void (*pool_backward)(const PoolBackwardArgs&);
  int64_t (*batch_norm_workspace)(const BatchNormArgs&);  // in bytes
  void (*batch_norm_forward)(const BatchNormForwardArgs&);
  void (*batch_norm_backward)(const BatchNormBackwardArgs&);

  // Linear layers of spikes. linear_look returns the share of nonzeros in a part of x. The weight is
  // (Out, K).
  double (*linear_look)(const LinearArgs&);
  int64_t (*linear_bytes)(int64_t K, int64_t Out);
  void (*linear_pack)(int64_t K, int64_t Out, int threads, const float* weight, float* packed);
  int64_t (*linear_workspace)(const LinearArgs&, bool backward);
  Listed (*linear_forward)(const LinearForwardArgs&);
  void (*linear_backward)(const LinearBackwardArgs&);
#if SNNLSTM_TESTING
  bool (*evaluate)(const char* name, DType dtype, const void* in, void* out, int64_t count);
#endif
};

// Returns the kernels of the instruction set in use.
const Kernels& kernels();

// One pass: its cell has the algorithms of the convolutions, and no taps that meet no pixel.
struct Pass {
  Cell cell;
  bool backward;
  bool grad_x, grad_weight;  // whether the backward pass computes these gradients
  const Kernels& kernels;
  int threads;
};

// Chooses the algorithms of a pass. density is the share of nonzeros in x, and max_tile_inputs the
// side of the largest Winograd tile whose rounding errors the weights admit.
Cell choose(const Cell& cell, CpuAlgorithm algorithm, double density, int max_tile_inputs,
            bool backward);

// Returns the sides of a convolution's Winograd tile, or zeros if there is none. Fine tiles round
// less, as torch's function does if it adds few numbers because most of x is zero.
std::pair<int, int> convolution_tile(const Cell& cell, bool fine);

// Returns how long a convolution takes, divided by the time of torch's function at its best. The
// density of x counts for lists of nonzeros, and packing does not. `weight` says whether it is the
// gradient of the weight.
double convolution_cost(const Cell& cell, bool weight, double density);

// Returns the algorithms of a pass, such as "winograd4-sparse": first that of the recurrent half,
// then that of the input half.
std::string algorithm_name(const Cell& cell);

// isa_names() lists the compiled instruction sets that this processor can run, best last.
// isa_name() returns the one in use: the best, or what the environment variable SNNLSTM_ISA names.
std::vector<std::string> isa_names();
std::string isa_name();
void set_isa(
    const std::string& name);  // throws std::invalid_argument if the processor cannot run it

}  // namespace snnlstm::cpu
