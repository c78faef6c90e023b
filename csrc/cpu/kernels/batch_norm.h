// Batch norm in training: the steps of a sequence, each with statistics of its own. Everything is
// computed in double, because a float that sums all pixels of a channel loses their last digits.
#pragma once

#include <numeric>

#include "threads.h"
#include "workspace.h"

SNNLSTM_BEGIN_ISA

// The layer's kernels, for x and its gradient of type T. A step is either one matrix, whose rows
// are pixels and whose columns are channels, or a matrix for each image and channel, whose columns
// are neighbouring pixels. The work of a step is cut in the same way for any number of threads.
template <class T>
class BatchNorm {
 public:
  explicit BatchNorm(const BatchNormArgs& args, void* memory) : a(args) {
    Workspace workspace(memory);
    for (double** array : {&pivot_, &center_, &scale_, &shift_, &grad_scale_, &dot_, &sum_})
      *array = workspace.take<double>(a.C);
    sums_ = workspace.take<double>(2 * a.parts() * a.C);
    counters_ = workspace.take<Phases::Counter>(phases());
    bytes_ = workspace.bytes();
  }

  int64_t bytes() const { return bytes_; }

  static void forward(const BatchNormForwardArgs& f) {
    BatchNorm norm(f, f.workspace);
    norm.first_pivots(f, 0, 0, f.C);
    norm.run([&](int64_t t, const auto& phase) {
      for (int pass = kPasses; pass-- > 0;) {
        phase(norm.tasks(), [&](int64_t task) { norm.add_up(task, norm.step(f.x, t), nullptr); });
        phase(norm.blocks(), [&](int64_t block) { norm.finish(f, t, block, pass > 0); });
      }
      phase(norm.tasks(), [&](int64_t task) {
        norm.transform(task, norm.step(f.x, t), nullptr, norm.result(f.y, t));
      });
    });
  }

  static void backward(const BatchNormBackwardArgs& b) {
    BatchNorm norm(b, b.workspace);
    std::fill_n(norm.dot_, b.C, 0.0);
    std::fill_n(norm.sum_, b.C, 0.0);
    std::copy_n(b.means, b.C, norm.pivot_);
    norm.run([&](int64_t t, const auto& phase) {
      const T *x = norm.step(b.x, t), *grad = norm.result(b.grad_y, t);
      phase(norm.tasks(), [&](int64_t task) { norm.add_up(task, x, grad); });
      phase(norm.blocks(), [&](int64_t block) { norm.finish(b, t, block); });
      if (b.grad_x)
        phase(norm.tasks(),
              [&](int64_t task) { norm.transform(task, x, grad, norm.result(b.grad_x, t)); });
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

  const T* step(const void* x, int64_t t) const { return static_cast<const T*>(x) + t * a.x_step; }
  template <class P>
  auto result(P* y, int64_t t) const {
    using Same = std::conditional_t<std::is_const_v<P>, const T, T>;
    return static_cast<Same*>(y) + t * a.N * a.C * a.S;
  }

  bool is_matrix() const { return a.S == 1; }
  int64_t blocks() const { return (a.C + kBlock - 1) / kBlock; }
  int64_t phases() const { return a.T * (2 * kPasses + 1); }

  // Channels of a task: all of a part, or as many as have some 4096 pixels, neighbours in memory.
  int64_t channels() const {
    if (is_matrix()) return a.C;
    return std::min({a.C, kChannels, 1 + 4096 * a.parts() / (a.N * a.S)});
  }
  int64_t tasks() const { return a.parts() * ((a.C + channels() - 1) / channels()); }

  // Calls f(t, phase) for each step, with all threads. phase(count, g) runs g for `count` tasks.
  template <class F>
  void run(F&& f) const {
    const Phases all(counters_, phases());
    parallel(a.threads, 4.0 * double(a.N) * double(a.C) * double(a.S), [&](int) {
      int64_t number = 0;
      const auto phase = [&](int64_t count, auto&& g) { all.run(number++, count, g); };
      for (int64_t t = 0; t < a.T; ++t) f(t, phase);
    });
  }

  int64_t first_channel(int64_t task) const { return task / a.parts() * channels(); }
  int64_t last_channel(int64_t task) const {
    return std::min(a.C, first_channel(task) + channels());
  }

  // Calls f(channel, rows, columns, first) for the matrices of a task. The first number lies at
  // x[first], and the rows lie row() apart. The columns are all channels, or pixels of one.
  template <class F>
  void each_matrix(int64_t task, F&& f) const {
    const int64_t part = task % a.parts(), rest = a.S % kRow;
    const int64_t begin = a.N * part / a.parts(), end = a.N * (part + 1) / a.parts();
    if (is_matrix()) {
      const int64_t rows = 1 + kChunk / a.C;
      for (int64_t n = begin; n < end; n += rows) f(0, std::min(rows, end - n), a.C, n * a.C);
      return;
    }
    for (int64_t n = begin; n < end; ++n)
      for (int64_t channel = first_channel(task); channel < last_channel(task); ++channel) {
        const int64_t first = (n * a.C + channel) * a.S;
        if (a.S >= kRow) f(channel, a.S / kRow, kRow, first);
        if (rest > 0) f(channel, 1, rest, first + a.S - rest);
      }
  }
  int64_t row() const { return is_matrix() ? a.C : kRow; }

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

  // The values of a column's channel, or of the channel of all columns.
  template <int L>
  SNNLSTM_INLINE Vector<L> of_columns(const double* values, int64_t channel, int64_t k) const {
    return is_matrix() ? Simd<double, L>::load(values + k)
                       : Simd<double, L>::splat(values[channel]);
  }

  // ---- the two passes over x ---------------------------------------------------------------------

  // Adds up u and u (x - pivot) in a part, for each channel. u is the gradient, or else x - pivot.
  void add_up(int64_t task, const T* x, const T* grad) const {
    double* const sums = sums_ + task % a.parts() * 2 * a.C;
    double lanes[kChannels * 2 * kRow];  // for each channel, those of the columns of its images
    double* const first = is_matrix() ? sums : lanes;
    std::fill_n(first, 2 * row() * (is_matrix() ? 1 : channels()), 0.0);
    each_matrix(task, [&](int64_t channel, int64_t rows, int64_t columns, int64_t at) {
      double* const sum = first + 2 * row() * (is_matrix() ? 0 : channel - first_channel(task));
      double* const dot = sum + row();
      each_block(0, columns, [&](auto lanes, auto count, int64_t k) __attribute__((always_inline)) {
        if (grad)
          add_columns<true>(lanes, count, channel, rows, x + at, grad + at, sum, dot, k);
        else
          add_columns<false>(lanes, count, channel, rows, x + at, x, sum, dot, k);
      });
    });
    if (is_matrix()) return;
    const double* sum = lanes;
    for (int64_t c = first_channel(task); c < last_channel(task); ++c, sum += 2 * kRow) {
      sums[c] = std::accumulate(sum, sum + kRow, 0.0);
      sums[a.C + c] = std::accumulate(sum + kRow, sum + 2 * kRow, 0.0);
    }
  }
  template <bool kGrad, int L, int vectors>
  void add_columns(Count<L>, Count<vectors>, int64_t channel, int64_t rows, const T* x,
                   const T* grad, double* sum, double* dot, int64_t k) const {
    using S = Simd<double, L>;
    Vector<L> pivot[vectors], sums[vectors], dots[vectors];
    for (int v = 0; v < vectors; ++v) {
      pivot[v] = of_columns<L>(pivot_, channel, k + v * L);
      sums[v] = S::load(sum + k + v * L);
      dots[v] = S::load(dot + k + v * L);
    }
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = r * row() + k + v * L;
        const Vector<L> centered = load<L>(x + at) - pivot[v];
        const Vector<L> u = kGrad ? load<L>(grad + at) : centered;
        sums[v] += u;
        dots[v] += u * centered;
      }
    for (int v = 0; v < vectors; ++v) {
      S::store(sum + k + v * L, sums[v]);
      S::store(dot + k + v * L, dots[v]);
    }
  }

  // Writes (x - center) scale + shift + grad grad_scale, without the last term if there is no grad.
  void transform(int64_t task, const T* x, const T* grad, T* y) const {
    each_matrix(task, [&](int64_t channel, int64_t rows, int64_t columns, int64_t at) {
      each_block(0, columns, [&](auto lanes, auto count, int64_t k) __attribute__((always_inline)) {
        if (grad)
          write_columns<true>(lanes, count, channel, rows, x + at, grad + at, y + at, k);
        else
          write_columns<false>(lanes, count, channel, rows, x + at, x, y + at, k);
      });
    });
  }
  template <bool kGrad, int L, int vectors>
  void write_columns(Count<L>, Count<vectors>, int64_t channel, int64_t rows, const T* x,
                     const T* grad, T* y, int64_t k) const {
    Vector<L> center[vectors], scale[vectors], shift[vectors], grad_scale[vectors];
    for (int v = 0; v < vectors; ++v) {
      center[v] = of_columns<L>(center_, channel, k + v * L);
      scale[v] = of_columns<L>(scale_, channel, k + v * L);
      shift[v] = of_columns<L>(shift_, channel, k + v * L);
      if (kGrad) grad_scale[v] = of_columns<L>(grad_scale_, channel, k + v * L);
    }
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = r * row() + k + v * L;
        Vector<L> out = (load<L>(x + at) - center[v]) * scale[v] + shift[v];
        if (kGrad) out += load<L>(grad + at) * grad_scale[v];
        Simd<T, L>::store(y + at, __builtin_convertvector(out, typename Simd<T, L>::R));
      }
  }

  // ---- between the passes ------------------------------------------------------------------------

  double at(const void* values, int64_t c, double otherwise) const {
    return values ? double(static_cast<const T*>(values)[c]) : otherwise;
  }
  // Adds the parts' sums, the first (0) or the second (1) of each, in their order.
  double total(int which, int64_t c) const {
    double sum = 0;
    for (int64_t part = 0; part < a.parts(); ++part) sum += sums_[(2 * part + which) * a.C + c];
    return sum;
  }

  // A number of a channel near its mean, which keeps the sum of squares from cancelling.
  void first_pivots(const BatchNormForwardArgs& f, int64_t t, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      const T x = step(f.x, t)[c * a.S];
      pivot_[c] = std::isfinite(x) ? double(x) : 0;
    }
  }

  // Takes statistics from the sums, and the factors of the transform; or only moves the pivots to
  // the means.
  void finish(const BatchNormForwardArgs& f, int64_t t, int64_t block, bool only_pivots) const {
    const int64_t begin = block * kBlock, end = std::min(a.C, begin + kBlock);
    const double n = double(a.N) * double(a.S);
    for (int64_t c = begin; c < end; ++c) {
      const double distance = total(0, c) / n, mean = pivot_[c] + distance;
      if (only_pivots) {
        pivot_[c] = std::isfinite(mean) ? mean : 0;
        continue;
      }
      const double difference = total(1, c) / n - distance * distance;
      const double var = difference < 0 ? 0 : difference;  // NaN stays
      const double inverse = 1 / std::sqrt(var + f.eps);
      f.means[t * a.C + c] = mean;
      f.inverses[t * a.C + c] = inverse;
      move(f.running_mean, c, mean, f.momentum);
      move(f.running_var, c, var * n / (n - 1), f.momentum);
      center_[c] = mean;
      scale_[c] = inverse * at(f.weight, c, 1);
      shift_[c] = at(f.bias, c, 0);
    }
    if (!only_pivots && t + 1 < a.T) first_pivots(f, t + 1, begin, end);
  }
  static void move(void* running, int64_t c, double value, double momentum) {
    if (T* const p = static_cast<T*>(running))
      p[c] = T(momentum * value + (1 - momentum) * double(p[c]));
  }

  // The gradient of x is (grad - mean of grad - (x - mean) dot inverse^2 / n) inverse weight.
  void finish(const BatchNormBackwardArgs& b, int64_t t, int64_t block) const {
    const double n = double(a.N) * double(a.S);
    for (int64_t c = block * kBlock; c < std::min(a.C, (block + 1) * kBlock); ++c) {
      const double sum = total(0, c), dot = total(1, c), inverse = b.inverses[t * a.C + c];
      sum_[c] += sum;
      dot_[c] += dot * inverse;
      center_[c] = pivot_[c];
      grad_scale_[c] = inverse * at(b.weight, c, 1);
      scale_[c] = -grad_scale_[c] * dot * inverse * inverse / n;
      shift_[c] = -grad_scale_[c] * sum / n;
      if (t + 1 < a.T) {
        pivot_[c] = b.means[(t + 1) * a.C + c];
        continue;
      }
      if (b.grad_weight) static_cast<T*>(b.grad_weight)[c] = T(dot_[c]);
      if (b.grad_bias) static_cast<T*>(b.grad_bias)[c] = T(sum_[c]);
    }
  }

  const BatchNormArgs& a;
  double *pivot_, *center_, *scale_, *shift_, *grad_scale_;  // (C,), of the step that runs
  double *dot_, *sum_;  // (C,), over all steps: the gradients of weight and bias
  double* sums_;        // (parts, 2, C)
  Phases::Counter* counters_;
  int64_t bytes_;
};

SNNLSTM_END_ISA
