// The input half where x is mostly zeros, as spikes are: sums over lists of the nonzero values alone.
//
// An output pixel sums some ten entries per kernel row (3 x 32 channels, 10 % dense). What costs is
// not their arithmetic but loops of ever different length, whose ends are mispredicted. So pixels are
// visited in the order of how many entries they have: the length changes only a few times per block.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "layout.h"

SNNLSTM_BEGIN_ISA

// How many of n values are not zero (NaN is not; -0.0 is).
template <class S, class T = typename S::Scalar>
int64_t count_nonzero(const T* x, int64_t n) {
  typename S::Mask sum{};
  int64_t k = 0, total = 0;
  for (; k + S::lanes <= n; k += S::lanes) sum -= S::load(x + k) != typename S::R{};
  for (; k < n; ++k) total += x[k] != T(0);
  for (int lane = 0; lane < S::lanes; ++lane) total += sum[lane];
  return total;
}

#if defined(__AVX2__)
// For every set of 8 lanes: its members, in order.
struct LaneTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr LaneTable() : lanes() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][n++] = uint8_t(lane);
  }
};
inline constexpr LaneTable kLaneTable;
#endif

// Appends the nonzeros among x[0 .. count), count <= 8, to the end of a list:
// label[n] = first + (place in x << shift), value[n]. Returns how many. Reads x[0 .. 8) and writes
// whole vectors: kListSlack.
template <int shift>
SNNLSTM_INLINE int64_t append_nonzeros(const float* x, int64_t count, int32_t first, int32_t* label,
                                       float* value) {
#if defined(__AVX2__)
  const __m256 v = _mm256_loadu_ps(x);
  const unsigned set = unsigned(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ))) &
                       ((1u << count) - 1);
  const __m256i lanes = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[set])));
  _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(v, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(label),
                      _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_slli_epi32(lanes, shift)));
  return __builtin_popcount(set);
#else
  int64_t n = 0;
  for (int64_t k = 0; k < count; ++k) {
    label[n] = first + int32_t(k << shift);
    value[n] = x[k];
    n += x[k] != 0.0f;
  }
  return n;
#endif
}

template <int shift>
SNNLSTM_INLINE int64_t append_nonzeros(const double* x, int64_t count, int32_t first, int32_t* label,
                                       double* value) {
  int64_t n = 0;
  for (int64_t k = 0; k < count; ++k) {
    label[n] = first + int32_t(k << shift);
    value[n] = x[k];
    n += x[k] != 0.0;
  }
  return n;
}

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// Entries after the end of every list, and values after the end of x, that vectors may touch.
constexpr int64_t kListSlack = 8;

// The same for `rows` times `count` values, row_step apart, whose labels begin label_step apart. Not
// inlined: among its callers' variables the loop would run out of registers.
template <int shift, class T>
__attribute__((noinline)) int64_t list_nonzeros(const T* x, int64_t row_step, int64_t rows,
                                                int64_t count, int32_t first, int32_t label_step,
                                                int32_t* label, T* value) {
  const T* const before = value;
  for (; rows > 0; --rows, x += row_step, first += label_step) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
      const int64_t more = append_nonzeros<shift>(x + k, 8, first + int32_t(k << shift), label, value);
      label += more;
      value += more;
    }
    if (k < count) {
      const int64_t more =
          append_nonzeros<shift>(x + k, count - k, first + int32_t(k << shift), label, value);
      label += more;
      value += more;
    }
  }
  return value - before;
}

// Four values, each of which is splat in its turn: a load less for each of them where a vector's
// lanes can be spread by one instruction.
template <class S>
struct Quad {
  using T = typename S::Scalar;
  using R = typename S::R;
  static constexpr int bytes = S::lanes * sizeof(T);
#if defined(__AVX512F__)
  static constexpr bool spreads = sizeof(T) == 4;
#elif defined(__AVX2__)
  static constexpr bool spreads = sizeof(T) == 4 && bytes <= 32;
#else
  static constexpr bool spreads = false;
#endif
  explicit SNNLSTM_INLINE Quad(const T* p) : from(p) {
#if defined(__AVX2__)
    if constexpr (spreads && bytes == 16) all = R(_mm_loadu_ps(p));
    if constexpr (spreads && bytes == 32) all = R(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
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

// Forward: the sum over x's nonzeros for a block of rows.
//
// The taps are cut into groups whose weights stay in L1: several kernel rows, one, or a part of one.
// A list holds the nonzeros of the input rows under one output row and group, column by column, so
// that the window of an output pixel is one contiguous stretch of it. (With dilation, columns that
// meet in a window are put side by side.) With one kernel row in a group the list of an input row
// serves all kernel rows.
template <class T, int VL>
class SparseInput {
  using S = Simd<T, VL>;
  using R = typename S::R;
  using L = Layout<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int kShift = log2_of(kGates);

  struct Group {
    int64_t row, rows, column, columns;  // of the kernel
  };
  struct Window {
    int32_t out;    // place of the pixel in the gate buffer
    int32_t begin;  // its first entry
    int32_t shift;  // from the labels of its entries to places in the weight
  };
  struct Stretch {
    int32_t length, count;  // `count` windows of `length` entries
  };

 public:
  // One thread's lists.
  struct Lists {
    int32_t *begin, *label, *histogram, *stretches_end;
    T* value;
    Window* windows;
    Stretch* stretches;
  };

  SparseInput(const L& l, int64_t block_rows)
      : c_(l.c), Wx_(l.Wx), Wo_(l.Wo), out_row_(l.Wr * kGates), block_rows_(block_rows) {
    const int64_t room = kWeightBytes / (kGates * int64_t(sizeof(T)));
    const int64_t whole_rows = room / (c_.kernel_w * c_.Cin);
    rows_ = whole_rows < 1 ? 1 : whole_rows < c_.kernel_h ? whole_rows : c_.kernel_h;
    columns_ = c_.kernel_w;
    if (whole_rows < 1) columns_ = room / c_.Cin < 1 ? 1 : room / c_.Cin;
    // Nearly equal shares.
    row_groups_ = (c_.kernel_h + rows_ - 1) / rows_;
    rows_ = (c_.kernel_h + row_groups_ - 1) / row_groups_;
    column_groups_ = (c_.kernel_w + columns_ - 1) / columns_;
  }

  void carve(Arena& arena, Lists& s) const {
    s.begin = arena.take<int32_t>(list_count() * (Wx_ + 1));
    const int64_t entries = list_count() * Wx_ * rows_ * c_.Cin + kListSlack;
    s.label = arena.take<int32_t>(entries);
    s.value = arena.take<T>(entries);
    s.histogram = arena.take<int32_t>((longest() + 1) * kWays);
    s.windows = arena.take<Window>(groups() * block_rows_ * Wo_);
    s.stretches = arena.take<Stretch>(groups() * most_stretches());
    s.stretches_end = arena.take<int32_t>(groups());
  }

  // Lists the nonzeros under `rows` output rows. patch: (rows, Wx, Cin), the input rows from the first
  // output row's first tap on.
  void build(const T* patch, int64_t rows, const Lists& s) const {
    const int64_t row = Wx_ * c_.Cin, listed_rows = c_.kernel_h * c_.dilation_h;
    int64_t n = 0;
    if (shared()) {
      const int64_t lists = (rows - 1) * c_.stride_h + listed_rows - c_.dilation_h + 1;
      for (int64_t r = 0; r < lists; ++r) n = list_row(patch + r * row, 1, n, s.begin + r * (Wx_ + 1), s);
    } else {
      for (int64_t h = 0; h < rows; ++h)
        for (int64_t g = 0; g < row_groups_; ++g)
          n = list_row(patch + (h * c_.stride_h + g * rows_ * c_.dilation_h) * row,
                       group(g * column_groups_).rows, n, s.begin + (h * row_groups_ + g) * (Wx_ + 1), s);
    }
    for (int64_t g = 0; g < groups(); ++g) sort_windows(g, rows, s);
  }

  // Adds x's part to the gates of one channel block: out (rows, Wr, 4, VL). w: the block's weight,
  // (K, 4, VL). With a bias (4, VL) the buffer is written: x's part and the bias.
  void convolve(const Lists& s, const T* w, const T* bias, T* out) const {
    for (int64_t g = 0; g < groups(); ++g) {
      const Window* window = s.windows + g * block_rows_ * Wo_;
      const Stretch* stretch = s.stretches + g * most_stretches();
      const T* weight = w + group(g).row * c_.kernel_w * c_.Cin * kGates;
      for (int64_t k = 0; k < s.stretches_end[g]; ++k, ++stretch) {
        const int64_t length = stretch->length;
        const Window* end = window + stretch->count;
        if (length == 0 && !bias) {
          window = end;
          continue;
        }
        for (; window + 2 <= end; window += 2) tile<2>(s, window, length, weight, bias, out);
        if (window < end) tile<1>(s, window++, length, weight, bias, out);
      }
      bias = nullptr;
    }
  }

 private:
#ifndef WB
#define WB 24576
#endif
  static constexpr int64_t kWeightBytes = WB;
  // Neighbours are often equally long: they are counted apart, not to wait for each other.
  static constexpr int kWays = 2;

  bool shared() const { return rows_ == 1; }
  int64_t groups() const { return row_groups_ * column_groups_; }
  int64_t longest() const { return rows_ * columns_ * c_.Cin; }
  int64_t most_stretches() const {
    return longest() + 1 < block_rows_ * Wo_ ? longest() + 1 : block_rows_ * Wo_;
  }
  int64_t list_count() const {
    return shared() ? (block_rows_ - 1) * c_.stride_h + (c_.kernel_h - 1) * c_.dilation_h + 1
                    : block_rows_ * row_groups_;
  }
  Group group(int64_t g) const {
    Group p;
    p.row = g / column_groups_ * rows_;
    p.rows = c_.kernel_h - p.row < rows_ ? c_.kernel_h - p.row : rows_;
    p.column = c_.kernel_w * (g % column_groups_) / column_groups_;
    p.columns = c_.kernel_w * (g % column_groups_ + 1) / column_groups_ - p.column;
    return p;
  }

  // The nonzeros of `rows` kernel rows' input rows, column by column, behind the n entries before.
  int64_t list_row(const T* x, int64_t rows, int64_t n, int32_t* begin, const Lists& s) const {
    const int64_t Cin = c_.Cin, row_step = c_.dilation_h * Wx_ * Cin, dilation = c_.dilation_w;
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

  // The windows of one group by the number of their entries.
  void sort_windows(int64_t g, int64_t rows, const Lists& s) const {
    const Group p = group(g);
    std::memset(s.histogram, 0, (longest() + 1) * kWays * sizeof(int32_t));
    int32_t* const histogram = s.histogram;
    int32_t longest_here = 0;
    each_window(g, p, rows, s, [&](int64_t w, int32_t length, const Window&) {
      ++histogram[length * kWays + w % kWays];
      longest_here = length > longest_here ? length : longest_here;
    });
    Stretch* stretch = s.stretches + g * most_stretches();
    int32_t count = 0, place = 0;
    for (int64_t length = 0; length <= longest_here; ++length) {
      const int32_t before = place;
      for (int way = 0; way < kWays; ++way) {
        int32_t& here = histogram[length * kWays + way];
        place += here;
        here = place - here;
      }
      if (place > before) stretch[count++] = {int32_t(length), place - before};
    }
    s.stretches_end[g] = count;
    Window* windows = s.windows + g * block_rows_ * Wo_;
    each_window(g, p, rows, s, [&](int64_t w, int32_t length, const Window& window) {
      windows[histogram[length * kWays + w % kWays]++] = window;
    });
  }

  template <class F>
  SNNLSTM_INLINE void each_window(int64_t g, const Group& p, int64_t rows, const Lists& s,
                                  F&& f) const {
    const int64_t dilation = c_.dilation_w, columns = Wx_ / dilation, longer = Wx_ % dilation;
    const int64_t step = c_.stride_w / dilation, residue_step = c_.stride_w % dilation;
    const int64_t span = p.columns, pixel = c_.Cin * kGates, Wo = Wo_;
    for (int64_t h = 0; h < rows; ++h) {
      const int64_t list = shared() ? h * c_.stride_h + p.row * c_.dilation_h
                                    : h * row_groups_ + g / column_groups_;
      const int32_t* const begin = s.begin + list * (Wx_ + 1) + p.column;
      // Column w * stride_w is the m-th of its residue; those of lower residues come before.
      int64_t residue = 0, m = 0, before = 0;
      int32_t out = int32_t(h * out_row_);
      for (int64_t w = 0; w < Wo; ++w, out += kGates) {
        const int32_t first = begin[before + m];
        f(w, begin[before + m + span] - first, Window{out, first, int32_t(m * pixel)});
        m += step;
        if (residue_step == 0) continue;
        residue += residue_step;
        if (residue >= dilation) residue -= dilation, ++m;
        before = residue * columns + (residue < longer ? residue : longer);
      }
    }
  }

  template <int P>
  static SNNLSTM_INLINE void tile(const Lists& s, const Window* windows, int64_t length,
                                  const T* weight, const T* bias, T* out) {
    R acc[P][4];
    const T* w[P];
    const int32_t* label[P];
    const T* value[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      w[p] = weight - windows[p].shift;
      label[p] = s.label + windows[p].begin;
      value[p] = s.value + windows[p].begin;
      const T* from = bias ? bias : out + windows[p].out;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[p][v] = S::load(from + v * VL);
    }
    int64_t k = 0;
    const auto add = [&](R(&sum)[4], const T* row, R x) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] += x * S::load(row + v * VL);
    };
    for (; k + 4 <= length; k += 4)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        uint64_t labels[2];  // two by one load: loads are what there is most of
        std::memcpy(labels, label[p] + k, sizeof(labels));
        const Quad<S> x(value[p] + k);
        add(acc[p], w[p] + uint32_t(labels[0]), x.template splat<0>());
        add(acc[p], w[p] + (labels[0] >> 32), x.template splat<1>());
        add(acc[p], w[p] + uint32_t(labels[1]), x.template splat<2>());
        add(acc[p], w[p] + (labels[1] >> 32), x.template splat<3>());
      }
    if (length & 2) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        uint64_t labels;
        std::memcpy(&labels, label[p] + k, sizeof(labels));
        add(acc[p], w[p] + uint32_t(labels), S::splat(value[p][k]));
        add(acc[p], w[p] + (labels >> 32), S::splat(value[p][k + 1]));
      }
      k += 2;
    }
    if (length & 1) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) add(acc[p], w[p] + label[p][k], S::splat(value[p][k]));
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) S::store(out + windows[p].out + v * VL, acc[p][v]);
  }

  Cell c_;
  int64_t Wx_, Wo_, out_row_, block_rows_, rows_, columns_, row_groups_, column_groups_;
};

// Backward: x's part of the weight gradient.
//
// For a few input rows there is a list per input channel: where it is nonzero. A register tile sums,
// over such a list, value * d gates for a few taps at once; the d gates of one channel block lie
// compactly in L1. With strides, input pixels of different residues meet different taps: they are
// listed apart.
template <class T, int VL>
class SparseWeightGrad {
  using S = Simd<T, VL>;
  using R = typename S::R;
  using L = Layout<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int kTaps = kAccumulators / 4;

 public:
  // Of one sample's rows [first, first + rows) of x, border included.
  struct Lists {
    int64_t first, rows;
    bool finite;
    int32_t *begin, *place;  // begin: (residues, Cin), and the end
    T* value;
  };
  // One thread's.
  struct Scratch {
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

  // A sample's rows are worked on in so many blocks.
  int64_t blocks() const { return blocks_; }

  void carve(Arena& arena, Lists& s) const {
    s.begin = arena.take<int32_t>(keys_ + 1);
    s.place = arena.take<int32_t>(entries());
    s.value = arena.take<T>(entries());
  }
  void carve(Arena& arena, Scratch& s) const {
    s.key = arena.take<int32_t>(entries());
    s.place = arena.take<int32_t>(entries());
    s.next = arena.take<int32_t>(keys_ + 1);
    s.value = arena.take<T>(entries());
    s.d_gates = arena.take<T>(((rows_ - 1) / c_.stride_h + 2 + above_) * width_ * kGates);
  }

  // x: a sample, (H + 2 pad, Wx, Cin).
  void build(const T* x, int64_t block, const Scratch& t, Lists& s) const {
    s.first = l_.ph + block * rows_;
    s.rows = c_.H - block * rows_ < rows_ ? c_.H - block * rows_ : rows_;
    std::memset(t.next, 0, (keys_ + 1) * sizeof(int32_t));
    int64_t n = 0;
    for (int64_t y = s.first; y < s.first + s.rows; ++y)
      for (int64_t q = l_.pw; q < l_.pw + c_.W; ++q) {
        const int64_t residue = y % c_.stride_h * c_.stride_w + q % c_.stride_w;
        const int64_t from = (y * l_.Wx + q) * c_.Cin;
        const int64_t more = list_nonzeros<0>(x + from, 0, 1, c_.Cin, int32_t(residue * c_.Cin), 0,
                                              t.key + n, t.value + n);
        const int32_t place =
            int32_t(((y / c_.stride_h - top(s)) * width_ + left_ + q / c_.stride_w) * kGates);
        for (int64_t k = 0; k < more; ++k) t.place[n + k] = place;
        n += more;
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

  // out (Kx, 4, VL) += the part of these rows for one channel block. d_gates: the sample's, at its
  // corner (border included) and the channel block.
  void run(const Lists& s, const T* d_gates, const Scratch& t, T* out) const {
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
            taps[count] = {t.d_gates - back, out + (i * c_.kernel_w + j) * c_.Cin * kGates};
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
    const T* d_gates;  // of the output pixel that sees input pixel 0 with this tap
    T* out;            // (Cin, 4, VL)
  };

  int64_t entries() const { return rows_ * c_.W * c_.Cin + kListSlack; }
  // The output row of the gathered d gates' row 0: the lowest that the lists' first row meets.
  int64_t top(const Lists& s) const { return s.first / c_.stride_h - above_; }

  // The d gates that the rows of the lists meet, and zeros where there is no output pixel.
  void gather(const Lists& s, const T* d_gates, T* out) const {
    const int64_t d_pixel = 4 * l_.Cp, pixel = kGates * sizeof(T);
    const int64_t last = (s.first + s.rows - 1) / c_.stride_h;
    for (int64_t h = top(s); h <= last; ++h, out += width_ * kGates) {
      if (h < 0 || h >= l_.Ho) {
        std::memset(out, 0, width_ * pixel);
        continue;
      }
      const T* d = d_gates + ((h + l_.ph) * l_.Wm + l_.pw) * d_pixel;
      std::memset(out, 0, left_ * pixel);
      T* to = out + left_ * kGates;
      const int64_t count = l_.Wo < width_ - left_ ? l_.Wo : width_ - left_;
      for (int64_t w = 0; w < count; ++w, to += kGates, d += d_pixel)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) S::store(to + v * VL, S::load(d + v * VL));
      std::memset(to, 0, (width_ - left_ - count) * pixel);
    }
  }

  // One tap, with the zeros around the d gates left out: zero times infinity is not nothing.
  void add_inside(const Lists& s, const int32_t* begin, int64_t back, const Tap& tap) const {
    for (int64_t ci = 0; ci < c_.Cin; ++ci)
      for (int32_t k = begin[ci]; k < begin[ci + 1]; ++k) {
        const int64_t pixel = (s.place[k] - back) / kGates;
        const int64_t h = pixel / width_ + top(s), w = pixel % width_ - left_;
        if (h < 0 || h >= l_.Ho || w < 0 || w >= l_.Wo) continue;
        for (int64_t v = 0; v < kGates; ++v)
          tap.out[ci * kGates + v] += s.value[k] * tap.d_gates[s.place[k] + v];
      }
  }

  void sweep(const Lists& s, const int32_t* begin, const Tap* taps, int count) const {
    switch (count) {
#define SNNLSTM_TILE(n)                                     \
  case n:                                                   \
    if constexpr (n <= kTaps) channels<n>(s, begin, taps);  \
    break;
      SNNLSTM_TILE(1)
      SNNLSTM_TILE(2)
      SNNLSTM_TILE(3)
      SNNLSTM_TILE(4)
      SNNLSTM_TILE(5)
      SNNLSTM_TILE(6)
#undef SNNLSTM_TILE
    }
  }

  template <int J>
  void channels(const Lists& s, const int32_t* begin, const Tap* taps) const {
    for (int64_t ci = 0; ci < c_.Cin; ++ci) {
      R acc[J][4];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[j][v] = S::load(taps[j].out + ci * kGates + v * VL);
      for (int32_t k = begin[ci]; k < begin[ci + 1]; ++k) {
        const R x = S::splat(s.value[k]);
        const int64_t place = s.place[k];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) acc[j][v] += x * S::load(taps[j].d_gates + place + v * VL);
      }
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) S::store(taps[j].out + ci * kGates + v * VL, acc[j][v]);
    }
  }

  Cell c_;
  L l_;
  // d gates are gathered in rows of width_ pixels; above_, left_: how far the taps reach back.
  int64_t keys_, rows_, blocks_, above_, left_, width_;
};

SNNLSTM_END_ISA
