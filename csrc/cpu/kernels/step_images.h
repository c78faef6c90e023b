// The images from which a time step's gradients follow: d gates, mem before the step and x,
// channels-last with a zero border (layout.h). The steps alternate between two buffers: while the
// tasks of one step read one buffer, others write the images of the step before into the other.
#pragma once

#include "row_tasks.h"
#include "transpose.h"

SNNLSTM_BEGIN_ISA

// The images of all samples that the weight gradient of a step reads. d_gates points to the first
// pixel inside the border. `finite` says whether all d gates are finite.
template <class T>
struct StepImages {
  const T *d_gates, *mem, *x;
  bool finite;
};

template <class T, int VL>
class StepBuffers {
  using S = Simd<T, VL>;

 public:
  explicit StepBuffers(const Layout<T, VL>& l) : l_(l) {}

  // Takes memory for all samples, and for x if the weight gradient is wanted.
  void allocate(Workspace& workspace, bool with_x) {
    const int64_t N = l_.c.N;
    with_x_ = with_x;
    for (int k = 0; k < 2; ++k) {
      d_gates_[k] = workspace.take<T>(k < l_.c.T ? N * l_.gate_image() : 0);
      mem_[k] = workspace.take<T>(N * l_.mem.image());
      x_[k] = workspace.take<T>(with_x_ && k < l_.c.T ? N * l_.x.image() + kReadAhead : 0);
    }
  }

  StepImages<T> images(int64_t t) const {
    return {d_gates_row(t, 0, 0), mem(t, 0), x(t, 0), __atomic_load_n(&finite_, __ATOMIC_RELAXED)};
  }

  // These return the images of step t and sample n, each with its border.
  T* d_gates(int64_t t, int64_t n) const { return d_gates_[t & 1] + n * l_.gate_image(); }
  T* mem(int64_t t, int64_t n) const { return mem_[t & 1] + n * l_.mem.image(); }
  T* x(int64_t t, int64_t n) const { return x_[t & 1] + n * l_.x.image(); }
  // These return row h, counted without the border.
  T* d_gates_row(int64_t t, int64_t n, int64_t h) const {
    return d_gates(t, n) + ((h + l_.ph) * l_.mem.columns + l_.pw) * 4 * l_.Cp;
  }
  T* mem_row(int64_t t, int64_t n, int64_t h) const {
    return mem(t, n) + ((h + l_.ph) * l_.mem.columns + l_.pw) * l_.Cp;
  }

  // Writes zeros around the images of sample n, in both buffers.
  void clear_borders(int64_t n) const {
    for (int k = 0; k < 2; ++k) {
      clear_border(mem(k, n), l_.mem, l_.mem.pixel);
      if (k >= l_.c.T) continue;
      clear_border(d_gates(k, n), l_.mem, 4 * l_.Cp);
      if (with_x_) clear_border(x(k, n), l_.x, l_.x.pixel);
    }
  }

  // Says whether some sums of d gates are finite. If they are not, the weight gradient will know.
  bool finite(const T* sums, int64_t count) {
    typename S::R differences{};
    for (int64_t k = 0; k < count; k += VL) differences += S::load(sums + k) - S::load(sums + k);
    T sum = 0;
    for (int lane = 0; lane < VL; ++lane) sum += differences[lane];
    if (!(sum == 0)) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
    return sum == 0;
  }

  // Clears the lanes without a channel of rows [begin, end): the weights of these lanes are zero, so
  // infinite inputs have made them NaN.
  void clear_empty_lanes(int64_t t, int64_t n, int64_t begin, int64_t end) const {
    const int64_t lanes = l_.Cp - l_.c.C;
    for (int64_t h = begin; h < end; ++h)
      for (int64_t w = 1; w <= l_.Wo; ++w)
        for (int64_t gate = 0; gate < 4; ++gate) {
          T* const behind = d_gates_row(t, n, h) + w * 4 * l_.Cp - gate * VL;
          std::memset(behind - lanes, 0, lanes * sizeof(T));
        }
  }

  // Reads the input rows of step t and sample n that belong to state rows [begin, end) into an
  // image. The last state row also reads the rest of the image.
  void read_x(const View& v, int64_t t, int64_t n, int64_t image, int64_t begin,
              int64_t end) const {
    const Cell& c = l_.c;
    const int64_t last = end == l_.Ho ? c.H : std::min(end * c.stride_h, c.H);
    const int64_t first = std::min(begin * c.stride_h, c.H);
    load_rows<S>(v, t, n, first, last - first, c.Cin,
                 x(t, image) + ((first + l_.ph) * l_.x.columns + l_.pw) * c.Cin,
                 Pixels{c.W, l_.x.row(), c.Cin}, c.Cin);
  }

  // Reads rows [begin, end) of a state at step t, Wo pixels of Cp channels, into rows that lie
  // `row` apart.
  void read_rows(const View& v, int64_t t, int64_t n, int64_t begin, int64_t end, T* dst,
                 int64_t row) const {
    load_rows<S>(v, t, n, begin, end - begin, l_.c.C, dst, Pixels{l_.Wo, row, l_.Cp}, l_.Cp);
  }

 private:
  // Clears the border of an image that has the size of `in` and `pixel` values in a pixel.
  void clear_border(T* image, const Input& in, int64_t pixel) const {
    const int64_t row = in.columns * pixel;
    const int64_t left = l_.pw * pixel;
    const int64_t right = left + in.W * pixel;
    std::memset(image, 0, l_.ph * row * sizeof(T));
    for (int64_t h = l_.ph; h < l_.ph + in.H; ++h) {
      std::memset(image + h * row, 0, left * sizeof(T));
      std::memset(image + h * row + right, 0, (row - right) * sizeof(T));
    }
    const int64_t below = l_.ph + in.H;
    std::memset(image + below * row, 0, (in.rows - below) * row * sizeof(T));
  }

  const Layout<T, VL>& l_;
  T* d_gates_[2] = {nullptr, nullptr};
  T* mem_[2] = {nullptr, nullptr};
  T* x_[2] = {nullptr, nullptr};
  bool with_x_ = false, finite_ = true;
};

SNNLSTM_END_ISA
