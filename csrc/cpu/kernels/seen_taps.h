// Marks the taps of the weight that have met a nonzero input. The gradient of the others is exactly
// zero. Winograd would make a rounding error of it, and Adam would turn that into a step of full
// size.
#pragma once

#include "layout.h"

SNNLSTM_BEGIN_ISA

// The marks of one half of the inputs, whose images are as large as the state's and whose channels
// come in pieces of `piece`. Each split of the batch has marks of its own.
template <class T, int VL>
class SeenTaps {
  using S = Simd<T, VL>;
  using Mask = typename S::Mask;
  using Bits = typename S::Bits;

 public:
  SeenTaps(const Layout<T, VL>& l, int64_t channels, int64_t piece, int64_t splits)
      : l_(l),
        channels_(channels),
        padded_((channels + VL - 1) / VL * VL),
        piece_(piece),
        pieces_((channels + piece - 1) / piece),
        splits_(splits) {}

  void carve(Workspace& workspace) {
    marks_ = workspace.take<Bits>(splits_ * size());
    all_ = workspace.take<bool>(splits_ * pieces_);
  }
  void clear(int64_t split) {
    std::memset(marks_ + split * size(), 0, size() * sizeof(Bits));
    std::memset(all_ + split * pieces_, 0, pieces_ * sizeof(bool));
  }

  // Marks the taps that a piece of image rows [begin, begin + rows) meets. `in` is the first of
  // these rows, at its first pixel and the piece's first channel. mark() reads whole vectors of
  // channels.
  void mark(int64_t split, int64_t piece, const T* in, int64_t row, int64_t pixel, int64_t begin,
            int64_t rows) {
    bool& all = all_[split * pieces_ + piece];
    if (all) return;
    const Span span(Part::copies);
    const int64_t first = piece * piece_;
    const int64_t end = first + piece_ < channels_ ? first + piece_ : channels_;
    Bits* marks = marks_ + split * size();
    for (int64_t y = begin; y < begin + rows; ++y, in += row) {
      const Meeting vertical(y, l_.Ho, l_.c.kernel_h, l_.c.dilation_h);
      for (int64_t x = 0, next; x < l_.Wo; x = next) {  // a run of pixels that meet the same taps
        const Meeting across(x, l_.Wo, l_.c.kernel_w, l_.c.dilation_w);
        for (next = x + 1; next < l_.Wo; ++next)
          if (!(Meeting(next, l_.Wo, l_.c.kernel_w, l_.c.dilation_w) == across)) break;
        for (int64_t ch = first; ch < end; ch += VL) {
          Mask any{};
          for (int64_t k = x; k < next; ++k)
            any |= S::load(in + k * pixel + ch - first) != typename S::R{};
          for (int64_t i = vertical.first; i <= vertical.last; ++i)
            for (int64_t j = across.first; j <= across.last; ++j)
              add(marks + (i * l_.c.kernel_w + j) * padded_ + ch, any);
        }
      }
    }
    all = true;
    for (int64_t tap = 0; tap < l_.taps; ++tap)
      for (int64_t ch = first; all && ch < end; ++ch) all = marks[tap * padded_ + ch] != 0;
  }

  bool seen(int64_t channel, int64_t tap) const {
    bool any = false;
    for (int64_t split = 0; split < splits_; ++split)
      any |= marks_[split * size() + tap * padded_ + channel] != 0;
    return any;
  }

 private:
  // The taps along one axis that lead from some output pixel to input pixel k of n.
  struct Meeting {
    int64_t first, last;
    Meeting(int64_t k, int64_t n, int64_t kernel, int64_t dilation) {
      const int64_t middle = kernel / 2, before = k / dilation, behind = (n - 1 - k) / dilation;
      first = middle - (behind < middle ? behind : middle);
      last = middle + (before < middle ? before : middle);
    }
    bool operator==(const Meeting& other) const {
      return first == other.first && last == other.last;
    }
  };

  static SNNLSTM_INLINE void add(Bits* to, Mask any) {
    Mask before;
    std::memcpy(&before, to, sizeof(before));
    before |= any;
    std::memcpy(to, &before, sizeof(before));
  }

  int64_t size() const { return l_.taps * padded_; }

  const Layout<T, VL>& l_;
  int64_t channels_, padded_, piece_, pieces_, splits_;
  Bits* marks_ = nullptr;
  bool* all_ = nullptr;
};

SNNLSTM_END_ISA
