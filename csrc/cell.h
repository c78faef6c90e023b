// The formulas of one neuron, forward and backward. The CPU kernels, the CUDA kernels and the
// emulated CUDA kernels use them.
//
// A backend provides its arithmetic as a class M of static functions:
//   M::R            a real number, or a vector of them, with + - * / and comparisons
//   M::splat(c)     the constant c in every lane
//   M::where(mask, a, b)   mask: the result of a comparison of two R
//   M::sigmoid(R), M::tanh(R), M::exp(R), M::abs(R)
//
// The cell is snntorch.SConv2dLSTM's: a ConvLSTM (Shi et al. 2015,
// https://arxiv.org/abs/1506.04214) whose hidden state is thresholded. Surrogate gradients are
// those of snntorch.surrogate.
#pragma once

#include "args.h"

#if defined(__CUDACC__)
#define SNNLSTM_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that no copy compiled for one instruction set is linked into another's code.
#define SNNLSTM_HD __attribute__((always_inline)) inline
#endif

namespace snnlstm {

template <class R>
struct Gates {
  R i, f, o, g;
};

// Gradients of one step of one neuron.
template <class R>
struct NeuronGrad {
  Gates<R> pre;  // with respect to the gates before their activation functions
  R syn_prev;    // with respect to the synaptic current that the step started from
};

template <class M>
struct Neuron {
  using R = typename M::R;

  static SNNLSTM_HD Gates<R> activate(const Gates<R>& pre) {
    return {M::sigmoid(pre.i), M::sigmoid(pre.f), M::sigmoid(pre.o), M::tanh(pre.g)};
  }

  // Returns the synaptic current (the LSTM's cell state) after the step; a: activated gates.
  static SNNLSTM_HD R next_syn(const Gates<R>& a, R syn_prev) { return a.f * syn_prev + a.i * a.g; }

  // Returns the membrane potential (the LSTM's hidden state) before the reset. tanh_syn: the tanh
  // of the synaptic current before its quantisation.
  static SNNLSTM_HD R next_mem(R o, R tanh_syn) { return o * tanh_syn; }

  // Says whether a neuron spikes. The reset calls this with the mem that the step started from.
  static SNNLSTM_HD auto fires(R mem, R threshold) { return mem - threshold > M::splat(0); }

  // A neuron without a reset keeps its mem, even if the threshold is infinite.
  template <class Mask>
  static SNNLSTM_HD R after_reset(Reset mechanism, R mem, Mask reset, R threshold) {
    switch (mechanism) {
      case Reset::subtract:
        return M::where(reset, mem - threshold, mem);
      case Reset::zero:
        return M::where(reset, mem - mem, mem);  // not the constant 0: NaN stays NaN
      default:
        return mem;
    }
  }

  // mem_grad and syn_grad are the gradients of mem and syn after reset and quantisation (which
  // passes gradients straight through), including those of the spike and of later steps. `a` has
  // the activated gates. With Reset::zero a neuron that was reset passes on only NaN.
  template <class Mask>
  static SNNLSTM_HD NeuronGrad<R> backward(Reset mechanism, const Gates<R>& a, R syn_prev,
                                           R tanh_syn, Mask reset, R mem_grad, R syn_grad) {
    const R one = M::splat(1);
    if (mechanism == Reset::zero) mem_grad = M::where(reset, mem_grad - mem_grad, mem_grad);
    const R ds = syn_grad + mem_grad * a.o * (one - tanh_syn * tanh_syn);
    NeuronGrad<R> d;
    d.pre.i = ds * a.g * a.i * (one - a.i);
    d.pre.f = ds * syn_prev * a.f * (one - a.f);
    d.pre.o = mem_grad * tanh_syn * a.o * (one - a.o);
    d.pre.g = ds * a.i * (one - a.g * a.g);
    d.syn_prev = ds * a.f;
    return d;
  }

  // Returns d spike / d u at u = mem - threshold.
  static SNNLSTM_HD R surrogate_gradient(Surrogate kind, R u, R p0, R p1) {
    const R zero = M::splat(0), one = M::splat(1);
    switch (kind) {
      case Surrogate::atan: {
        const R z = M::splat(1.57079632679489661923) * p0 * u;
        return p0 * M::splat(0.5) / (one + z * z);
      }
      case Surrogate::fast_sigmoid: {
        const R d = p0 * M::abs(u) + one;
        return one / (d * d);
      }
      case Surrogate::sigmoid:
        return p0 * M::sigmoid(p0 * u) * M::sigmoid(-(p0 * u));  // 1 - s without cancellation
      case Surrogate::straight_through:
        return one;
      case Surrogate::triangular:
        return M::where(u >= zero, -p0, p0);
      case Surrogate::heaviside:
        return M::where(u > zero, one, zero);
      case Surrogate::spike_rate_escape:
        return p1 * M::exp(-(p0 * M::abs(u - one)));
      case Surrogate::sparse_fast_sigmoid: {
        const R d = p0 * M::abs(u) + one;
        return M::where(u > p1, one / (d * d), zero);
      }
      case Surrogate::leaky:
        return M::where(u > zero, one, p0);
      default:
        return zero;
    }
  }
};

// Gradients of one step of one neuron of snntorch.Leaky.
template <class R>
struct LeakyGrad {
  R x, mem_prev, beta, threshold;
};

// The neuron of snntorch.Leaky 1.0.0. beta is the layer's parameter before its clamp to [0, 1]. If
// the compiler contracts no expressions, each product and sum rounds as torch's operators do.
template <class M>
struct LeakyNeuron {
  using R = typename M::R;
  using N = Neuron<M>;

  static SNNLSTM_HD R decay(R beta) {
    const R zero = M::splat(0), one = M::splat(1);
    return M::where(beta < zero, zero, M::where(beta > one, one, beta));
  }

  static SNNLSTM_HD R next_mem(Reset mechanism, R x, R mem, R beta, R threshold) {
    const auto reset = N::fires(mem, threshold);
    if (mechanism == Reset::zero) mem = N::after_reset(mechanism, mem, reset, threshold);
    const R next = decay(beta) * mem + x;
    return mechanism == Reset::subtract ? N::after_reset(mechanism, next, reset, threshold) : next;
  }

  // spk_grad is the gradient through the spike with respect to u = mem - threshold. mem_grad is the
  // gradient of mem after the step, including later steps but not the spike.
  static SNNLSTM_HD LeakyGrad<R> backward(Reset mechanism, R mem_prev, R beta, R threshold,
                                          R spk_grad, R mem_grad) {
    const R zero = M::splat(0), grad = spk_grad + mem_grad;
    const auto reset = N::fires(mem_prev, threshold);
    R decayed = grad, before = mem_prev;
    if (mechanism == Reset::zero) {
      decayed = M::where(reset, grad - grad, grad);
      before = N::after_reset(mechanism, mem_prev, reset, threshold);
    }
    const auto inside = (beta >= zero) & (beta <= M::splat(1));
    LeakyGrad<R> d;
    d.x = grad;
    d.mem_prev = decay(beta) * decayed;
    d.beta = M::where(inside, grad * before, zero);
    d.threshold = -spk_grad;
    if (mechanism == Reset::subtract) d.threshold = d.threshold - M::where(reset, grad, zero);
    return d;
  }
};

// Says whether a mem counts as the largest of a pooling window. The first one that counts gets the
// gradient. Because convolutions round, equal mems may differ by
// a unit in the last place. `unit` is that of the largest mem, or 0 in half types, whose unit is
// larger than such differences. NaN counts as the largest.
template <class R>
SNNLSTM_HD auto is_largest(R mem, R largest, R unit) {
  return (mem >= largest - unit) | (mem == largest) | (mem != mem);
}

// Returns the nearest of n ascending levels by |level - x|, rounded to T. An exact tie takes the
// lowest index, as do NaN and the infinities, whose distances are all equal.
template <class T>
SNNLSTM_HD T quantise(T x, const T* levels, int n) {
  if (!(x - x == T(0))) return levels[0];
  const auto distance = [&](int k) {
    const T d = levels[k] - x;
    return d < T(0) ? -d : d;
  };
  // Returns the first k below `end` for which comes_before(k) is false, or `end`.
  const auto first = [](int end, auto comes_before) {
    int lo = 0;
    while (lo < end) {
      const int mid = (lo + end) / 2;
      comes_before(mid) ? lo = mid + 1 : end = mid;
    }
    return lo;
  };
  const int lo = first(n, [&](int k) { return levels[k] < x; });
  int best = lo < n ? lo : n - 1;
  if (best > 0 && distance(best - 1) <= distance(best)) --best;
  // Rounded distances tie far from all levels, and where levels repeat. They never rise towards
  // `best`, so the tied levels are a run that ends there, whose first level wins.
  if (best > 0 && distance(best - 1) == distance(best)) {
    const T shortest = distance(best);
    best = first(best, [&](int k) { return distance(k) > shortest; });
  }
  return levels[best];
}

}  // namespace snnlstm
