// The weight gradient of the input half for an x of mostly zeros.
//
// A few input rows have a list per input channel, of the places where the channel is nonzero. A
// register tile sums, over such a list, value * d gates for a few taps at once. The d gates of one
// channel block lie compactly in L1. With strides, input pixels of different residues meet
// different taps, and are listed apart.
//
// Every sum runs over the pixels of a block in their order, and is then added to the result, as in
// weight_products.h.
#pragma once

#include "sparse_list.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class SparseWeightGrad {
  using S = Simd<T, VL>;
  using V = typename Merged<S, 4>::Vector;
  using L = Layout<T, VL>;
  static constexpr int kGates = 4 * VL, kVectors = Merged<S, 4>::count;
  static constexpr int kTaps = kMaxPixels<kVectors>;

 public:
  // The lists of rows [first, first + rows) of a sample of x, counted with the border.
  struct GradLists {
    int64_t first, rows;
    bool finite;
    int32_t *begin, *place;  // begin: (residues, Cin), and the end
    T* value;
  };
  // The memory of one thread.
  struct ListScratch {
    int32_t *key, *place, *next;
    T *value, *d_gates;
  };

  explicit SparseWeightGrad(const L& l)
      : c_(l.c), l_(l), keys_(c_.stride_h * c_.stride_w * c_.Cin) {
    above_ = (c_.kernel_h - 1) * c_.dilation_h / c_.stride_h;
    left_ = (c_.kernel_w - 1) * c_.dilation_w / c_.stride_w;
    width_ = left_ + (l.pw + c_.W - 1) / c_.stride_w + 1;
    const int64_t fit = kBytes / (width_ * kGates * int64_t(sizeof(T)));
    rows_ = (fit < 1 ? 1 : fit) * c_.stride_h;
    if (rows_ > c_.H) rows_ = c_.H;
    blocks_ = rows_ > 0 ? (c_.H + rows_ - 1) / rows_ : 0;
  }

  // cycles() estimates what the gradient takes per output pixel and channel block at `density`
  // nonzeros per value, with lists that all channel blocks share, and direct_cycles() what
  // weight_grad_run takes. Zen 3 with AVX2 was measured, per vector of 32 bytes. Sparse: 3 per
  // nonzero and tap, 40 per register tile and list, 8 to gather a pixel's d gates. GradLists: 24
  // per pixel, 5.5 per 8 values, 9 per nonzero. Direct: 2.15 per value where d gates lie side by
  // side, more where they are far apart in memory, less where zero lanes are left out.
  double cycles(double density) const {
    const double pixels = double(rows_) * c_.W / (c_.stride_h * c_.stride_w);
    const double tiles = double(l_.Kx) / (l_.taps < kTaps ? l_.taps : kTaps);
    const double lists = 24 + 5.5 * ((c_.Cin + 7) / 8) + 9 * density * c_.Cin;
    const double sums = 3 * density * l_.Kx + 40 * tiles / pixels + 8;
    return kVectorCost<T, VL> * sums + lists * c_.stride_h * c_.stride_w / l_.Cb;
  }
  double direct_cycles() const {
    const double all = l_.closes_up() ? 0.25 * l_.few_vectors() : 1;
    return kVectorCost<T, VL> * all * l_.Kx * (l_.Cb == 1 ? 2.15 : l_.Cb < 16 ? 2.5 : 4.2);
  }

  // Says whether 32 bits hold all keys, numbers of entries and places of d gates.
  bool fits() const { return fits_label(keys_) && fits_label(entries()) && fits_label(gathered()); }

  // Returns the number of blocks in which a sample's rows are worked on.
  int64_t blocks() const { return blocks_; }

  void carve(Workspace& workspace, GradLists& s) const {
    s.begin = workspace.take<int32_t>(keys_ + 1);
    s.place = workspace.take<int32_t>(entries());
    s.value = workspace.take<T>(entries());
  }
  void carve(Workspace& workspace, ListScratch& s) const {
    s.key = workspace.take<int32_t>(entries());
    s.place = workspace.take<int32_t>(entries());
    s.next = workspace.take<int32_t>(keys_ + 1);
    s.value = workspace.take<T>(entries());
    s.d_gates = workspace.take<T>(gathered());
  }

  // Lists a block of x, a sample (H + 2 pad, Wx, Cin) with kListSlack readable values behind it.
  void build(const T* x, int64_t block, const ListScratch& t, GradLists& s) const {
    s.first = l_.ph + block * rows_;
    s.rows = c_.H - block * rows_ < rows_ ? c_.H - block * rows_ : rows_;
    std::memset(t.next, 0, (keys_ + 1) * sizeof(int32_t));
    const int64_t Cin = c_.Cin, stride_w = c_.stride_w;
    int64_t n = 0;
    for (int64_t y = s.first; y < s.first + s.rows; ++y) {
      const int64_t row_key = y % c_.stride_h * stride_w;
      const int64_t row_place = (y / c_.stride_h - top(s)) * width_ + left_;
      int64_t residue = l_.pw % stride_w, column = l_.pw / stride_w;
      const T* from = x + (y * l_.Wx + l_.pw) * Cin;
      for (int64_t q = 0; q < c_.W; ++q, from += Cin) {
        const int64_t more = list_nonzeros<0>(from, 0, 1, Cin, int32_t((row_key + residue) * Cin),
                                              0, t.key + n, t.value + n);
        const int32_t place = int32_t((row_place + column) * kGates);
        for (int64_t k = 0; k < more; k += kListSlack)
          for (int64_t slot = 0; slot < kListSlack; ++slot) t.place[n + k + slot] = place;
        n += more;
        if (++residue == stride_w) residue = 0, ++column;
      }
    }
    for (int64_t k = 0; k < n; ++k) ++t.next[t.key[k]];
    int32_t sum = 0;
    for (int64_t key = 0; key <= keys_; ++key) {
      s.begin[key] = sum;
      sum += t.next[key];
      t.next[key] = s.begin[key];
    }
    T excess = 0;  // becomes NaN if any value is infinite or NaN
    for (int64_t k = 0; k < n; ++k) {
      const int32_t to = t.next[t.key[k]]++;
      s.place[to] = t.place[k];
      s.value[to] = t.value[k];
      excess += t.value[k] - t.value[k];
    }
    s.finite = excess == T(0);
  }

  // Adds the part of these rows for one channel block to out (Kx, 4, VL). d_gates is the sample's
  // first pixel, at the channel block.
  void run(const GradLists& s, const T* d_gates, const ListScratch& t, T* out) const {
    gather(s, d_gates, t.d_gates);
    for (int64_t ry = 0; ry < c_.stride_h; ++ry)
      for (int64_t rq = 0; rq < c_.stride_w; ++rq) {
        const int32_t* begin = s.begin + (ry * c_.stride_w + rq) * c_.Cin;
        Tap taps[kTaps];
        int count = 0;
        for (int64_t i = 0; i < c_.kernel_h; ++i)
          for (int64_t j = 0; j < c_.kernel_w; ++j) {
            const int64_t y = i * c_.dilation_h - ry, q = j * c_.dilation_w - rq;
            if (y % c_.stride_h != 0 || q % c_.stride_w != 0) continue;
            const int64_t back = (y / c_.stride_h * width_ + q / c_.stride_w) * kGates;
            taps[count] = {reinterpret_cast<uintptr_t>(t.d_gates) - back * sizeof(T),
                           out + (i * c_.kernel_w + j) * c_.Cin * kGates};
            if (!s.finite)
              add_inside(s, begin, back, taps[count]);
            else if (++count == kTaps)
              sweep(s, begin, taps, count), count = 0;
          }
        sweep(s, begin, taps, count);
      }
  }

 private:
  static constexpr int64_t kBytes = 20480;

  struct Tap {
    // The address of the output pixel that sees input pixel 0 with this tap, which may lie before
    // the gathered d gates.
    uintptr_t d_gates;
    T* out;  // (Cin, 4, VL)

    const T* at(int64_t place) const {
      return reinterpret_cast<const T*>(d_gates + place * sizeof(T));
    }
  };

  int64_t entries() const { return rows_ * c_.W * c_.Cin + kListSlack; }
  int64_t gathered() const { return ((rows_ - 1) / c_.stride_h + 2 + above_) * width_ * kGates; }
  // Returns the output row of the gathered d gates' row 0, which is the lowest that the lists'
  // first row meets.
  int64_t top(const GradLists& s) const { return s.first / c_.stride_h - above_; }

  // Copies the d gates that the rows of the lists meet, and writes zeros where there is no output
  // pixel.
  void gather(const GradLists& s, const T* d_gates, T* out) const {
    const int64_t d_pixel = 4 * l_.Cp, pixel = kGates * sizeof(T);
    const int64_t last = (s.first + s.rows - 1) / c_.stride_h;
    for (int64_t h = top(s); h <= last; ++h, out += width_ * kGates) {
      if (h < 0 || h >= l_.Ho) {
        std::memset(out, 0, width_ * pixel);
        continue;
      }
      const T* d = d_gates + h * l_.Wm * d_pixel;
      std::memset(out, 0, left_ * pixel);
      T* to = out + left_ * kGates;
      const int64_t count = l_.Wo < width_ - left_ ? l_.Wo : width_ - left_;
      for (int64_t w = 0; w < count; ++w, to += kGates, d += d_pixel)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) S::store(to + v * VL, S::load(d + v * VL));
      std::memset(to, 0, (width_ - left_ - count) * pixel);
    }
  }

  // Adds one tap without the zeros around the d gates, since zero times infinity is NaN.
  void add_inside(const GradLists& s, const int32_t* begin, int64_t back, const Tap& tap) const {
    for (int64_t ci = 0; ci < c_.Cin; ++ci)
      for (int32_t k = begin[ci]; k < begin[ci + 1]; ++k) {
        const int64_t pixel = (s.place[k] - back) / kGates;
        const int64_t h = pixel / width_ + top(s), w = pixel % width_ - left_;
        if (h < 0 || h >= l_.Ho || w < 0 || w >= l_.Wo) continue;
        for (int64_t v = 0; v < kGates; ++v)
          tap.out[ci * kGates + v] += s.value[k] * tap.at(s.place[k])[v];
      }
  }

  void sweep(const GradLists& s, const int32_t* begin, const Tap* taps, int count) const {
    with_count<kTaps>(count, [&](auto n) { channels<decltype(n)::value>(s, begin, taps); });
  }

  template <int J>
  void channels(const GradLists& s, const int32_t* begin, const Tap* taps) const {
    for (int64_t ci = 0; ci < c_.Cin; ++ci) {
      typename V::R acc[J][kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[j][v] = typename V::R{};
      for (int32_t k = begin[ci]; k < begin[ci + 1]; ++k) {
        const typename V::R x = V::splat(s.value[k]);
        const int64_t place = s.place[k];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            acc[j][v] += x * V::load(taps[j].at(place) + v * V::lanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          T* p = taps[j].out + ci * kGates + v * V::lanes;
          V::store(p, V::load(p) + acc[j][v]);
        }
    }
  }

  Cell c_;
  L l_;
  // Rows of gathered d gates have width_ pixels. The taps reach above_ rows and left_ columns back.
  int64_t keys_, rows_, blocks_, above_, left_, width_;
};

SNNLSTM_END_ISA
