// The sums of the weight gradient. Each split of the batch has sums of its own, of either half as
// rows of K or, with Winograd, at the points of its tiles. Blocks of pixels are added to them one
// after the other, which would round the more the longer the sequence is: so from time to time all
// splits are folded into the total and begin anew.
#pragma once

#include "pack.h"
#include "seen_taps.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class WeightSums {
  using S = Simd<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int64_t kChunk = 4096;  // values that a task folds
  static constexpr int64_t kFold = 64;     // blocks of pixels between two folds

 public:
  // A split adds so many blocks of pixels in each time step.
  WeightSums(const Layout<T, VL>& l, bool x_in_tiles, int64_t splits, int64_t blocks)
      : l_(l),
        x_in_tiles_(x_in_tiles),
        splits_(splits),
        steps_(blocks < kFold ? kFold / (blocks < 1 ? 1 : blocks) : 1),
        x_size_(l.Cb * kGates * (x_in_tiles ? l.grad_points() * l.c.Cin : l.Kx)),
        size_(x_size_ + l.Cb * kGates * (mem_in_tiles() ? l.grad_points() * l.c.C : l.Km)) {}

  void carve(Arena& arena) {
    sums_ = arena.take<T>(splits_ * size_);
    total_ = arena.take<T>(size_);
  }

  void clear(int64_t split) { std::memset(sums_ + split * size_, 0, size_ * sizeof(T)); }

  // Returns a split's sums of one half and channel block: rows of K, counted as in the packed
  // weight.
  T* rows(int64_t split, int64_t cb, bool of_x) const {
    T* half = sums_ + split * size_ + (of_x ? 0 : x_size_ - l_.Kx * kGates);
    return half + cb * (of_x ? l_.Kx : l_.Km) * kGates;
  }
  // Returns the same with Winograd, (points, parts, Cin or C, 4, VL).
  T* points(int64_t split, int64_t cb, bool of_x) const {
    const int64_t channels = of_x ? l_.c.Cin : l_.c.C;
    return sums_ + split * size_ + (of_x ? 0 : x_size_) + cb * l_.grad_points() * channels * kGates;
  }

  // Says whether to fold behind step t.
  bool due(int64_t t) const { return t == 0 || (l_.c.T - t) % steps_ == 0; }
  int64_t fold_tasks() const { return (size_ + kChunk - 1) / kChunk; }
  void fold(int64_t task, int64_t t) {
    const Span span(Part::copies);
    const bool first = l_.c.T - t <= steps_;
    const int64_t end = (task + 1) * kChunk < size_ ? (task + 1) * kChunk : size_;
    for (int64_t k = task * kChunk; k < end; k += VL) {
      auto sum = S::load(sums_ + k);
      for (int64_t split = 1; split < splits_; ++split) sum += S::load(sums_ + split * size_ + k);
      S::store(total_ + k, first ? sum : sum + S::load(total_ + k));
    }
    for (int64_t split = 0; t > 0 && split < splits_; ++split)
      std::memset(sums_ + split * size_ + task * kChunk, 0, (end - task * kChunk) * sizeof(T));
  }

  // Writes the total of a channel block and an input channel in the caller's order. Taps that met
  // only zeros get zero, and not what Winograd sums for them.
  int64_t write_tasks() const { return l_.Cb * (l_.c.Cin + l_.c.C); }
  void write(int64_t task, T* grad_weight, const SeenTaps<T, VL>& x_seen,
             const SeenTaps<T, VL>& mem_seen) const {
    const Span span(Part::copies);
    const int64_t cb = task / (l_.c.Cin + l_.c.C), ci = task % (l_.c.Cin + l_.c.C);
    const bool of_x = ci < l_.c.Cin;
    const int64_t count = of_x ? l_.c.Cin : l_.c.C, stride = count * kGates;
    const T* in = total_ + (of_x ? 0 : x_size_) + (of_x ? ci : ci - l_.c.Cin) * kGates;
    T* const out = grad_weight + Packing<T, VL>::source(l_, cb * VL, ci, 0);
    for (int64_t gate = 0; l_.all_taps() > l_.taps && gate < 4; ++gate)
      for (int64_t lane = 0; lane < lanes(cb); ++lane)
        std::memset(out + channel(gate, lane), 0, l_.all_taps() * sizeof(T));
    if (!(of_x ? x_in_tiles_ : mem_in_tiles())) {
      for (int64_t i = 0; i < l_.c.kernel_h; ++i)
        for (int64_t j = 0; j < l_.c.kernel_w; ++j)
          write_tap(cb, i, j, in + (cb * l_.taps + i * l_.c.kernel_w + j) * stride, out);
      return;
    }
    if constexpr (kHasWinograd<T, VL>) {
      using V = typename Merged<S, 4>::Vector;
      const Tiling& t = l_.grad_form;
      const auto outputs = PlaneTransform<V>::outputs(t, t.h.part, t.w.part);
      const int64_t point = t.parts() * stride;
      in += cb * l_.grad_points() * stride;
      alignas(64) T taps[5 * 5 * kGates];
      for (int64_t part = 0; part < t.parts(); ++part, in += stride) {
        outputs.run(in, {t.w.inputs() * point, point, V::lanes}, taps,
                    {5 * kGates, kGates, V::lanes}, kGates / V::lanes);
        const int64_t top = part / t.w.parts * t.h.part, left = part % t.w.parts * t.w.part;
        for (int64_t i = 0; i < t.h.part && top + i < l_.c.kernel_h; ++i)
          for (int64_t j = 0; j < t.w.part && left + j < l_.c.kernel_w; ++j) {
            const int64_t tap = (top + i) * l_.c.kernel_w + left + j;
            T* const values = taps + (i * 5 + j) * kGates;
            if (!(of_x ? x_seen : mem_seen).seen(of_x ? ci : ci - l_.c.Cin, tap))
              for (int64_t k = 0; k < kGates; ++k) values[k] -= values[k];  // NaN stays NaN
            write_tap(cb, top + i, left + j, values, out);
          }
      }
    }
  }

 private:
  bool mem_in_tiles() const { return l_.c.tiled(); }
  int64_t lanes(int64_t cb) const { return l_.c.C - cb * VL < VL ? l_.c.C - cb * VL : VL; }
  // Returns the distance from the first gate's first lane to another lane in the caller's weight.
  int64_t channel(int64_t gate, int64_t lane) const {
    return (gate * l_.c.C + lane) * (l_.c.Cin + l_.c.C) * l_.all_taps();
  }

  // `in` is (4, VL), `out` the weights from an input channel to the block's first gate channel.
  void write_tap(int64_t cb, int64_t i, int64_t j, const T* in, T* out) const {
    out += l_.place(i * l_.c.kernel_w + j);
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t lane = 0; lane < lanes(cb); ++lane)
        out[channel(gate, lane)] = in[gate * VL + lane];
  }

  const Layout<T, VL>& l_;
  bool x_in_tiles_;
  int64_t splits_, steps_, x_size_, size_;
  T *sums_ = nullptr, *total_ = nullptr;
};

SNNLSTM_END_ISA
