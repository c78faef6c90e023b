// snntorch.Leaky, in one pass over memory for each direction. A task takes a range of neurons
// through all steps, so that mem, and the gradient that a step hands to the step before, stay in
// the L2 cache.
#pragma once

#include <algorithm>

#include "halves.h"
#include "threads.h"

SNNLSTM_BEGIN_ISA

// The layer's kernels. They compute in T; x and its gradient have the type X.
template <class T, class X>
struct Leaky {
  static constexpr int VL = kWideBytes / sizeof(T);
  static constexpr int64_t kLargestTask = (128 << 10) / sizeof(T);  // neurons
  static constexpr int64_t kSmallestTask = kLargestTask / 16;
  static constexpr int64_t kOperations = 8;  // in a neuron's step; decides the number of threads
  using M = Math<T, VL>;
  using R = typename M::R;
  using L = LeakyNeuron<M>;

  static SNNLSTM_INLINE R load_vector(const T* p) { return M::load(p); }
  static SNNLSTM_INLINE void store_vector(T* p, R v) { M::store(p, v); }
  template <class H>
  static SNNLSTM_INLINE R load_vector(const H* p) {
    return Halves<M>::load(p);
  }
  template <class H>
  static SNNLSTM_INLINE void store_vector(H* p, R v) {
    Halves<M>::store(p, v);
  }

  // Loads the first `count` lanes of a vector; the other lanes are 0.
  template <class N>
  static SNNLSTM_INLINE R load(const N* p, int count) {
    if (count == VL) return load_vector(p);
    N lanes[VL] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(N));
    return load_vector(lanes);
  }
  template <class N>
  static SNNLSTM_INLINE void store(N* p, R v, int count) {
    if (count == VL) return store_vector(p, v);
    N lanes[VL];
    store_vector(lanes, v);
    std::memcpy(p, lanes, size_t(count) * sizeof(N));
  }

  // beta or threshold. The neurons come in runs: either all neurons of a run share one value, or
  // each neuron of a run has a value of its own.
  struct Parameter {
    const T* values;
    int64_t count, stride, origin = 0;  // the neuron of the first value

    explicit Parameter(const LeakyParameter& p)
        : values(static_cast<const T*>(p.values)), count(p.count), stride(p.stride) {}

    int64_t length() const { return stride == 1 ? count : stride; }
    // Says whether the values of whole vectors are better read from memory.
    bool has_short_runs() const {
      const int64_t least = length() % VL == 0 ? 2 * VL : 8 * VL;
      return count > 1 && length() < least;
    }

    int64_t end_of_run(int64_t i, int64_t end) const {
      return count == 1 ? end : std::min(end, i + length() - (i - origin) % length());
    }
    SNNLSTM_INLINE R at(int64_t i, int64_t first, const T* run, int lanes) const {
      return stride == 1 && count > 1 ? load(run + (i - first), lanes) : M::splat(*run);
    }
    const T* run(int64_t i) const {
      return values + (count == 1 ? 0 : (i - origin) / stride % count);
    }

    // The same with a value for each neuron of a range, which `own` gets.
    Parameter spread(int64_t begin, int64_t end, T* own) const {
      Parameter out = *this;
      for (int64_t i = begin, stop; i < end; i = stop) {
        stop = end_of_run(i, end);
        if (stride == 1 && count > 1)
          std::copy_n(run(i), stop - i, own + (i - begin));
        else
          std::fill_n(own + (i - begin), stop - i, *run(i));
      }
      out.values = own, out.count = std::max<int64_t>(2, end - begin), out.stride = 1;
      out.origin = begin;
      return out;
    }
  };

  struct Parameters {
    Parameter beta, threshold;
  };

  // Calls f(i, lanes, beta, threshold) for vectors that cover the neurons from i to end.
  template <class F>
  static SNNLSTM_INLINE void each_vector(const Parameters& p, int64_t i, int64_t end, F&& f) {
    while (i < end) {
      const int64_t first = i, stop = p.threshold.end_of_run(i, p.beta.end_of_run(i, end));
      const T *betas = p.beta.run(i), *thresholds = p.threshold.run(i);
      const auto vector = [&](int lanes) __attribute__((always_inline)) {
        f(i, lanes, p.beta.at(i, first, betas, lanes), p.threshold.at(i, first, thresholds, lanes));
      };
      for (; i + VL <= stop; i += VL) vector(VL);
      if (i < stop) vector(int(stop - i));
      i = stop;
    }
  }

  static SNNLSTM_INLINE void forward_step(const LeakyForwardArgs& a, const Parameters& p, int64_t t,
                                          int64_t begin, int64_t end) {
    const X* x = static_cast<const X*>(a.x) + t * a.n;
    T* spk = static_cast<T*>(a.spk) + t * a.n;
    T* mem = static_cast<T*>(a.mem) + (a.record ? t * a.n : 0);
    const T* before = t == 0 ? static_cast<const T*>(a.mem0) : a.record ? mem - a.n : mem;
    const R graded = M::splat(*static_cast<const T*>(a.graded_factor));
    each_vector(p, begin, end,
                [&](int64_t i, int lanes, R beta, R threshold) __attribute__((always_inline)) {
                  const R next = L::next_mem(a.reset, load(x + i, lanes), load(before + i, lanes),
                                             beta, threshold);
                  store(mem + i, next, lanes);
                  store(spk + i, M::where(Neuron<M>::fires(next, threshold), graded, R{}), lanes);
                });
  }

  // Calls f(parameters, begin, end) for ranges that cover the neurons. A long range is read and
  // written in long runs, which processors fetch ahead: 2048 neurons a task take up to twice the time
  // of 32768. Parameters in short runs, such as those of 8 channels in channels-last images, are
  // written out for a small range first, because a part of a vector takes as long as eight vectors.
  template <class F>
  static void each_task(const LeakyArgs& a, int64_t operations, F&& f) {
    const Parameters p{Parameter(a.beta), Parameter(a.threshold)};
    const bool spread = p.beta.has_short_runs() || p.threshold.has_short_runs();
    const int64_t share = a.threads == 1 ? a.n : a.n / (4 * a.threads);  // four tasks for a thread
    const int64_t most = spread ? kSmallestTask : kLargestTask;
    const int64_t size = std::min(most, std::max(kSmallestTask, (share + VL - 1) / VL * VL));
    parallel_for(a.threads, (a.n + size - 1) / size, size * a.T * operations,
                 [&](int64_t task, int) {
                   const int64_t begin = task * size, end = std::min(a.n, begin + size);
                   if (!spread) return f(p, begin, end);
                   T betas[kSmallestTask], thresholds[kSmallestTask];
                   f({p.beta.spread(begin, end, betas), p.threshold.spread(begin, end, thresholds)},
                     begin, end);
                 });
  }

  static void forward(const LeakyForwardArgs& a) {
    each_task(a, kOperations, [&](const Parameters& p, int64_t begin, int64_t end) {
      for (int64_t t = 0; t < a.T; ++t) forward_step(a, p, t, begin, end);
    });
  }

  // Adds v to the sums over the steps, unless they are null.
  static SNNLSTM_INLINE void add(void* sums, int64_t i, R v, int lanes, bool first) {
    T* p = static_cast<T*>(sums) + i;
    if (sums) store(p, first ? v : v + load(p, lanes), lanes);
  }

  static SNNLSTM_INLINE void backward_step(const LeakyBackwardArgs& a, const Parameters& p,
                                           int64_t t, int64_t begin, int64_t end) {
    const auto at = [&](const void* first) {
      return first ? static_cast<const T*>(first) + t * a.n : nullptr;
    };
    const T* mem = at(a.mem);
    const T* grad_spk = at(a.grad_spk);
    const T* grad_mem = at(a.grad_mem);
    const T* before = !a.needs_before() ? mem : t == 0 ? static_cast<const T*>(a.mem0) : mem - a.n;
    X* grad_x = a.grad_x ? static_cast<X*>(a.grad_x) + t * a.n : nullptr;
    T* carried = static_cast<T*>(a.grad_mem0);
    const bool last = t == a.T - 1;
    const R graded = M::splat(*static_cast<const T*>(a.graded_factor));
    const R p0 = M::splat(T(a.surrogate_p0)), p1 = M::splat(T(a.surrogate_p1));
    each_vector(p, begin, end,
                [&](int64_t i, int lanes, R beta, R threshold) __attribute__((always_inline)) {
                  R from_spk{}, from_mem{};
                  if (grad_spk) {
                    const R u = load(mem + i, lanes) - threshold;
                    from_spk = load(grad_spk + i, lanes) * graded *
                               Neuron<M>::surrogate_gradient(a.surrogate, u, p0, p1);
                  }
                  if (grad_mem) from_mem = load(grad_mem + i, lanes);
                  if (!last) from_mem += load(carried + i, lanes);
                  const auto d = L::backward(a.reset, load(before + i, lanes), beta, threshold,
                                             from_spk, from_mem);
                  if (grad_x) store(grad_x + i, d.x, lanes);
                  if (carried) store(carried + i, d.mem_prev, lanes);
                  add(a.grad_beta, i, d.beta, lanes, last);
                  add(a.grad_threshold, i, d.threshold, lanes, last);
                });
  }

  static void backward(const LeakyBackwardArgs& a) {
    each_task(a, 2 * kOperations, [&](const Parameters& p, int64_t begin, int64_t end) {
      for (int64_t t = a.T; t-- > 0;) backward_step(a, p, t, begin, end);
    });
  }
};

SNNLSTM_END_ISA
