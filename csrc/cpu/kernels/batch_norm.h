// Batch norm in training: the steps of a sequence, each with statistics of its own. Everything is
// computed in double, because a float that sums all pixels of a channel loses their last digits.
#pragma once

#include <numeric>

#include "threads.h"
#include "workspace.h"

SNNLSTM_BEGIN_ISA

// The layer's kernels, for x and its gradient of type T. A step is either one matrix, whose rows
// are pixels and whose columns are channels, or a matrix for each image and channel, whose rows are
// neighbouring pixels. The work of a step is cut in the same way for any number of threads.
template <class T>
class BatchNorm {
 public:
  BatchNorm(const BatchNormArgs& args, void* memory) : a(args), is_matrix_(args.S == 1) {
    Workspace workspace(memory);
    for (double** array : {&pivot_, &center_, &scale_, &shift_, &grad_scale_, &dot_, &sum_})
      *array = workspace.take<double>(a.C);
    parts_ = workspace.take<double>(2 * a.parts() * a.C);
    counters_ = workspace.take<Phases::Counter>(phases());
    bytes_ = workspace.bytes();
  }

  int64_t bytes() const { return bytes_; }

  void forward(const BatchNormForwardArgs& f) const {
    first_pivots(f, 0, 0, a.C);
    run([&](int64_t t, const auto& phase) {
      const T* x = at(f.x, t * a.x_step);
      for (int pass = kPasses; pass-- > 0;) {
        phase(tasks(), [&](int64_t task) { add_up<false>(task, x, nullptr); });
        phase(blocks(), [&](int64_t block) { finish(f, t, block, pass > 0); });
      }
      T* y = static_cast<T*>(f.y) + t * size();
      phase(tasks(), [&](int64_t task) { transform<false>(task, x, nullptr, y); });
    });
  }

  void backward(const BatchNormBackwardArgs& b) const {
    std::fill_n(dot_, a.C, 0.0), std::fill_n(sum_, a.C, 0.0);
    std::copy_n(b.means, a.C, pivot_);
    run([&](int64_t t, const auto& phase) {
      const T *x = at(b.x, t * a.x_step), *grad = at(b.grad_y, t * size());
      phase(tasks(), [&](int64_t task) { add_up<true>(task, x, grad); });
      phase(blocks(), [&](int64_t block) { finish(b, t, block); });
      if (!b.grad_x) return;
      T* to = static_cast<T*>(b.grad_x) + t * size();
      phase(tasks(), [&](int64_t task) { transform<true>(task, x, grad, to); });
    });
  }

 private:
  static constexpr int VL = kNativeBytes / sizeof(double);
  static constexpr int kVectors = 4;              // side by side, so that sums do not wait
  static constexpr int64_t kRow = kVectors * VL;  // pixels of a row of an image's matrix
  static constexpr int64_t kChannels = 16;        // of a task, at most, unless a row has all
  static constexpr int64_t kChunk = 1024;         // numbers of a matrix, which the L1 cache holds
  static constexpr int64_t kBlock = 64;           // channels of a task between the passes over x
  // float64 has no longer type for its sums: a first pass finds the means.
  static constexpr int kPasses = sizeof(T) == 8 ? 2 : 1;

  template <int L>
  using Vector = typename Simd<double, L>::R;
  template <int L>
  static SNNLSTM_INLINE Vector<L> load(const T* p) {
#if defined(__AVX2__)  // GCC takes three instructions for the one
    if constexpr (sizeof(T) == 4 && L == 4) return _mm256_cvtps_pd(_mm_loadu_ps(p));
#endif
    return __builtin_convertvector((Simd<T, L>::load(p)), Vector<L>);
  }

  // ---- the parts of a step -----------------------------------------------------------------------

  static const T* at(const void* p, int64_t offset) { return static_cast<const T*>(p) + offset; }
  int64_t size() const { return a.N * a.C * a.S; }
  int64_t row() const { return is_matrix_ ? a.C : kRow; }
  int64_t blocks() const { return (a.C + kBlock - 1) / kBlock; }
  int64_t phases() const { return a.T * (2 * kPasses + 1); }

  // A task has all channels of a part of the images, or as many as have some 4096 pixels there.
  int64_t channels() const {
    if (is_matrix_) return a.C;
    return std::min({a.C, kChannels, 1 + 4096 * a.parts() / (a.N * a.S)});
  }
  int64_t tasks() const { return a.parts() * ((a.C + channels() - 1) / channels()); }
  int64_t first_channel(int64_t task) const { return task / a.parts() * channels(); }

  // Calls f(t, phase) for each step, with all threads. phase(count, g) runs g for `count` tasks.
  template <class F>
  void run(F&& f) const {
    const Phases all(counters_, phases());
    parallel(a.threads, 4.0 * double(size()), [&](int) {
      int64_t number = 0;
      const auto phase = [&](int64_t count, auto&& g) { all.run(number++, count, g); };
      for (int64_t t = 0; t < a.T; ++t) f(t, phase);
    });
  }

  // Calls f(channel, rows, columns, first) for the matrices of a task. The first number lies at
  // x[first], and the rows lie row() apart. The columns are all channels, or pixels of one.
  template <class F>
  void each_matrix(int64_t task, F&& f) const {
    const int64_t part = task % a.parts(), rest = a.S % kRow, rows = 1 + kChunk / a.C;
    const int64_t begin = a.N * part / a.parts(), end = a.N * (part + 1) / a.parts();
    const int64_t c = first_channel(task), last = std::min(a.C, c + channels());
    for (int64_t n = begin; is_matrix_ && n < end; n += rows)
      f(0, std::min(rows, end - n), a.C, n * a.C);
    for (int64_t n = begin; !is_matrix_ && n < end; ++n)
      for (int64_t channel = c; channel < last; ++channel) {
        const int64_t first = (n * a.C + channel) * a.S;
        if (a.S >= kRow) f(channel, a.S / kRow, kRow, first);
        if (rest > 0) f(channel, 1, rest, first + a.S - rest);
      }
  }

  // Calls f(Count<L>(), Count<vectors>(), k) for blocks of neighbouring columns from k on.
  template <int L = VL, class F>
  static SNNLSTM_INLINE void each_block(int64_t k, int64_t columns, F&& f) {
    while (k + L <= columns) {
      const int64_t vectors = std::min<int64_t>(kVectors, (columns - k) / L);
      with_count<kVectors>(
          vectors, [&](auto count) __attribute__((always_inline)) { f(Count<L>(), count, k); });
      k += vectors * L;
    }
    if constexpr (L > 1)
      if (k < columns) each_block<L / 2>(k, columns, f);
  }

  // The values of a block's channels, or of the channel of all columns.
  template <int L, int vectors>
  struct Values {
    Vector<L> v[vectors];
    SNNLSTM_INLINE Values(const BatchNorm& norm, const double* values, int64_t channel, int64_t k) {
      for (int i = 0; i < vectors; ++i)
        v[i] = norm.is_matrix_ ? Simd<double, L>::load(values + k + i * L)
                               : Simd<double, L>::splat(values[channel]);
    }
  };

  // ---- the two passes over x ---------------------------------------------------------------------

  // Adds up u and u (x - pivot) in a part, for each channel. u is the gradient, or else x - pivot.
  template <bool kGrad>
  void add_up(int64_t task, const T* x, const T* grad) const {
    double* const sums = parts_ + task % a.parts() * 2 * a.C;
    double columns_of_images[kChannels * 2 * kRow];  // for each channel
    double* const all = is_matrix_ ? sums : columns_of_images;
    std::fill_n(all, 2 * row() * (is_matrix_ ? 1 : channels()), 0.0);
    each_matrix(task, [&](int64_t channel, int64_t rows, int64_t columns, int64_t first) {
      double* const own = all + 2 * row() * (is_matrix_ ? 0 : channel - first_channel(task));
      each_block(0, columns, [&](auto lanes, auto count, int64_t k) __attribute__((always_inline)) {
        constexpr int L = decltype(lanes)::value, vectors = decltype(count)::value;
        using S = Simd<double, L>;
        const Values<L, vectors> pivot(*this, pivot_, channel, k);
        Vector<L> sum[vectors]{}, dot[vectors]{};
        const T *p = x + first + k, *g = kGrad ? grad + first + k : p;
        for (int64_t r = 0, step = row(); r < rows; ++r, p += step, g += step)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const Vector<L> centered = load<L>(p + v * L) - pivot.v[v];
            const Vector<L> u = kGrad ? load<L>(g + v * L) : centered;
            sum[v] += u;
            dot[v] += u * centered;
          }
        double* to = own + k;
        for (int v = 0; v < vectors; ++v, to += L) {
          S::store(to, S::load(to) + sum[v]);
          S::store(to + row(), S::load(to + row()) + dot[v]);
        }
      });
    });
    if (is_matrix_) return;
    const double* own = all;
    for (int64_t c = first_channel(task), k = c; k < std::min(a.C, c + channels()); ++k) {
      sums[k] = std::accumulate(own, own + kRow, 0.0);
      sums[a.C + k] = std::accumulate(own + kRow, own + 2 * kRow, 0.0);
      own += 2 * kRow;
    }
  }

  // Writes (x - center) scale + shift, and in the backward pass adds grad grad_scale.
  template <bool kGrad>
  void transform(int64_t task, const T* x, const T* grad, T* y) const {
    each_matrix(task, [&](int64_t channel, int64_t rows, int64_t columns, int64_t first) {
      each_block(0, columns, [&](auto lanes, auto count, int64_t k) __attribute__((always_inline)) {
        constexpr int L = decltype(lanes)::value, vectors = decltype(count)::value;
        const auto values = [&](const double* of) {
          return Values<L, vectors>(*this, of, channel, k);
        };
        const auto center = values(center_), scale = values(scale_), shift = values(shift_),
                   grad_scale = values(kGrad ? grad_scale_ : scale_);
        const int64_t begin = first + k, step = row();
        for (int64_t r = 0, i = begin; r < rows; ++r, i += step)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            Vector<L> out = (load<L>(x + i + v * L) - center.v[v]) * scale.v[v] + shift.v[v];
            if (kGrad) out += load<L>(grad + i + v * L) * grad_scale.v[v];
            Simd<T, L>::store(y + i + v * L, __builtin_convertvector(out, typename Simd<T, L>::R));
          }
      });
    });
  }

  // ---- between the passes ------------------------------------------------------------------------

  // Adds the parts' sums, the first (0) or the second (1) of each, in their order.
  double total(int which, int64_t c) const {
    double sum = 0;
    for (int64_t part = 0; part < a.parts(); ++part) sum += parts_[(2 * part + which) * a.C + c];
    return sum;
  }
  static double value(const void* values, int64_t c, double otherwise) {
    return values ? double(at(values, 0)[c]) : otherwise;
  }

  // The pivot is a number near the mean, which keeps the sum of squares from cancelling.
  void first_pivots(const BatchNormForwardArgs& f, int64_t t, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      const T x = at(f.x, t * a.x_step)[c * a.S];
      pivot_[c] = std::isfinite(x) ? double(x) : 0;
    }
  }

  // Takes statistics from the sums, and the factors of the transform; or only moves the pivots to
  // the means.
  void finish(const BatchNormForwardArgs& f, int64_t t, int64_t block, bool only_pivots) const {
    const int64_t begin = block * kBlock, end = std::min(a.C, begin + kBlock);
    const double n = double(a.N) * double(a.S);
    const auto move = [&](void* running, int64_t c, double value) {
      if (T* const p = static_cast<T*>(running))
        p[c] = T(f.momentum * value + (1 - f.momentum) * double(p[c]));
    };
    for (int64_t c = begin; c < end; ++c) {
      const double distance = total(0, c) / n, mean = pivot_[c] + distance;
      if (only_pivots) {
        pivot_[c] = std::isfinite(mean) ? mean : 0;
        continue;
      }
      const double difference = total(1, c) / n - distance * distance;
      const double var = difference < 0 ? 0 : difference;  // NaN stays
      const double inverse = 1 / std::sqrt(var + f.eps);
      f.means[t * a.C + c] = center_[c] = mean;
      f.inverses[t * a.C + c] = inverse;
      move(f.running_mean, c, mean), move(f.running_var, c, var * n / (n - 1));
      scale_[c] = inverse * value(f.weight, c, 1);
      shift_[c] = value(f.bias, c, 0);
    }
    if (!only_pivots && t + 1 < a.T) first_pivots(f, t + 1, begin, end);
  }

  // The gradient of x is (grad - mean of grad - (x - mean) dot inverse^2 / n) inverse weight.
  void finish(const BatchNormBackwardArgs& b, int64_t t, int64_t block) const {
    const double n = double(a.N) * double(a.S);
    for (int64_t c = block * kBlock; c < std::min(a.C, (block + 1) * kBlock); ++c) {
      const double sum = total(0, c), dot = total(1, c), inverse = b.inverses[t * a.C + c];
      sum_[c] += sum, dot_[c] += dot * inverse;
      center_[c] = pivot_[c];
      grad_scale_[c] = inverse * value(b.weight, c, 1);
      scale_[c] = -grad_scale_[c] * dot * inverse * inverse / n;
      shift_[c] = -grad_scale_[c] * sum / n;
      if (b.grad_weight) static_cast<T*>(b.grad_weight)[c] = T(dot_[c]);
      if (b.grad_bias) static_cast<T*>(b.grad_bias)[c] = T(sum_[c]);
      if (t + 1 < a.T) pivot_[c] = b.means[(t + 1) * a.C + c];
    }
  }

  const BatchNormArgs& a;
  const bool is_matrix_;
  double *pivot_, *center_, *scale_, *shift_, *grad_scale_;  // (C,), of the step that runs
  double *dot_, *sum_;  // (C,), over all steps: the gradients of weight and bias
  double* parts_;       // (parts, 2, C): the sums of each part
  Phases::Counter* counters_;
  int64_t bytes_;
};

SNNLSTM_END_ISA
