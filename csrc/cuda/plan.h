// Choices made on the host before anything is launched: sizes of our own images, tiles, and how
// each tensor of the caller's is accessed.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "api.h"
#include "tile.cuh"

namespace snnlstm::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The type that kernels of these states compute in.
inline DType real_of(DType states) {
  return states == DType::float64 ? DType::float64 : DType::float32;
}

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

// Hands out pieces of one allocation, 256-byte aligned. Without memory it only counts.
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

// A tile of at most `pixels` pixels that holds whole pooling windows, or false where there is none.
// Its width is even: threads hold pairs. Fewest pixels of tiles and of neighbourhoods win.
inline bool choose_tile(const Cell& c, int64_t height, int64_t width, int pixels, bool windows,
                        Tiling& tiling) {
  const int64_t unit_h = windows ? c.pool_h : 1;
  const int64_t unit_w = windows && c.pool_w % 2 ? 2 * int64_t(c.pool_w) : windows ? c.pool_w : 2;
  int64_t best = -1;
  for (int64_t w = unit_w; unit_h * w <= pixels; w += unit_w) {
    const int64_t h =
        std::min(pixels / w / unit_h * unit_h, round_up(std::max<int64_t>(height, 1), unit_h));
    const int64_t rows = std::max<int64_t>(ceil_div(height, h), 1);
    const int64_t cols = std::max<int64_t>(ceil_div(width, w), 1);
    // Sectors of 8 numbers: a row that goes on beyond the tile costs one more at each end.
    const int64_t halo = std::min<int64_t>(2 * c.pad_h(), 1 << 16);
    const int64_t read = (h + halo) * (ceil_div(w, 8) + (w < width ? 2 : 0)) * 8;
    const int64_t cost = rows * cols * (4 * pixels + read);
    if (best < 0 || cost < best) {
      best = cost;
      tiling.h = int(h), tiling.w = int(w);
      tiling.by_w = SmallDivisor(w), tiling.by_rows = Divisor(rows), tiling.by_cols = Divisor(cols);
      tiling.by_window = SmallDivisor(std::max<int64_t>(w / c.pool_w, 1));
      tiling.by_windows = SmallDivisor(std::max<int64_t>(h / c.pool_h * (w / c.pool_w), 1));
    }
    if (w >= width) break;
  }
  return best >= 0;
}

// The caller's tensor from time step t on. extent: T, N, channels, H, W. width: channels that a
// thread holds.
inline Tensor tensor(const View& v, DType type, int64_t t, const int64_t (&extent)[5], int width) {
  Tensor a;
  a.type = type;
  if (v.data == nullptr) return a;
  const int size = bytes_of(type);
  a.data = static_cast<char*>(v.data) + t * v.stride[0] * size;
  a.t = v.stride[0], a.n = v.stride[1];
  a.c = int(v.stride[2]), a.h = int(v.stride[3]), a.w = int(v.stride[4]);
  a.channels = int(extent[2]);
  int64_t last = 0;
  for (int k = 2; k < 5; ++k) last += (extent[k] - 1) * std::abs(v.stride[k]);
  if (last >= int64_t(1) << 31)
    throw std::runtime_error("one image of a tensor reaches over " + std::to_string(last) +
                             " elements, accepted are less than 2^31: make it contiguous");
  const auto multiple = [&](int of, int but) {  // of all strides that are used, but one
    if (reinterpret_cast<uintptr_t>(a.data) % (std::min(of * size, 16)) != 0) return false;
    for (int k = 0; k < 5; ++k)
      if (k != but && extent[k] > 1 && v.stride[k] % of != 0) return false;
    return true;
  };
  const bool c_dense = a.c == 1 || extent[2] == 1, w_dense = a.w == 1 || extent[4] == 1;
  if (width > 1 && c_dense && extent[2] % width == 0 && multiple(width, 2))
    a.access = Access::channels;
  else if (w_dense && extent[4] % 2 == 0 && multiple(2, 4))
    a.access = Access::rows;
  else
    a.access = Access::scalar;
  return a;
}

// An image of ours, (N, Ho, Wo, planes, Cp), and the same as a Tensor.
inline Image image(void* data, const Shape& s, DType type, int planes = 1) {
  Image a;
  a.data = data;
  a.type = type;
  a.n = s.pixels * planes * s.Cp, a.t = s.c.N * a.n;
  a.width = int(s.Wo), a.planes = planes, a.Cp = int(s.Cp);
  return a;
}

inline Tensor as_tensor(const Image& i) {
  Tensor a;
  a.data = i.data;
  a.t = i.t, a.n = i.n, a.c = 1, a.w = i.planes * i.Cp, a.h = i.width * a.w;
  a.channels = i.planes * i.Cp;
  a.type = i.type;
  a.access = Access::channels;
  return a;
}

// Why the kernels cannot run a cell in launches of so many blocks; empty if they can. Offsets
// within one image, and blocks, are counted in 31 bits.
inline std::string reason_against(const Cell& c, int64_t blocks) {
  const Shape s(c);
  // Rows or columns that a tile's taps reach over, and what is divided by the stride there.
  const auto reach = [](int64_t size, double stride, int64_t taps, double dilation) {
    constexpr int64_t tile = 128;
    const double all = (double(size + tile) * stride + double(taps - 1) * dilation) * stride;
    return int64_t(std::min(all, 9e18));
  };
  const std::pair<const char*, int64_t> counts[] = {
      {"((height / stride + 128) * stride + (kernel_size - 1) * dilation) * stride of the rows",
       reach(s.Ho, c.stride_h, c.kernel_h, c.dilation_h)},
      {"((width / stride + 128) * stride + (kernel_size - 1) * dilation) * stride of the columns",
       reach(s.Wo, c.stride_w, c.kernel_w, c.dilation_w)},
      {"4 * channels * height * width of one image's gates", 4 * s.Cp * s.pixels},
      {"channels * height * width of one input image", c.Cin * c.H * c.W},
      {"the number of blocks of a launch", blocks}};
  for (const auto& [what, value] : counts)
    if (value >= int64_t(1) << 31)
      return std::string(what) + " is " + std::to_string(value) +
             "; the CUDA kernels accept less than 2^31";
  return "";
}

inline void refuse_oversize(const Cell& c, int64_t blocks) {
  const std::string reason = reason_against(c, blocks);
  if (!reason.empty()) throw std::runtime_error(reason);
}

}  // namespace snnlstm::cuda
