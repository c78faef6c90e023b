// Sizes of our own images, and how the kernels access them and the caller's tensors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "gemm.h"
#include "kernels/fault.cuh"

namespace snnlstm::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Returns the compute type of kernels whose states have this type.
inline DType real_of(DType states) {
  return states == DType::float64 ? DType::float64 : DType::float32;
}

// Returns the cell as the kernels run it, without taps that only meet the border. Tiles have even
// widths, so an image of one column becomes one row. A batch of such rows becomes the rows of one
// image, so that tiles span samples: no tap leads to another row. Pixels keep their order.
inline Cell as_run(const Cell& cell) {
  Cell c = within_image(cell);
  if (c.W <= 1) {
    std::swap(c.H, c.W), std::swap(c.kernel_h, c.kernel_w);
    std::swap(c.stride_h, c.stride_w), std::swap(c.dilation_h, c.dilation_w);
    std::swap(c.pool_h, c.pool_w), std::swap(c.outer_h, c.outer_w);
  }
  const bool fits = double(c.N) * double(c.W) * double(4 * c.C + c.Cin + 32) < double(1 << 30);
  if (cell.W <= 1 && fault(Fault::unturned_kernel)) std::swap(c.kernel_h, c.kernel_w);
  const bool free = c.pool_h == 1 && !c.has_lengths;  // treats all samples alike
  if (c.H == 1 && c.N > 1 && free && fits) {
    c.H = c.N;
    c.N = 1;
  }
  return c;
}

inline void lay_out(std::initializer_list<View*> views, Cell& cell, const Cell& as) {
  for (View* v : views) {
    if (cell.W <= 1) std::swap(v->stride[3], v->stride[4]);
    if (cell.N != as.N && !fault(Fault::unjoined_rows)) v->stride[3] = v->stride[1];
  }
  cell = as;
}
inline ForwardArgs as_run(ForwardArgs a, const Cell& as) {
  lay_out({&a.x, &a.syn0, &a.mem0, &a.gate_sums, &a.spk, &a.syn, &a.mem}, a.cell, as);
  return a;
}
inline BackwardArgs as_run(BackwardArgs a, const Cell& as) {
  lay_out({&a.x, &a.syn0, &a.mem0, &a.grad_spk, &a.grad_syn, &a.grad_mem, &a.grad_x, &a.grad_syn0,
           &a.grad_mem0},
          a.cell, as);
  return a;
}

// The place of the kernels' taps in the caller's kernel, which may have rows and columns of other
// taps around them.
struct KernelTaps {
  int height = 1, width = 1, outer_h = 0, outer_w = 0;
  int all_width = 1;
  int64_t all = 1;

  KernelTaps() = default;
  explicit KernelTaps(const Cell& cell) {
    const Cell c = within_image(cell);
    height = c.kernel_h;
    outer_h = c.outer_h;
    outer_w = c.outer_w;
    width = c.kernel_w;
    all_width = cell.kernel_w;
    all = int64_t(cell.kernel_h) * cell.kernel_w;
  }
  // Returns the place of a tap in the caller's kernel.
  SNNLSTM_BOTH int64_t place(int tap) const {
    const int outer = fault(Fault::untrimmed_kernel) ? 0 : outer_w;
    return int64_t(tap / width + outer_h) * all_width + tap % width + outer;
  }
  // Returns which of the kernels' taps lies at a place, or -1.
  SNNLSTM_BOTH int tap(int64_t place) const {
    const int64_t row = place / all_width - outer_h;
    const int column = int(place % all_width) - outer_w;
    return row >= 0 && row < height && inside(column, width) ? int(row) * width + column : -1;
  }
};

struct Shape {
  explicit Shape(const Cell& cell)
      : c(cell),
        Cp(round_up(cell.C, 8)),
        Ho(cell.Ho()),
        Wo(cell.Wo()),
        pixels(Ho * Wo),
        taps(int64_t(cell.kernel_h) * cell.kernel_w) {}
  Cell c;
  int64_t Cp, Ho, Wo, pixels, taps;

  int64_t state() const { return c.N * pixels * Cp; }  // elements of one time step
  int64_t gates() const { return 4 * state(); }
};

// Hands out pieces of one allocation, aligned to 256 bytes. If `base` is null, it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t bytes) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, 256);
    return p;
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Returns the caller's tensor from time step t on. extent: T, N, channels, H, W. width: channels
// that a thread holds.
inline Tensor tensor(const View& v, DType type, int64_t t, const int64_t (&extent)[5], int width) {
  Tensor a;
  a.type = type;
  if (v.data == nullptr) return a;
  const int size = bytes_of(type);
  a.data = static_cast<char*>(v.data) + t * v.stride[0] * size;
  a.t = v.stride[0];
  a.n = v.stride[1];
  a.c = int(v.stride[2]);
  a.h = int(v.stride[3]);
  a.w = int(v.stride[4]);
  a.channels = int(extent[2]);
  int64_t last = 0;
  for (int k = 2; k < 5; ++k) last += (extent[k] - 1) * std::abs(v.stride[k]);
  if (last >= int64_t(1) << 31)
    throw std::runtime_error("one image of a tensor spans " + std::to_string(last) +
                             " elements, but less than 2^31 are accepted: make it contiguous");
  // Returns whether the address and all used strides except `but` are multiples of `divisor`.
  const auto multiple = [&](int divisor, int but) {
    if (reinterpret_cast<uintptr_t>(a.data) % (std::min(divisor * size, 16)) != 0) return false;
    for (int k = 0; k < 5; ++k)
      if (k != but && extent[k] > 1 && v.stride[k] % divisor != 0) return false;
    return true;
  };
  const bool c_dense = a.c == 1 || extent[2] == 1;
  const bool w_dense = a.w == 1 || extent[4] == 1;
  if (width > 1 && c_dense && extent[2] % width == 0 && multiple(width, 2))
    a.access = Access::channels;
  else if (w_dense && extent[4] % 2 == 0 && multiple(2, 4))
    a.access = Access::rows;
  else
    a.access = Access::scalar;
  return a;
}

// Our images (T, N, Ho, Wo, planes, Cp) from step t on.
inline Tensor image(const void* data, const Shape& s, DType type, int planes = 1, int64_t t = 0) {
  Tensor a;
  a.type = type;
  a.n = s.pixels * planes * s.Cp;
  a.t = s.c.N * a.n;
  a.data = const_cast<char*>(static_cast<const char*>(data)) + t * a.t * bytes_of(type);
  a.c = 1;
  a.w = int(planes * s.Cp);
  a.h = int(s.Wo) * a.w;
  a.plane = int(s.Cp);
  a.channels = int(s.Cp);
  a.access = Access::channels;
  return a;
}

// Says why the kernels cannot run a cell in launches of at most `blocks` blocks, or "". The kernels
// count blocks, and offsets within one image, in 31 bits. shared_bytes: a block needs them, and the
// device has most_shared_bytes.
inline std::string reason_against(const Cell& c, int64_t blocks, int64_t shared_bytes,
                                  int64_t most_shared_bytes) {
  const Shape s(c);
  // Bounds the rows or columns that a tile's taps span.
  const auto reach = [](int64_t size, double stride, int64_t taps, double dilation) {
    const double all = double(size + kTilePixels) * stride + double(taps - 1) * dilation;
    return int64_t(std::min(all, 9e18));
  };
  const std::pair<const char*, int64_t> counts[] = {
      {"(height / stride + 128) * stride + (kernel_size - 1) * dilation of the rows",
       reach(s.Ho, c.stride_h, c.kernel_h, c.dilation_h)},
      {"(width / stride + 128) * stride + (kernel_size - 1) * dilation of the columns",
       reach(s.Wo, c.stride_w, c.kernel_w, c.dilation_w)},
      {"4 * channels * height * width of one image's gates", 4 * s.Cp * s.pixels},
      {"channels * height * width of one input image", c.Cin * c.H * c.W},
      {"the number of blocks of a launch", blocks}};
  for (const auto& [what, value] : counts)
    if (value >= int64_t(1) << 31)
      return std::string(what) + " is " + std::to_string(value) +
             "; the CUDA kernels accept less than 2^31";
  if (shared_bytes > most_shared_bytes)
    return "the gradient of a kernel of this size needs " + std::to_string(shared_bytes) +
           " bytes of shared memory; a block of this GPU has at most " +
           std::to_string(most_shared_bytes);
  return "";
}

}  // namespace snnlstm::cuda
