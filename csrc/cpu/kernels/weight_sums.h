// The sums of the weight gradient. Each split of the batch has sums of its own for either half:
// rows of K or, with Winograd, the points of the tiles. Blocks of pixels are added one after the
// other, so rounding errors would grow with the sequence. Therefore all splits are folded into the
// total from time to time, and begin again at zero.
#pragma once

#include "pack.h"

SNNLSTM_BEGIN_ISA

// The weights that read x, or mem, and the place of their sums.
template <class T, int VL>
struct WeightHalf {
  WeightHalf(const Layout<T, VL>& l, const Input& in, bool in_tiles, int64_t first)
      : in(in),
        in_tiles(in_tiles),
        first(first),
        size((in_tiles ? l.grad_points() * in.channels : in.K) * 4 * VL) {}

  const Input& in;
  bool in_tiles;  // whether Winograd computes the gradient
  int64_t first;  // place in a split's sums
  int64_t size;   // of a channel block's sums
};

template <class T, int VL>
class WeightSums {
  using S = Simd<T, VL>;
  using P = Packing<T, VL>;
  using Half = WeightHalf<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int64_t kChunk = 4096;  // values that a task folds
  static constexpr int64_t kFold = 64;     // blocks of pixels from one fold to the next

 public:
  // A split adds `blocks` blocks of pixels in each time step.
  WeightSums(const Layout<T, VL>& l, const Half& x, const Half& mem, int64_t splits, int64_t blocks)
      : l_(l),
        x_(x),
        mem_(mem),
        splits_(splits),
        steps_(blocks < kFold ? kFold / (blocks < 1 ? 1 : blocks) : 1),
        size_(mem_.first + l.Cb * mem_.size) {}

  void allocate(Workspace& workspace, int threads) {
    sums_ = workspace.take<T>(splits_ * size_);
    total_ = folds() ? workspace.take<T>(size_) : sums_;
    taps_ = workspace.take<T>(x_.in_tiles || mem_.in_tiles ? threads * taps_size() : 0);
  }

  // The chunks in which the sums are cleared and folded.
  int64_t chunks() const { return (size_ + kChunk - 1) / kChunk; }
  void clear(int64_t chunk) {
    for (int64_t split = 0; split < splits_; ++split)
      std::memset(sums_ + split * size_ + chunk * kChunk, 0, length(chunk) * sizeof(T));
  }

  // Returns a split's sums of one half and channel block: (K, 4, VL) or, with Winograd, (points,
  // parts, channels, 4, VL).
  T* of(const Half& half, int64_t split, int64_t cb) const {
    return sums_ + split * size_ + half.first + cb * half.size;
  }

  // Says whether to fold after step t; the last step comes first. If there is one split and few
  // steps, its sums are the total.
  bool due(int64_t t) const { return folds() && (t == 0 || (l_.c.T - t) % steps_ == 0); }
  void fold(int64_t chunk, int64_t t) {
    const bool first = l_.c.T - t <= steps_;
    const int64_t begin = chunk * kChunk;
    for (int64_t k = begin; k < begin + length(chunk); k += VL) {
      auto sum = S::load(sums_ + k);
      for (int64_t split = 1; split < splits_; ++split) sum += S::load(sums_ + split * size_ + k);
      S::store(total_ + k, first ? sum : sum + S::load(total_ + k));
    }
    if (t > 0) clear(chunk);
  }

  // A task writes the total of a channel block and some input channels in the caller's order.
  int64_t write_tasks() const { return l_.Cb * (groups(x_) + groups(mem_)); }
  void write(int64_t task, int thread, T* grad_weight) const {
    const int64_t cb = task % l_.Cb, group = task / l_.Cb;
    const bool of_x = group < groups(x_);
    const Half& half = of_x ? x_ : mem_;
    const int64_t stride = half.in.channels * kGates;
    const int64_t first = (of_x ? group : group - groups(x_)) * P::together(l_);
    const int64_t n = std::min(half.in.channels - first, P::together(l_));
    const T* in = total_ + half.first + cb * half.size + first * kGates;
    T* const out = grad_weight + P::source(l_, 0, half.in.first_channel + first, 0);
    if (!half.in_tiles) return write_taps(cb, n, in, {l_.taps, kGates, stride}, out);
    if constexpr (kHasWinograd<T, VL>) {
      T* const taps = taps_ + thread * taps_size();
      for (int64_t k = 0; k < n; ++k)
        taps_of_tile(in + k * kGates, stride, taps + k * l_.taps * kGates);
      write_taps(cb, n, taps, {l_.taps, l_.taps * kGates, kGates}, out);
    }
  }

 private:
  int64_t taps_size() const { return P::together(l_) * l_.taps * kGates; }  // of a write task
  bool folds() const { return splits_ > 1 || l_.c.T > steps_; }
  int64_t length(int64_t chunk) const {
    const int64_t left = size_ - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }
  int64_t groups(const Half& half) const {
    return (half.in.channels + P::together(l_) - 1) / P::together(l_);
  }

  // Transforms the sums of one channel, whose points lie `stride` apart, into its taps.
  void taps_of_tile(const T* in, int64_t stride, T* out) const {
    using V = typename Merged<S, 4>::Vector;
    const WinogradTile& t = l_.grad_winograd;
    const auto outputs = PlaneTransform<V>::outputs(t, t.h.part, t.w.part);
    const int64_t point = t.parts() * stride;
    alignas(64) T taps[5 * 5 * kGates];
    for (int64_t i0 = 0; i0 < t.h.taps(); i0 += t.h.part)
      for (int64_t j0 = 0; j0 < t.w.taps(); j0 += t.w.part, in += stride) {
        outputs.run(in, {t.w.inputs() * point, point, V::lanes}, taps,
                    {5 * kGates, kGates, V::lanes}, kGates / V::lanes);
        for (int64_t i = i0; i < i0 + t.h.part && i < l_.c.kernel_h; ++i)
          for (int64_t j = j0; j < j0 + t.w.part && j < l_.c.kernel_w; ++j)
            std::memcpy(out + (i * l_.c.kernel_w + j) * kGates,
                        taps + ((i - i0) * 5 + j - j0) * kGates, kGates * sizeof(T));
      }
  }

  // Writes the taps of n input channels, each (4, VL). `out` is the weight from the first of them
  // to the first output.
  void write_taps(int64_t cb, int64_t n, const T* in, const Pixels& from, T* out) const {
    const int64_t next = P::source(l_, 1, 0, 0);  // output
    const auto same = [](typename S::R v, int64_t) { return v; };
    T* const weight = out;
    for (int64_t gate = 0; gate < 4; ++gate, in += VL) {
      const int64_t lanes = l_.lanes(cb, gate);
      if (lanes == 0) return;
      out = weight + l_.output(cb, gate) * next;
      if (l_.all_taps() == l_.taps) {
        store_row<S>(in, from, n * l_.taps, lanes, out, next, 1, same);
        continue;
      }
      for (int64_t lane = 0; lane < lanes; ++lane)
        std::memset(out + lane * next, 0, n * l_.all_taps() * sizeof(T));
      const int64_t run = l_.c.outer_w == 0 ? l_.taps : l_.c.kernel_w;  // neighbours
      for (int64_t k = 0; k < n * l_.taps; k += run) {
        const int64_t ci = k / l_.taps, tap = k % l_.taps;
        store_row<S>(in + ci * from.row + tap * from.pixel, Row{from.pixel}, run, lanes,
                     out + ci * l_.all_taps() + l_.place(tap), next, 1, same);
      }
    }
  }

  const Layout<T, VL>& l_;
  const Half x_, mem_;
  int64_t splits_, steps_, size_;
  T *sums_ = nullptr, *total_ = nullptr, *taps_ = nullptr;
};

SNNLSTM_END_ISA
