// The input half for an x of mostly zeros, such as spikes, by sums over lists of nonzero values.
//
// An output pixel sums some thirty entries (3 x 3 taps, 32 channels, 10 % dense). Their arithmetic
// costs less than the mispredicted ends of loops of varying length. So the pixels are visited in
// the order of their number of entries, which changes only a few times per block.
#pragma once

#include "sparse_list.h"

SNNLSTM_BEGIN_ISA

// Loads four values at once and splats them one by one. That saves loads, if one instruction of the
// processor spreads a lane over a vector.
template <class S>
struct Quad {
  using T = typename S::Scalar;
  using R = typename S::R;
  static constexpr int bytes = S::lanes * sizeof(T);
  static constexpr bool spreads = sizeof(T) == 4 && kNativeBytes >= 32 && bytes <= kNativeBytes;
  explicit SNNLSTM_INLINE Quad(const T* p) : from(p) {
#if defined(__AVX2__)
    if constexpr (spreads && bytes == 16) all = R(_mm_loadu_ps(p));
    if constexpr (spreads && bytes == 32)
      all = R(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#endif
#if defined(__AVX512F__)
    if constexpr (spreads && bytes == 64) all = R(_mm512_broadcast_f32x4(_mm_loadu_ps(p)));
#endif
  }
  template <int k>
  SNNLSTM_INLINE R splat() const {
#if defined(__AVX2__)
    if constexpr (spreads && bytes == 16) return R(_mm_permute_ps(__m128(all), k * 0x55));
    if constexpr (spreads && bytes == 32) return R(_mm256_permute_ps(__m256(all), k * 0x55));
#endif
#if defined(__AVX512F__)
    if constexpr (spreads && bytes == 64) return R(_mm512_permute_ps(__m512(all), k * 0x55));
#endif
    return S::splat(from[k]);
  }
  const T* from;
  R all;
};

// The taps are cut into groups whose weights stay in cache: several kernel rows, one row, or a part
// of a row. A list holds the nonzeros of the input rows under one output row and group, column by
// column, so that the entries of an output pixel are adjacent. (With dilation, columns that meet
// in a pixel lie side by side in the list.) If a group has one kernel row, the list of an input row
// serves all kernel rows.
template <class T, int VL>
class SparseInput {
  using S = Simd<T, VL>;
  using R = typename S::R;
  using L = Layout<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int kShift = log2_of(kGates);

  struct TapGroup {
    int64_t row, rows, column, columns;  // of the kernel's taps
  };
  struct Pixel {
    int32_t out;    // place of the pixel in the gate buffer
    int32_t begin;  // its first entry
    int32_t shift;  // from the labels of its entries to places in the weight
  };
  struct Stretch {
    int32_t length, count;  // `count` pixels of `length` entries
  };

 public:
  // The lists of one thread.
  struct InputLists {
    int32_t *begin, *label, *histogram, *stretches_end;
    T* value;
    Pixel* pixels;
    Stretch* stretches;
  };

  SparseInput(const L& l, int64_t block_rows)
      : l_(l),
        c_(l.c),
        Wx_(l.x.columns),
        Wo_(l.Wo),
        out_row_(l.Wr * kGates),
        block_rows_(block_rows) {
    const int64_t room = kWeightBytes / (kGates * int64_t(sizeof(T)));
    const int64_t whole_rows = room / (c_.kernel_w * c_.Cin);
    rows_ = whole_rows < 1 ? 1 : whole_rows < c_.kernel_h ? whole_rows : c_.kernel_h;
    columns_ = c_.kernel_w;
    if (whole_rows < 1) columns_ = room / c_.Cin < 1 ? 1 : room / c_.Cin;
    // The groups of rows get nearly equal shares.
    row_groups_ = (c_.kernel_h + rows_ - 1) / rows_;
    rows_ = (c_.kernel_h + row_groups_ - 1) / row_groups_;
    column_groups_ = (c_.kernel_w + columns_ - 1) / columns_;
  }

  void allocate(Workspace& workspace, InputLists& s) const {
    s.begin = workspace.take<int32_t>(list_count() * (Wx_ + 1));
    s.label = workspace.take<int32_t>(entries());
    s.value = workspace.take<T>(entries());
    s.histogram = workspace.take<int32_t>((longest() + 1) * kCounters);
    s.pixels = workspace.take<Pixel>(groups() * block_rows_ * Wo_);
    s.stretches = workspace.take<Stretch>(groups() * most_stretches());
    s.stretches_end = workspace.take<int32_t>(groups());
  }

  // Says whether 32 bits hold all labels, numbers of entries and places of pixels.
  bool fits() const {
    return fits_label((Wx_ + rows_ * c_.kernel_w) * c_.Cin * kGates) && fits_label(entries()) &&
           fits_label(block_rows_ * out_row_);
  }

  // cycles() estimates what the input half takes per output pixel and channel block, lists
  // included, at `density` nonzeros per value, and direct_cycles() what the direct sweep takes
  // (conv_row). Measured on Zen 3 with AVX2, in cycles per vector of 32 bytes: direct 2.15 per
  // value and pixel; sparse 2.75 per nonzero, 18 per pixel for its gates and the ends of loops, 5
  // per 8 values listed and row, 12 per pixel sorted. Two loads a cycle are the bound: a nonzero
  // loads 4 vectors of weights, 1/2 of a label and 1/4 to 1 of a value.
  double cycles(double density) const {
    const double values = double(l_.x.K);
    const double listed = shared() ? 1 + 2.0 / block_rows_ : c_.kernel_h;
    const double lists = 10 + listed * (5 + 5 * ((c_.Cin + 7) / 8)) + 12.0 * groups();
    return kVectorCost<T, VL> * (2.75 * density * values + 18.0 * groups()) + lists / l_.Cb;
  }
  double direct_cycles() const { return kVectorCost<T, VL> * (2.15 * l_.x.K + 7); }

  // Lists the nonzeros under `rows` output rows. The patch (rows, Wx, Cin) has the input rows from
  // the first output row's first tap on, and kListSlack readable values after them.
  void build(const T* patch, int64_t rows, const InputLists& s) const {
    const int64_t row = Wx_ * c_.Cin, listed_rows = c_.kernel_h * c_.dilation_h;
    int64_t n = 0;
    if (shared()) {
      const int64_t lists = (rows - 1) * c_.stride_h + listed_rows - c_.dilation_h + 1;
      for (int64_t r = 0; r < lists; ++r)
        n = list_row(patch + r * row, 1, n, s.begin + r * (Wx_ + 1), s);
    } else {
      for (int64_t h = 0; h < rows; ++h)
        for (int64_t g = 0; g < row_groups_; ++g)
          n = list_row(patch + (h * c_.stride_h + g * rows_ * c_.dilation_h) * row,
                       group(g * column_groups_).rows, n,
                       s.begin + (h * row_groups_ + g) * (Wx_ + 1), s);
    }
    for (int64_t g = 0; g < groups(); ++g) sort_pixels(g, rows, s);
  }

  // Adds x's part to the gates of one channel block, out (rows, Wr, 4, VL). w is the block's
  // weight, (K, 4, VL). Entries are summed onto the gates or, which rounds less, in pieces that are
  // then added to them.
  void convolve(const InputLists& s, const T* w, bool in_pieces, T* out) const {
    for (int64_t g = 0; g < groups(); ++g) {
      const Pixel* pixel = s.pixels + g * block_rows_ * Wo_;
      const Stretch* stretch = s.stretches + g * most_stretches();
      const T* weight = w + group(g).row * c_.kernel_w * c_.Cin * kGates;
      for (int64_t k = 0; k < s.stretches_end[g]; ++k, ++stretch) {
        const int64_t length = stretch->length;
        const Pixel* end = pixel + stretch->count;
        if (length == 0) {
          pixel = end;
          continue;
        }
        for (; pixel + 2 <= end; pixel += 2) tile<2>(s, pixel, length, in_pieces, weight, out);
        if (pixel < end) tile<1>(s, pixel++, length, in_pieces, weight, out);
      }
    }
  }

 private:
  // The bytes of a group's weights exceed a 32 KiB L1, because longer lists of entries pay for
  // loads from L2. With 3 x 3 taps, 32 -> 64 channels, 10 % dense, 16 KiB take 1.00 of the time, 24
  // KiB 0.95 and 36 KiB (all taps) 0.87. With 64 channels 72 KiB (all taps) take a fifth longer
  // than 24 KiB.
  static constexpr int64_t kWeightBytes = 40960;
  static constexpr int64_t kPiece = 32;  // entries
  // Neighbouring pixels often have equally many entries. Two counters alternate, so that no
  // increment waits for the previous one.
  static constexpr int kCounters = 2;

  bool shared() const { return rows_ == 1; }
  int64_t groups() const { return row_groups_ * column_groups_; }
  int64_t longest() const { return rows_ * columns_ * c_.Cin; }
  int64_t most_stretches() const {
    return longest() + 1 < block_rows_ * Wo_ ? longest() + 1 : block_rows_ * Wo_;
  }
  int64_t entries() const { return list_count() * Wx_ * rows_ * c_.Cin + kListSlack; }
  int64_t list_count() const {
    return shared() ? (block_rows_ - 1) * c_.stride_h + (c_.kernel_h - 1) * c_.dilation_h + 1
                    : block_rows_ * row_groups_;
  }
  TapGroup group(int64_t g) const {
    TapGroup p;
    p.row = g / column_groups_ * rows_;
    p.rows = c_.kernel_h - p.row < rows_ ? c_.kernel_h - p.row : rows_;
    p.column = c_.kernel_w * (g % column_groups_) / column_groups_;
    p.columns = c_.kernel_w * (g % column_groups_ + 1) / column_groups_ - p.column;
    return p;
  }

  // Appends the nonzeros of `rows` kernel rows' input rows, column by column, to the n entries that
  // are there.
  int64_t list_row(const T* x, int64_t rows, int64_t n, int32_t* begin, const InputLists& s) const {
    const int64_t Cin = c_.Cin;
    const int64_t row_step = c_.dilation_h * Wx_ * Cin;
    const int64_t dilation = c_.dilation_w;
    const int64_t kernel_w = c_.kernel_w, columns = Wx_;
    int32_t* const label = s.label;
    T* const value = s.value;
    for (int64_t residue = 0; residue < dilation; ++residue)
      for (int64_t q = residue, m = 0; q < columns; q += dilation, ++m) {
        *begin++ = int32_t(n);
        n += list_nonzeros<kShift>(x + q * Cin, row_step, rows, Cin, int32_t(m * Cin * kGates),
                                   int32_t(kernel_w * Cin * kGates), label + n, value + n);
      }
    *begin = int32_t(n);
    return n;
  }

  // Sorts the pixels of one group by the number of their entries.
  void sort_pixels(int64_t g, int64_t rows, const InputLists& s) const {
    const TapGroup p = group(g);
    std::memset(s.histogram, 0, (longest() + 1) * kCounters * sizeof(int32_t));
    int32_t* const histogram = s.histogram;
    int32_t longest_here = 0;
    each_pixel(g, p, rows, s, [&](int64_t w, int32_t length, const Pixel&) {
      ++histogram[length * kCounters + w % kCounters];
      longest_here = length > longest_here ? length : longest_here;
    });
    Stretch* stretch = s.stretches + g * most_stretches();
    int32_t count = 0, place = 0;
    for (int64_t length = 0; length <= longest_here; ++length) {
      const int32_t before = place;
      for (int k = 0; k < kCounters; ++k) {
        int32_t& here = histogram[length * kCounters + k];
        place += here;
        here = place - here;
      }
      if (place > before) stretch[count++] = {int32_t(length), place - before};
    }
    s.stretches_end[g] = count;
    Pixel* pixels = s.pixels + g * block_rows_ * Wo_;
    each_pixel(g, p, rows, s, [&](int64_t w, int32_t length, const Pixel& pixel) {
      pixels[histogram[length * kCounters + w % kCounters]++] = pixel;
    });
  }

  template <class F>
  SNNLSTM_INLINE void each_pixel(int64_t g, const TapGroup& p, int64_t rows, const InputLists& s,
                                 F&& f) const {
    const int64_t dilation = c_.dilation_w;
    const int64_t columns = Wx_ / dilation;
    const int64_t longer = Wx_ % dilation;
    const int64_t advance = c_.stride_w / dilation;
    const int64_t residue_advance = c_.stride_w % dilation;
    const int64_t span = p.columns;
    const int64_t pixel = c_.Cin * kGates;
    const int64_t Wo = Wo_;
    for (int64_t h = 0; h < rows; ++h) {
      const int64_t list =
          shared() ? h * c_.stride_h + p.row * c_.dilation_h : h * row_groups_ + g / column_groups_;
      const int32_t* const begin = s.begin + list * (Wx_ + 1) + p.column;
      // Column w * stride_w is the m-th of its residue modulo the dilation. The list has the
      // columns of lower residues first.
      int64_t residue = 0, m = 0, before = 0;
      int32_t out = int32_t(h * out_row_);
      for (int64_t w = 0; w < Wo; ++w, out += kGates) {
        const int32_t first = begin[before + m];
        f(w, begin[before + m + span] - first, Pixel{out, first, int32_t(m * pixel)});
        m += advance;
        if (residue_advance == 0) continue;
        residue += residue_advance;
        if (residue >= dilation) {
          residue -= dilation;
          ++m;
        }
        before = residue * columns + (residue < longer ? residue : longer);
      }
    }
  }

  template <int P>
  static SNNLSTM_INLINE void tile(const InputLists& s, const Pixel* pixels, int64_t length,
                                  bool in_pieces, const T* weight, T* out) {
    using V = typename Merged<S, 4>::Vector;
    using R = typename V::R;
    constexpr int NV = Merged<S, 4>::count, lanes = V::lanes;
    R acc[P][NV];
    uintptr_t w[P];  // the address of label 0, which may lie before the weight
    const int32_t* label[P];
    const T* value[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      w[p] = reinterpret_cast<uintptr_t>(weight) - pixels[p].shift * sizeof(T);
      label[p] = s.label + pixels[p].begin;
      value[p] = s.value + pixels[p].begin;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[p][v] = in_pieces ? R{} : V::load(out + pixels[p].out + v * lanes);
    }
    const auto add = [&](int p, uintptr_t labelled, R x) {
      const T* row = reinterpret_cast<const T*>(w[p] + labelled * sizeof(T));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[p][v] += x * V::load(row + v * lanes);
    };
    for (int64_t k = 0, begin = 0; begin < length; begin = k) {
      const int64_t end = in_pieces && length - begin > kPiece ? begin + kPiece : length;
      for (; k + 4 <= end; k += 4)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          uint64_t labels[2];  // one load brings two labels, because loads are the bound
          std::memcpy(labels, label[p] + k, sizeof(labels));
          const Quad<V> x(value[p] + k);
          add(p, uint32_t(labels[0]), x.template splat<0>());
          add(p, labels[0] >> 32, x.template splat<1>());
          add(p, uint32_t(labels[1]), x.template splat<2>());
          add(p, labels[1] >> 32, x.template splat<3>());
        }
      for (; k < end; ++k)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) add(p, uint32_t(label[p][k]), V::splat(value[p][k]));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          T* const to = out + pixels[p].out + v * lanes;
          V::store(to, in_pieces ? acc[p][v] + V::load(to) : acc[p][v]);
          acc[p][v] = R{};
        }
    }
  }

  L l_;
  Cell c_;
  int64_t Wx_, Wo_, out_row_, block_rows_, rows_, columns_, row_groups_, column_groups_;
};

SNNLSTM_END_ISA
