// The runs of input values that a convolution sums for one output pixel.
#pragma once

#include <memory>

#include "conv.h"

SNNLSTM_BEGIN_ISA

// The rows of a kernel's taps that meet at least one pixel: [first, last).
struct MetTaps {
  int64_t first, last;

  // Row 0 of the taps reads row `begin` of an image of n rows. `begin` may lie in the border.
  MetTaps(int64_t begin, int kernel, int dilation, int64_t n) {
    const int64_t before = begin < 0 ? (dilation - 1 - begin) / dilation : 0;
    const int64_t until = n > begin ? (n - begin + dilation - 1) / dilation : 0;
    last = until < kernel ? until : kernel;
    first = before < last ? before : last;
  }
};

// The input values that a convolution sums for one output pixel, in chunks whose weights stay in L1
// while the convolution of many pixels reads them.
class RunList {
 public:
  RunList() = default;
  template <class... Args>
  explicit RunList(const Cell& c, Args... args) {
    dense(c, args...);
  }

  // Lists all kernel_h x kernel_w taps of `channels` values each, row by row. Rows of the input lie
  // row_stride apart, and pixels pixel_stride. weight_row is the row of the first tap's weight.
  void dense(const Cell& c, int64_t channels, int64_t row_stride, int64_t pixel_stride,
             int64_t weight_row, int64_t max_len) {
    const bool whole_rows = c.dilation_w == 1 && pixel_stride == channels;
    const int64_t pieces = whole_rows ? 1 : c.kernel_w;
    const int64_t len = whole_rows ? c.kernel_w * channels : channels;
    reserve(c.kernel_h * pieces * (len / max_len + 1));
    for (int64_t i = 0; i < c.kernel_h; ++i)
      for (int64_t j = 0; j < pieces; ++j)
        add({i * c.dilation_h * row_stride + j * c.dilation_w * pixel_stride,
             weight_row + (i * pieces + j) * len, len},
            max_len);
    runs_in_row_ = count_ / c.kernel_h;
  }
  void reserve(int64_t count) {
    runs_.reset(new Run[count]);
    count_ = 0;
  }
  void add(Run run, int64_t max_len) {
    const int64_t parts = (run.len + max_len - 1) / max_len;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t a = run.len * p / parts, b = run.len * (p + 1) / parts;
      runs_[count_++] = {run.in + a, run.w + a, b - a};
    }
  }
  int count() const { return count_; }

  bool is_dense() const { return runs_in_row_ > 0; }
  // Returns the row of taps that a run of a dense list belongs to.
  int64_t row(const Run* run) const { return (run - runs_.get()) / runs_in_row_; }
  // Reduces some neighbouring runs of a dense list to those of the rows [taps.first, taps.last).
  void limit(const Run*& runs, int& number, const MetTaps& taps) const {
    const Run* end = runs + number;
    const Run* first = &runs_[taps.first * runs_in_row_];
    const Run* last = first + (taps.last - taps.first) * runs_in_row_;
    if (runs < first) runs = first;
    if (end > last) end = last;
    number = runs < end ? int(end - runs) : 0;
  }

  // Calls f(first run, number of runs) for stretches of at most max_len values.
  template <class F>
  void chunks(int64_t max_len, F&& f) const {
    for (int first = 0; first < count_;) {
      int64_t len = 0;
      int n = 0;
      while (first + n < count_ && (n == 0 || len + runs_[first + n].len <= max_len))
        len += runs_[first + n++].len;
      f(&runs_[first], n);
      first += n;
    }
  }

 private:
  std::unique_ptr<Run[]> runs_;
  int count_ = 0, runs_in_row_ = 0;  // runs_in_row_: the runs of a row of taps, in a dense list
};

// Returns for how many values of K the weights of `outputs` outputs fill about 12 KiB.
template <class T>
constexpr int64_t chunk_length(int64_t outputs) {
  return 12288 / (outputs * int64_t(sizeof(T)));
}

SNNLSTM_END_ISA
