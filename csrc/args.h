// The arguments of a call. The CPU and the CUDA kernels take the same structs.
//
// Letters used for shapes here and in every kernel:
//   T time steps, N batch, Cin input channels, C output channels (the state's),
//   H, W input image, Ho, Wo state image (ceil(H / stride)), Hp, Wp pooled image (floor mode).
// The convolution's 4C output channels come in the order i, f, o, g.
// Strides are counted in elements. A null pointer means "absent" or "not wanted". The compute type
// is double for float64, and float for every other dtype.
#pragma once

#include <algorithm>
#include <cstdint>

namespace snnlstm {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
enum class Reset : int { subtract = 0, zero = 1, none = 2 };
enum class Pool : int { none = 0, max = 1, avg = 2 };

// The numbers are those of KINDS in snnlstm/surrogate.py.
enum class Surrogate : int {
  none = 0,
  atan = 1,
  fast_sigmoid = 2,
  sigmoid = 3,
  straight_through = 4,
  triangular = 5,
  heaviside = 6,
  spike_rate_escape = 7,
  sparse_fast_sigmoid = 8,
  stochastic = 9,  // which only the reference path computes
  leaky = 10,
};
constexpr int kSurrogates = int(Surrogate::leaky) + 1;

// How the CPU kernels sum a convolution. Only the input half of the forward pass can be `sparse`,
// and `automatic` leaves the choice to cpu/choose.cpp.
enum class CpuAlgorithm : int { automatic = 0, direct = 1, winograd = 2, sparse = 3 };

// The options and sizes of a call, without its data. They decide which kernels run. A convolution
// alone (CPU, ConvolutionArgs) is a cell without a recurrent half.
struct Cell {
  DType dtype = DType::float32;
  int64_t T = 1, N = 0, Cin = 0, C = 0, H = 0, W = 0;
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1;      // the input convolution's; the recurrent one has stride 1
  int dilation_h = 1, dilation_w = 1;  // both convolutions'
  Pool pool = Pool::none;
  int pool_h = 1, pool_w = 1;  // window and stride; 1, 1 without pooling
  Reset reset = Reset::none;
  Surrogate surrogate = Surrogate::atan;
  double surrogate_p0 = 2, surrogate_p1 = 0;
  bool spiking = true;  // false: a plain ConvLSTM, whose spk is mem, without reset, pooling and
                        // quantisation
  bool has_lengths = false;      // CUDA: calls have PassArgs::lengths
  int num_levels = 0;            // the state quantiser's; 0: states are not quantised
  int outer_h = 0, outer_w = 0;  // taps trimmed per side, not counted in kernel_h and kernel_w
  int tile_h = 0, tile_w = 0;    // CPU: outputs of a Winograd tile of the recurrent half, or 0
  CpuAlgorithm x_algorithm = CpuAlgorithm::direct;  // CPU: the input half's
  // A convolution's output channels, or 0 for a cell. Its C is a quarter of them, rounded up.
  int64_t Cout = 0;
  int padding_h = 0, padding_w = 0;  // a convolution's
  // A convolution's weight: whether its input channels lie next to each other, and whether it is
  // turned around for the gradient of x, whose inputs are that weight's outputs.
  bool weight_last = false, turned = false;

  int64_t pad_h() const { return Cout ? padding_h : int64_t(dilation_h) * (kernel_h - 1) / 2; }
  int64_t pad_w() const { return Cout ? padding_w : int64_t(dilation_w) * (kernel_w - 1) / 2; }
  // Returns the channels that the recurrent half reads.
  int64_t recurrent() const { return Cout ? 0 : C; }
  bool tiled() const { return tile_h > 0; }
  // CPU: says whether pixels that may have an equal in their pooling window are summed directly,
  // not by Winograd (cpu/kernels/equal_pixels.h).
  bool keeps_equal() const { return tiled() && pool == Pool::max; }
  int64_t Ho() const { return outputs(H, kernel_h, stride_h, dilation_h, pad_h()); }
  int64_t Wo() const { return outputs(W, kernel_w, stride_w, dilation_w, pad_w()); }
  // Returns the size in bytes of a pixel's index in its pooling window: a uint8_t or an int32_t.
  int argmax_bytes() const { return int64_t(pool_h) * pool_w > 256 ? 4 : 1; }
  int64_t Hp() const { return Ho() / pool_h; }
  int64_t Wp() const { return Wo() / pool_w; }

 private:
  int64_t outputs(int64_t size, int kernel, int stride, int dilation, int64_t padding) const {
    if (Cout) size += 2 * padding - int64_t(dilation) * (kernel - 1);
    return (size + stride - 1) / stride;
  }
};

// Returns the cell without the taps that meet no pixel from any output, because they are at least
// as far from the middle of the kernel as the image is long. The remaining kernel is less than
// twice as long as the image, and the stride is at most the image's size.
inline Cell within_image(const Cell& cell) {
  Cell c = cell;
  const auto trim = [](int64_t size, int& kernel, int& stride, int& dilation, int& outer) {
    const int64_t reach = size > 1 ? (size - 1) / dilation : 0;
    const int64_t most = (kernel - 1) / 2;
    outer = int(most > reach ? most - reach : 0);
    kernel -= 2 * outer;
    if (kernel == 1) dilation = 1;
    stride = int(std::min<int64_t>(stride, size));
  };
  trim(c.H, c.kernel_h, c.stride_h, c.dilation_h, c.outer_h);
  trim(c.W, c.kernel_w, c.stride_w, c.dilation_w, c.outer_w);
  return c;
}

// A tensor of the caller. Its strides are those of time, batch, channel, row and column. A tensor
// without a time axis has stride[0] = 0.
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

// The arguments of both passes. Python passes the fields from workspace to argmax, and then those
// of the pass, in this order (bindings.h).
struct PassArgs {
  Cell cell;
  int threads = 1;  // CPU
  // What a device's plan adds to a call.
  void* workspace = nullptr;
  const void* weight = nullptr;      // the weight that pack_weight() has packed for this pass
  const void* weight_mem = nullptr;  // CPU: Winograd's weight of the recurrent half
  const void* weight_x = nullptr;    // CPU: Winograd's weight of the input half
  const void* levels = nullptr;      // (num_levels,), ascending, in the compute type
  const int64_t* order = nullptr;    // CPU, with lengths: the samples, the longest first
  // The call.
  View x;                           // (T, N, Cin, H, W)
  View syn0, mem0;                  // (N, C, Ho, Wo) states before the first step
  const void* threshold = nullptr;  // (C,), or one number with threshold_stride = 0
  int64_t threshold_stride = 0;
  const void* graded_factor = nullptr;  // one number
  const int64_t* lengths = nullptr;  // (N,): steps of each sample, 0 to T; null: all samples have T
  bool record = false;               // syn and mem have every step t, or only the last step
  // Training: the activated gates of every step, and syn after it, in the backend's layout.
  void* saved_gates = nullptr;
  void* saved_syn = nullptr;
  // Training with Pool::max: for each step and pooled pixel, the row-major index in the window of
  // the pixel that gets the gradient, in the backend's layout.
  void* argmax = nullptr;  // Cell::argmax_bytes() each
};

struct ForwardArgs : PassArgs {
  const void* bias = nullptr;  // (4C,), contiguous
  // CUDA, cudnn: torch's convolution of cat[x, mem], (1, N, 4C, Ho, Wo) in the gate type. x and
  // weight are unused.
  View gate_sums;
  View spk;       // (T, N, C, Hp, Wp); absent in a single step of a cell that does not spike
  View syn, mem;  // (T, N, C, Ho, Wo) or, with stride[0] = 0, (N, C, Ho, Wo)

  bool spk_is_mem() const { return !cell.spiking && spk.data != nullptr; }
};

struct BackwardArgs : PassArgs {
  View grad_spk;                   // (T, N, C, Hp, Wp)
  View grad_syn, grad_mem;         // as ForwardArgs::syn and mem
  View grad_x;                     // (T, N, Cin, H, W)
  View grad_syn0, grad_mem0;       // (N, C, Ho, Wo)
  void* grad_weight = nullptr;     // (4C, Cin + C, kernel_h, kernel_w), contiguous
  void* grad_bias = nullptr;       // (4C,)
  void* grad_threshold = nullptr;  // (C,): summed over everything but the channels
  // CUDA, cudnn: the kernels write the gradient of every step's gate sums to d_gates,
  // (T, N, Ho, Wo, 4, Cp) in the gate type, and mem after every step but the last to mem_after,
  // (T - 1, N, Ho, Wo, Cp) in that type.
  void* d_gates = nullptr;
  void* mem_after = nullptr;
};

// A convolution: y from x and a packed weight, or the gradients of weight and bias from x and the
// gradient of y. (x's gradient is y of a convolution of y's gradient.) In a backward pass the cell's
// T cuts the images into steps, whose images lie in cache together.
struct ConvolutionArgs : PassArgs {
  const void* bias = nullptr;   // (Cout,)
  View y;                       // (T, N, Cout, Ho, Wo), or its gradient
  void* grad_weight = nullptr;  // (Cout, Cin, kernel_h, kernel_w), contiguous
  void* grad_bias = nullptr;    // (Cout,)
};

// ---- snntorch.Leaky ----

// One number, or one for each index along a dimension of x. Neuron i of a step, in memory order,
// has values[i / stride % count].
struct LeakyParameter {
  const void* values = nullptr;  // in the compute type
  int64_t count = 1, stride = 1;
};

// T steps of n neurons. Each tensor is (T, n) or (n,), without gaps and in the same memory order.
// Python passes these fields, and then those of the pass, in this order.
struct LeakyArgs {
  DType dtype = DType::float32;  // x's and its gradient's; the other tensors have the compute type
  Reset reset = Reset::subtract;
  Surrogate surrogate = Surrogate::atan;
  double surrogate_p0 = 2, surrogate_p1 = 0;
  int64_t T = 1, n = 0;
  LeakyParameter beta, threshold;
  const void* graded_factor = nullptr;  // one number
  const void* mem0 = nullptr;           // (n,) before the first step; backward: null if not read
  int threads = 1;                      // CPU
};

struct LeakyForwardArgs : LeakyArgs {
  const void* x = nullptr;  // (T, n)
  void* spk = nullptr;      // (T, n)
  void* mem = nullptr;      // (T, n) if `record`, else (n,) after the last step
  bool record = false;
};

struct LeakyBackwardArgs : LeakyArgs {
  const void* mem = nullptr;       // (T, n) after each step
  const void* grad_spk = nullptr;  // (T, n)
  const void* grad_mem = nullptr;  // (T, n)
  void* grad_x = nullptr;          // (T, n)
  void* grad_mem0 = nullptr;       // (n,); also carries the gradient of mem from step to step
  // (n,): sums over the steps. The caller adds up the neurons that share a parameter.
  void* grad_beta = nullptr;
  void* grad_threshold = nullptr;

  // Says whether the backward pass reads the mem before a step.
  bool needs_before() const { return reset == Reset::zero || grad_beta || grad_threshold; }
};

// ---- max_pool2d and avg_pool2d ----

// x is (N, C, H, W), y and places are (N, C, Ho, Wo), all without gaps and in one layout. Python
// passes these fields, and then those of the pass, in this order.
struct PoolArgs {
  DType dtype = DType::float32;
  Pool pool = Pool::max;
  bool channels_last = false;
  int64_t N = 0, C = 0, H = 0, W = 0, Ho = 0, Wo = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
  bool counts_padding = true;  // whether an average is divided by the number of all its pixels, or
                               // of those in the image
  int64_t divisor = 0;         // what an average is divided by instead, if not 0
  int threads = 1;             // CPU

  // Returns the size in bytes of a pixel's index in its window: a uint8_t or an int32_t.
  int place_bytes() const { return kernel_h * kernel_w > 256 ? 4 : 1; }
};

struct PoolForwardArgs : PoolArgs {
  const void* x = nullptr;
  void* y = nullptr;
  void* places = nullptr;  // max: the row-major index in the window of the pixel that y is
};

struct PoolBackwardArgs : PoolArgs {
  const void* grad_y = nullptr;
  const void* places = nullptr;
  void* grad_x = nullptr;
};

// ---- batch norm in training ----

// T steps of N images with C channels of S pixels. A step lies without gaps: (N, C, S), where images
// with their channels last count as N * pixels images of one pixel. Python passes these fields, and
// then those of the pass, in this order.
struct BatchNormArgs {
  DType dtype = DType::float32;
  int64_t T = 1, N = 0, C = 0, S = 1;
  int64_t x_step = 0;            // from a step of x to the next one; the other tensors have no gaps
  const void* x = nullptr;       // (T, N, C, S)
  const void* weight = nullptr;  // (C,)
  double* means = nullptr;       // (T, C)
  double* inverses = nullptr;    // (T, C), of the standard deviations
  void* workspace = nullptr;
  int threads = 1;

  // Returns the number of parts into which the images of a step are cut, each with its own sums.
  int64_t parts() const {
    return std::max<int64_t>(1, std::min({N, N * C * S >> 14, int64_t(64)}));
  }
};

struct BatchNormForwardArgs : BatchNormArgs {
  const void* bias = nullptr;    // (C,)
  void* running_mean = nullptr;  // (C,)
  void* running_var = nullptr;   // (C,)
  double momentum = 0, eps = 0;
  void* y = nullptr;  // (T, N, C, S)
};

struct BatchNormBackwardArgs : BatchNormArgs {
  const void* grad_y = nullptr;  // (T, N, C, S)
  void* grad_x = nullptr;        // (T, N, C, S)
  void* grad_weight = nullptr;   // (C,)
  void* grad_bias = nullptr;     // (C,)
};

// ---- linear layers of spikes, on the CPU ----

// y = x W^T + b for an x of mostly zeros, in float32: M rows, K inputs and Out outputs. Tensors have
// no gaps, but rows of x may. Python passes these fields, and then those of the pass, in this order.
struct LinearArgs {
  int64_t M = 0, K = 0, Out = 0;
  int64_t row = 0;              // from a row of x to the next
  const float* x = nullptr;     // (M, K); backward: null if all nonzeros are 1
  uint8_t* nonzeros = nullptr;  // (M, (K + 7) / 8): a bit for each value of x; forward: written
  void* workspace = nullptr;    // as large as the kernels say
  int threads = 1;
};

struct LinearForwardArgs : LinearArgs {
  int64_t most = 0;               // nonzeros of x; with more of them the kernel stops, and says so
  const float* weight = nullptr;  // as the kernels have packed it
  const float* bias = nullptr;    // (Out,)
  float* y = nullptr;             // (M, Out)
};

struct LinearBackwardArgs : LinearArgs {
  const float* grad_y = nullptr;  // (M, Out)
  float* grad_weight = nullptr;   // (Out, K)
  float* grad_bias = nullptr;     // (Out,)
};

// What a forward pass has found in x.
struct Listed {
  int64_t nonzeros;  // -1 if there are more than `most`
  bool ones;         // whether all of them are 1
};

}  // namespace snnlstm
