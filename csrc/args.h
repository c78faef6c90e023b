// What one call of the cell works on. The CPU and the CUDA kernels take the same structs.
//
// Letters used for shapes here and in every kernel:
//   T time steps, N batch, Cin input channels, C output channels (the state's),
//   H, W input image, Ho, Wo state image (ceil(H / stride)), Hp, Wp pooled image (floor mode).
// The convolution's 4C output channels come in the order i, f, o, g.
// Strides are counted in elements. A null pointer means "absent" or "not wanted". The compute type
// is double for float64 and float for all others.
#pragma once

#include <algorithm>
#include <cstdint>

namespace snnlstm {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
enum class Reset : int { subtract = 0, zero = 1, none = 2 };
enum class Pool : int { none = 0, max = 1, avg = 2 };

// The numbers are those of snnlstm/surrogate.py.
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
  stochastic = 9,
  leaky = 10,
};

// How the CPU kernels sum a convolution: `sparse` is for the input half of the forward pass, and
// `automatic` leaves that to cpu/choose.cpp.
enum class CpuAlgorithm : int { automatic = 0, direct = 1, winograd = 2, sparse = 3 };

// The computation, without its data: everything that decides sizes and the choice of kernel.
struct Cell {
  DType dtype = DType::float32;
  int64_t T = 1, N = 0, Cin = 0, C = 0, H = 0, W = 0;
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1;      // of the input convolution; the recurrent one has stride 1
  int dilation_h = 1, dilation_w = 1;  // of both
  Pool pool = Pool::none;
  int pool_h = 1, pool_w = 1;  // window and stride; 1, 1 without pooling
  Reset reset = Reset::none;
  Surrogate surrogate = Surrogate::atan;
  double surrogate_p0 = 2, surrogate_p1 = 0;
  bool spiking = true;  // false: a plain ConvLSTM; mem stands in the place of spk, and nothing
                        // resets, pools or quantises it
  bool inhibition = false;
  bool has_lengths = false;      // CUDA: calls have PassArgs::lengths
  int num_levels = 0;            // of the state quantiser; 0: none
  int outer_h = 0, outer_w = 0;  // taps on either side that meet no pixel, beside kernel_h, _w
  int tile_h = 0, tile_w = 0;    // CPU: outputs of a Winograd tile of the recurrent half, or 0
  CpuAlgorithm x_algorithm = CpuAlgorithm::direct;  // CPU: of the input half

  int64_t pad_h() const { return int64_t(dilation_h) * (kernel_h - 1) / 2; }
  int64_t pad_w() const { return int64_t(dilation_w) * (kernel_w - 1) / 2; }
  bool tiled() const { return tile_h > 0; }
  // CPU: says whether Winograd leaves pixels that may have an equal in their pooling window to
  // direct sums (cpu/kernels/equal_pixels.h).
  bool keeps_equal() const { return tiled() && pool == Pool::max; }
  int64_t Ho() const { return (H + stride_h - 1) / stride_h; }
  int64_t Wo() const { return (W + stride_w - 1) / stride_w; }
  // Bytes of the number of a pixel in its pooling window: those of uint8_t or of int32_t.
  int place_bytes() const { return int64_t(pool_h) * pool_w > 256 ? 4 : 1; }
  int64_t Hp() const { return Ho() / pool_h; }
  int64_t Wp() const { return Wo() / pool_w; }
};

// Returns the cell without the taps that only ever meet the border, which are further from the
// middle than one end of the image is from the other. The rest of the kernel is never wider than
// twice the image, and the stride leads no further than the image reaches.
inline Cell within_image(const Cell& cell) {
  Cell c = cell;
  const auto trim = [](int64_t size, int& kernel, int& stride, int& dilation, int& outer) {
    const int64_t reach = size > 1 ? (size - 1) / dilation : 0, most = (kernel - 1) / 2;
    outer = int(most > reach ? most - reach : 0);
    kernel -= 2 * outer;
    if (kernel == 1) dilation = 1;
    stride = int(std::min<int64_t>(stride, size));
  };
  trim(c.H, c.kernel_h, c.stride_h, c.dilation_h, c.outer_h);
  trim(c.W, c.kernel_w, c.stride_w, c.dilation_w, c.outer_w);
  return c;
}

// A tensor of the caller's, with up to five dimensions: time, batch, channel, row, column.
// A tensor without a time axis has stride[0] = 0.
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

// What the forward and the backward pass of a call share. Python gives the fields from x to
// workspace, and those of the pass, in this order (bindings.h).
struct PassArgs {
  Cell cell;
  View x;                            // (T, N, Cin, H, W)
  View syn0, mem0;                   // (N, C, Ho, Wo) states before the first step
  const void* weight = nullptr;      // packed by pack_weight() for this pass
  const void* weight_mem = nullptr;  // CPU: Winograd's weight of the recurrent half
  const void* weight_x = nullptr;    // CPU: Winograd's weight of the input half
  const void* threshold = nullptr;   // (C,), or one number with threshold_stride = 0
  int64_t threshold_stride = 0;
  const void* graded_factor = nullptr;  // one number in the compute type
  const void* levels = nullptr;         // (num_levels,), ascending, in the compute type
  bool record = false;                  // syn and mem have every step t, or only the last step
  void* saved_gates = nullptr;          // training: activated gates, layout of the backend's choice
  void* saved_syn = nullptr;  // training: syn after every step, layout of the backend's choice
  int64_t* winner = nullptr;  // (T, N): place in (C, Hp, Wp) of the only neuron that may spike
  // training with Pool::max: for each pooled pixel of every step the number, row by row, of the
  // window's pixel that gets its gradient; in a layout of the backend's choice
  void* places = nullptr;            // Cell::place_bytes()
  const int64_t* lengths = nullptr;  // (N,): steps of each sample, 0 to T; null: all have T
  const int64_t* order = nullptr;    // CPU, with lengths: the samples, the longest first
  void* workspace = nullptr;
  int threads = 1;  // CPU: the plan's
};

struct ForwardArgs : PassArgs {
  const void* bias = nullptr;  // (4C,), contiguous
  // CUDA, cudnn: torch's convolution of mem, (1, N, 4C, Ho, Wo) of the gate type, and that of x, in
  // the compute type; or gate_sums is of cat[x, mem]. x and weight are unused.
  View gate_sums, x_sums;
  View spk;       // (T, N, C, Hp, Wp); absent in a single step of a cell that does not spike
  View syn, mem;  // (T, N, C, Ho, Wo) or, with stride[0] = 0, (N, C, Ho, Wo)

  bool spk_is_mem() const { return !cell.spiking && spk.data != nullptr; }
};

struct BackwardArgs : PassArgs {
  View noise;                 // (T, N, C, Hp, Wp) uniform in [0, 1): the stochastic surrogate only
  View grad_spk;              // (T, N, C, Hp, Wp)
  View grad_syn, grad_mem;    // as ForwardArgs::syn and mem
  View grad_x;                // (T, N, Cin, H, W)
  View grad_syn0, grad_mem0;  // (N, C, Ho, Wo)
  void* grad_weight = nullptr;     // (4C, Cin + C, kernel_h, kernel_w), contiguous
  void* grad_bias = nullptr;       // (4C,)
  void* grad_threshold = nullptr;  // (C,): summed over everything but the channels
  // CUDA, hybrid and cudnn: the gradient of the gate sums of every step is left in d_gates,
  // (T, N, Ho, Wo, 4, Cp) of the gate type, and if mem_after is given, mem after every step but the
  // last there, (T - 1, N, Ho, Wo, Cp) of that type.
  void* d_gates = nullptr;
  void* mem_after = nullptr;
};

// ---- snntorch.Leaky ----

// A number, or as many numbers as one dimension of x is long: neuron i of a step, in the order of
// memory, has values[i / stride % count].
struct LeakyParameter {
  const void* values = nullptr;  // in the compute type
  int64_t count = 1, stride = 1;
};

// T steps of n neurons. Each tensor is (T, n) or (n,), in any order of memory that has no gaps, and
// all have the same order. Python gives the fields, and those of the pass, in this order.
struct LeakyArgs {
  DType dtype = DType::float32;  // of x and its gradient; all others are in the compute type
  Reset reset = Reset::subtract;
  Surrogate surrogate = Surrogate::atan;
  double surrogate_p0 = 2, surrogate_p1 = 0;
  int64_t T = 1, n = 0;
  LeakyParameter beta, threshold;
  const void* graded_factor = nullptr;  // one number
  const void* mem0 = nullptr;           // (n,) before the first step; backward: null if not needed
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
  const void* noise = nullptr;     // (T, n) uniform in [0, 1): the stochastic surrogate only
  const void* grad_spk = nullptr;  // (T, n)
  const void* grad_mem = nullptr;  // (T, n)
  void* grad_x = nullptr;          // (T, n)
  void* grad_mem0 = nullptr;       // (n,); given where T > 1, since it carries the steps' sums
  // (n,) summed over the steps. The caller adds the neurons that share a parameter.
  void* grad_beta = nullptr;
  void* grad_threshold = nullptr;

  // Says whether the backward pass reads the mem before a step.
  bool needs_before() const { return reset == Reset::zero || grad_beta || grad_threshold; }
};

}  // namespace snnlstm
