// snntorch.Leaky, the counterpart of csrc/cpu/kernels/leaky.h. A thread takes its neurons through
// all steps. mem, the gradient that a step hands to the step before, and the sums of the
// parameters' gradients stay in registers.
#pragma once

#include "math.cuh"

namespace snnlstm::cuda {

namespace leaky {

constexpr int kThreads = 128;
// The fewest blocks of a multiprocessor: ptxas may use 128 registers, and spills none.
constexpr int kBlocks = 4;
// The steps that a thread loads at once, because a load takes longer than a step's arithmetic.
constexpr int kSteps = 4;

// The type in which kernels compute if x has the type X.
template <class X>
using Real = std::conditional_t<std::is_same_v<X, double>, double, float>;

// A thread has one vector of V neurons. Places in arrays are counted in vectors, since nvcc splits
// the store of a vector whose address it cannot prove to be aligned.
SNNLSTM_DEVICE int64_t vector_of_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

template <class T, class R, int V>
SNNLSTM_DEVICE void load_at(const void* array, int64_t place, R (&v)[V]) {
  load_vector(static_cast<const Elements<T, V>*>(array)[place].number, v);
}
template <class T, class R, int V>
SNNLSTM_DEVICE void store_at(void* array, int64_t place, const R (&v)[V]) {
  store_vector(static_cast<Elements<T, V>*>(array)[place].number, v);
}

// Loads the values of a vector's neurons. One division serves all of them, of 32 bits if those
// suffice, which nvcc's code tests.
template <class R, int V>
SNNLSTM_DEVICE void load_parameter(const LeakyParameter& p, int64_t vector, R (&v)[V]) {
  const R* values = static_cast<const R*>(p.values);
  if (p.count == 1) return unrolled<V>([&](int k) { v[k] = values[0]; });
  const auto i = uint64_t(vector) * V;
  const auto count = uint64_t(p.count);
  const auto stride = uint64_t(p.stride);
  const uint64_t run = i / stride;
  uint64_t place = stride == 1 && fault(Fault::one_leaky_feature) ? 0 : run % count;
  uint64_t rest = i - run * stride;
  unrolled<V>([&](int k) {
    v[k] = values[place];
    if (++rest == stride) {
      rest = 0;
      place = place + 1 == count ? 0 : place + 1;
    }
  });
}

}  // namespace leaky

template <class X, int V>
__global__ void __launch_bounds__(leaky::kThreads, leaky::kBlocks)
    leaky_forward(const __grid_constant__ LeakyForwardArgs a) {
  using namespace leaky;
  using R = Real<X>;
  using M = Math<R>;
  const int64_t i = vector_of_thread(), n = a.n / V;
  if (i >= n) return;
  R beta[V], threshold[V], mem[V], x[kSteps][V], spk[V];
  load_parameter(a.beta, i, beta);
  load_parameter(a.threshold, fault(Fault::one_leaky_threshold) ? 0 : i, threshold);
  const bool spikes = V > 1 || !std::is_same_v<X, float> || !fault(Fault::no_scalar_leaky_spikes);
  const R graded = spikes ? *static_cast<const R*>(a.graded_factor) : R(0);
  load_at<R>(a.mem0, i, mem);
#pragma unroll 1
  for (int64_t first = 0; first < a.T; first += kSteps) {
    unrolled<kSteps>([&](int s) {
      const int64_t t = first + s;
      if (t < a.T) load_at<X>(a.x, (fault(Fault::early_leaky_x) ? s : t) * n + i, x[s]);
    });
    unrolled<kSteps>([&](int s) {
      const int64_t t = first + s;
      if (t >= a.T) return;
      unrolled<V>([&](int k) {
        mem[k] = LeakyNeuron<M>::next_mem(a.reset, x[s][k], mem[k], beta[k], threshold[k]);
        spk[k] = M::where(Neuron<M>::fires(mem[k], threshold[k]), graded, R(0));
      });
      store_at<R>(a.spk, t * n + i, spk);
      if (a.record) store_at<R>(a.mem, t * n + i, mem);
    });
  }
  if (!a.record) store_at<R>(a.mem, i, mem);
}

template <class R, int V>
__global__ void __launch_bounds__(leaky::kThreads, leaky::kBlocks)
    leaky_backward(const __grid_constant__ LeakyBackwardArgs a) {
  using namespace leaky;
  using M = Math<R>;
  const int64_t i = vector_of_thread(), n = a.n / V;
  if (i >= n) return;
  R beta[V], threshold[V], mem[V], carried[V], grad_x[V], grad_beta[V], grad_threshold[V];
  R before[kSteps][V], from_spk[kSteps][V], from_mem[kSteps][V];
  load_parameter(a.beta, i, beta);
  load_parameter(a.threshold, i, threshold);
  const R graded = *static_cast<const R*>(a.graded_factor);
  const R p0 = R(a.surrogate_p0), p1 = R(a.surrogate_p1);
  const auto load_step = [&](const void* array, int64_t t, R(&v)[V]) {
    if (array != nullptr) return load_at<R>(array, t * n + i, v);
    clear<V>(v);
  };
  load_step(a.mem, a.T - 1, mem);
  clear<V>(carried), clear<V>(grad_beta), clear<V>(grad_threshold);
#pragma unroll 1
  for (int64_t last = a.T - 1; last >= 0; last -= kSteps) {
    unrolled<kSteps>([&](int s) {
      const int64_t t = last - s;
      if (t < 0) return;
      load_step(t > 0 ? a.mem : a.mem0, t > 0 ? t - 1 : 0, before[s]);
      load_step(a.grad_spk, fault(Fault::early_leaky_gradient) ? a.T - 1 - s : t, from_spk[s]);
      load_step(a.grad_mem, t, from_mem[s]);
    });
    unrolled<kSteps>([&](int s) {
      const int64_t t = last - s;
      if (t < 0) return;
      unrolled<V>([&](int k) {
        if (a.grad_spk != nullptr) {
          const R u = mem[k] - threshold[k];
          from_spk[s][k] =
              from_spk[s][k] * graded * Neuron<M>::surrogate_gradient(a.surrogate, u, p0, p1);
        }
        const auto d = LeakyNeuron<M>::backward(a.reset, before[s][k], beta[k], threshold[k],
                                                from_spk[s][k], from_mem[s][k] + carried[k]);
        grad_x[k] = d.x;
        carried[k] = d.mem_prev;
        mem[k] = before[s][k];
        grad_beta[k] += d.beta;
        grad_threshold[k] += d.threshold;
      });
      if (a.grad_x != nullptr)
        with_stored<R>(a.dtype,
                       [&](auto x) { store_at<decltype(x)>(a.grad_x, t * n + i, grad_x); });
    });
  }
  if (a.grad_mem0 != nullptr) store_at<R>(a.grad_mem0, i, carried);
  if (a.grad_beta != nullptr) store_at<R>(a.grad_beta, i, grad_beta);
  if (a.grad_threshold != nullptr) store_at<R>(a.grad_threshold, i, grad_threshold);
}

}  // namespace snnlstm::cuda
