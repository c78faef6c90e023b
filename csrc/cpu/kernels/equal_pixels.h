// Finds pixels of one pooling window whose recurrent inputs may be equal, and computes their sums
// directly. Direct sums of equal inputs are bitwise equal, so max_pool meets exact ties and takes
// the first pixel, as snnTorch does. Winograd's rounding depends on a pixel's place and neighbours
// in the tile, and would decide such ties by chance. Nearly silent layers, as all layers are when
// training begins, consist of ties.
//
// Let p and q = p + d be pixels of one window. If both see the same values of mem, then each value
// that p sees equals the value at distance d from it, if p sees that one, too. The search tests
// only this condition, for which a block reads no further pixels, so the answer for a pixel does
// not depend on the block. By induction over the steps, p and q stay equal as long as their inputs
// do, in step calls as in a sequence. Distances are shorter than a kernel, and are counted in taps
// if it is dilated.
#pragma once

#include "layout.h"

SNNLSTM_BEGIN_ISA

// How the recurrent sums of a pixel are computed.
enum class Sums : uint8_t {
  tiled = 0,     // by Winograd
  directly = 1,  // the pixel may have an equal
  as_left = 2,   // copied from the pixel a tap to the left
  as_above = 3,  // copied from the pixel a tap above
};

template <class T, int VL>
class EqualPixels {
  using S = Simd<T, VL>;

 public:
  // A block has block_rows rows, in strips of strip_rows. A strip's gates lie side by side.
  EqualPixels(const Layout<T, VL>& l, int64_t block_rows, int64_t strip_rows)
      : l_(l), c_(l.c), block_(block_rows), strip_(strip_rows), columns_(l.Wo + 2 * l.pw) {}

  bool sought() const { return c_.keeps_equal(); }

  struct Scratch {
    uint32_t* keys;             // key() of all pixels that the block sees
    uint8_t *repeats, *places;  // pixels whose key repeats, and pixels that see only such pixels
  };
  Scratch allocate(Workspace& workspace) const {
    const int64_t seen = sought() ? seen_rows(block_) * columns_ : 0;
    return {workspace.take<uint32_t>(seen), workspace.take<uint8_t>(seen),
            workspace.take<uint8_t>(seen)};
  }
  // Returns how many decisions a block has. A row has a decision for each column that it sees.
  int64_t decisions() const { return sought() ? block_ * columns_ : 0; }

  // Decides for `rows` rows of an image; `mem` is what the first row sees. Returns how many pixels
  // are left to Winograd.
  int64_t find(const T* mem, int64_t rows, const Scratch& s, Sums* sums) const {
    for (int64_t h = 0; h < seen_rows(rows); ++h)
      for (int64_t w = 0; w < columns_; ++w)
        s.keys[h * columns_ + w] = key(mem + (h * l_.mem.columns + w) * l_.Cp);
    auto* const marks = reinterpret_cast<uint8_t*>(sums);
    std::memset(marks, 0, rows * columns_);
    bool any = false;
    const int most_h = std::min(c_.pool_h, c_.kernel_h);
    const int most_w = std::min(c_.pool_w, c_.kernel_w);
    for (int dh = 0; dh < most_h; ++dh)
      for (int dw = dh == 0 ? 1 : 1 - most_w; dw < most_w; ++dw)
        any |= look(mem, rows, dh, dw, s, marks);
    if (!any) return rows * l_.Wo;
    decide(rows, sums);
    int64_t left = 0;
    const int64_t tile_rows = l_.whole(l_.winograd.h, c_.dilation_h, 1);
    for (int64_t h = 0; h < rows; h += tile_rows)
      left += leave(h + tile_rows < rows ? tile_rows : rows - h, sums + h * columns_);
    return left;
  }

  // Returns the decisions of a row of a block.
  const Sums* row(const Sums* sums, int64_t h) const { return sums + h * columns_; }

  // Writes the bias and the recurrent sums of all pixels of some rows except Winograd's.
  void write_mem(const Sums* sums, int64_t rows, const RunList& list, const T* mem, const T* weight,
                 const T* bias, T* gates) const {
    for (; rows > 0; --rows, sums += columns_, mem += l_.mem.row(), gates += l_.Wr * kGates)
      for (int64_t w = 0; w < l_.Wo;) {
        int64_t end = w;
        while (end < l_.Wo && sums[end] == Sums::directly) ++end;
        sum(list, mem + w * l_.Cp, l_.Cp, weight, {bias, 0}, gates + w * kGates, end - w);
        for (w = end; w < l_.Wo && sums[w] != Sums::directly; ++w) {
          if (sums[w] == Sums::tiled) continue;
          const int64_t away = sums[w] == Sums::as_left ? c_.dilation_w : c_.dilation_h * l_.Wr;
          T* out = gates + w * kGates;
          std::memcpy(out, out - away * kGates, kGates * sizeof(T));
        }
      }
  }

  // Adds the sums of x to the gates of the pixels that are not Winograd's.
  void add_x(const Sums* sums, int64_t rows, const RunList& list, const T* x, const T* weight,
             T* gates) const {
    for (; rows > 0; --rows, sums += columns_, x += l_.x.row(), gates += l_.Wr * kGates)
      for (int64_t w = 0; w < l_.Wo; ++w) {
        const int64_t begin = w;
        while (w < l_.Wo && sums[w] != Sums::tiled) ++w;
        T* out = gates + begin * kGates;
        sum(list, x + begin * c_.Cin, c_.Cin, weight, {out, kGates}, out, w - begin);
      }
  }

 private:
  static constexpr int kGates = 4 * VL;
  enum : uint8_t { kAny = 1, kRow = 2, kColumn = 4 };  // kRow: repeats at the distance (0, 1)

  // Returns how many rows of mem these rows see.
  int64_t seen_rows(int64_t rows) const { return rows + 2 * l_.ph; }

  // Returns a hash of a pixel's values.
  uint32_t key(const T* pixel) const {
    constexpr int words = (VL * sizeof(T) + 7) / sizeof(uint64_t);
    uint64_t mixed = 0;
    for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
      uint64_t word[words] = {};
      std::memcpy(word, pixel + ch, VL * sizeof(T));
#pragma GCC unroll 8
      for (int k = 0; k < words; ++k)
        mixed = (mixed ^ word[k]) * 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
    }
    return uint32_t(mixed >> 32);
  }

  // Marks the pixels whose values all repeat at the distance (dh, dw). Pixels are numbered row by
  // row, and numbers beyond a row's last pixel do not count. Returns whether there are any.
  bool look(const T* mem, int64_t rows, int dh, int dw, const Scratch& s, uint8_t* marks) const {
    const int64_t down = dh * c_.dilation_h, right = dw * c_.dilation_w;
    const int64_t away = down * columns_ + right;
    const int64_t seen = seen_rows(rows) * columns_ - away;
    const uint32_t* const keys = s.keys;
    uint8_t* const __restrict repeats = s.repeats;
    for (int64_t k = 0; k < seen; ++k) repeats[k] = keys[k] == keys[k + away];
    if (!all_repeat(rows, dh, dw, s)) return false;
    const uint8_t mark = dh == 0 && dw == 1 ? kRow : dh == 1 && dw == 0 ? kColumn : 0;
    if (mark) {  // sums are copied, so the values themselves are compared
      for (int64_t h = 0; h * columns_ < seen; ++h)
        for (int64_t w = 0; w < columns_ && h * columns_ + w < seen; ++w)
          if (repeats[h * columns_ + w]) {
            const T* pixel = mem + (h * l_.mem.columns + w) * l_.Cp;
            repeats[h * columns_ + w] =
                same(pixel, pixel + (down * l_.mem.columns + right) * l_.Cp);
          }
      all_repeat(rows, dh, dw, s);
    }
    const int64_t count = (rows - 1) * columns_ + l_.Wo;
    for (int64_t k = 0; k < count; ++k) marks[k] |= s.places[k] * (kAny | mark);
    return true;
  }

  // Finds the pixels whose values all repeat, except values whose counterparts they do not see.
  // Returns whether there are any.
  bool all_repeat(int64_t rows, int dh, int dw, const Scratch& s) const {
    const int64_t count = (rows - 1) * columns_ + l_.Wo;
    uint8_t* const __restrict places = s.places;
    std::memset(places, 1, count);
    for (int i = 0; i < c_.kernel_h - dh; ++i)
      for (int j = dw < 0 ? -dw : 0; j < c_.kernel_w - (dw > 0 ? dw : 0); ++j) {
        const uint8_t* const repeats = s.repeats + i * c_.dilation_h * columns_ + j * c_.dilation_w;
        for (int64_t k = 0; k < count; ++k) places[k] &= repeats[k];
      }
    uint8_t any = 0;
    for (int64_t k = 0; k < count; ++k) any |= places[k];
    return any != 0;
  }

  bool same(const T* a, const T* b) const {
    for (int64_t ch = 0; ch < l_.Cp; ch += VL)
      if (std::memcmp(a + ch, b + ch, VL * sizeof(T)) != 0) return false;
    return true;
  }

  // Turns marks into decisions, from the last pixel to the first, so that the pixels to the left
  // and above still have marks.
  void decide(int64_t rows, Sums* sums) const {
    const int64_t left = c_.dilation_w, above = c_.dilation_h;
    auto* const marks = reinterpret_cast<uint8_t*>(sums);
    for (int64_t h = rows - 1; h >= 0; --h)
      for (int64_t w = l_.Wo - 1; w >= 0; --w) {
        const int64_t k = h * columns_ + w;
        if (w >= left && marks[k] & marks[k - left] & kRow)
          sums[k] = Sums::as_left;
        else if (h % strip_ >= above && marks[k] & marks[k - above * columns_] & kColumn)
          sums[k] = Sums::as_above;
        else
          sums[k] = marks[k] ? Sums::directly : Sums::tiled;
      }
  }

  // Counts the pixels of a row of tiles that are left to Winograd. If they are so few that direct
  // sums take less time, none are left. Rows of tiles, unlike blocks, do not depend on the threads.
  int64_t leave(int64_t rows, Sums* sums) const {
    int64_t left = 0;
    for (int64_t h = 0; h < rows; ++h)
      for (int64_t w = 0; w < l_.Wo; ++w) left += sums[h * columns_ + w] == Sums::tiled;
    if (4 * left > rows * l_.Wo) return left;
    for (int64_t k = 0; k < rows * columns_; ++k)
      if (sums[k] == Sums::tiled) sums[k] = Sums::directly;
    return 0;
  }

  static void sum(const RunList& list, const T* in, int64_t pixel, const T* weight, Start<T> start,
                  T* out, int64_t count) {
    if (count > 0)
      list.chunks(chunk_length<T>(kGates), [&](const Run* runs, int number) {
        conv_row<S, 4>(in, pixel, runs, number, weight, start, out, kGates, count);
        start = {out, kGates};
      });
  }

  const Layout<T, VL>& l_;
  const Cell& c_;
  int64_t block_, strip_, columns_;  // columns_: the columns that a row of pixels sees
};

SNNLSTM_END_ISA
