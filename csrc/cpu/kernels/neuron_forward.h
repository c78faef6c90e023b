// The neurons of the forward pass: LSTM update, reset and quantisation of a row of gates, pooling
// and spikes. This file also writes the results that the caller asked for, and what training saves.
#pragma once

#include "neighbours.h"
#include "pool.h"
#include "state_rows.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class NeuronForward {
  using M = Math<T, VL>;
  using S = Simd<T, VL>;
  using R = typename S::R;
  using Mask = typename S::Mask;
  using Rows = typename StateRows<T, VL>::Rows;
  static constexpr int kGates = 4 * VL;

 public:
  NeuronForward(const ForwardArgs& a, const Layout<T, VL>& l, const StateRows<T, VL>& states)
      : a_(a), l_(l), states_(states), argmax_(a, l.Cp) {}

  void allocate(Workspace& workspace) {
    threshold_ = workspace.take<T>(l_.Cp);
    pooled_ = workspace.take<T*>(a_.threads);
    for (int k = 0; k < a_.threads; ++k) {
      T* const row = workspace.take<T>(l_.Wp * l_.Cp);
      if (pooled_) pooled_[k] = row;
    }
  }

  void pack_vectors() { l_.write_thresholds(a_, threshold_); }

  // Does the LSTM update, reset and quantisation of one row and channel block. Each of the two
  // loops has one chain of exp and division per pixel, so that the processor overlaps more pixels.
  void update(int64_t t, const Rows& r, int64_t h, int64_t cb, T* gates) const {
    const Cell& c = a_.cell;
    const bool resets = c.reset != Reset::none;
    const T* threshold = threshold_ + cb * VL;
    const T* syn_in = states_.syn_before(t, r, h) + cb * VL;
    T* syn_out = states_.syn_after(t, r, h) + cb * VL;
    const T* mem_in = states_.mem_inner(t, r, h) + cb * VL;
    T* mem_out = states_.mem_inner(t + 1, r, h) + cb * VL;
    const int64_t Cp = l_.Cp;
    const int64_t pixel = 4 * Cp;
    T* saved = static_cast<T*>(a_.saved_gates);
    if (saved) saved += 4 * l_.state_row(t * c.N + r.n, h) + cb * kGates;
    each_neighbours<T, VL>(l_.Wo, [&](int64_t w, auto count) __attribute__((always_inline)) {
      using N = Neighbours<T, VL, decltype(count)::value>;
      T* g = gates + w * kGates;
      Gates<typename N::R> act = Neuron<N>::activate(N::load_gates(g, kGates));
      N::M::store(g, Neuron<N>::next_syn(act, N::load(syn_in + w * Cp, Cp)));
      typename N::Mask reset{};
      if (resets) reset = Neuron<N>::fires(N::load(mem_in + w * Cp, Cp), N::repeat(threshold));
      act.o = N::flag(act.o, reset);
      N::M::store(g + N::lanes, act.o);
      if (saved) N::store_gates(saved + w * pixel, pixel, act);
    });
    each_neighbours<T, VL>(l_.Wo, [&](int64_t w, auto count) __attribute__((always_inline)) {
      using N = Neighbours<T, VL, decltype(count)::value>;
      const T* g = gates + w * kGates;
      const typename N::R syn = N::M::load(g), o = N::M::load(g + N::lanes);
      typename N::R mem = Neuron<N>::next_mem(N::abs(o), N::tanh(syn));
      mem = Neuron<N>::after_reset(c.reset, mem, N::flagged(o), N::repeat(threshold));
      N::store(syn_out + w * Cp, Cp, quantised<N>(syn, a_));
      N::store(mem_out + w * Cp, Cp, quantised<N>(mem, a_));
    });
  }

  // Writes the states and spikes of rows [begin, end), all of whose channels are updated.
  void finish(int64_t t, const Rows& r, int64_t begin, int64_t end, int thread) const {
    const Cell& c = a_.cell;
    write_states(t, r, begin, end);
    if (c.spiking) fire(t, r, begin / c.pool_h, end / c.pool_h, pooled_[thread]);
  }

 private:
  void write_states(int64_t t, const Rows& r, int64_t begin, int64_t end) const {
    const auto put = [&](const View& v, const T* src, int64_t row) {
      store_rows<S>(src, Pixels{l_.Wo, row, l_.Cp}, end - begin, a_.cell.C, v, t, r.n, begin,
                    [](R state, int64_t) { return state; });
    };
    const T* mem = states_.mem_inner(t + 1, r, begin);
    if (a_.spk_is_mem()) put(a_.spk, mem, l_.mem.row());
    if (!a_.record && t != r.steps - 1) return;
    put(a_.syn, states_.syn_after(t, r, begin), l_.Wo * l_.Cp);
    put(a_.mem, mem, l_.mem.row());
  }

  // Returns row h of the pooled image: channels-last pixels, which lie `stride` apart. In training
  // this also saves the indices of the maxima in their windows.
  const T* pooled_row(int64_t t, const Rows& r, int64_t h, T* pooled, int64_t& stride) const {
    const Cell& c = a_.cell;
    const T* mem = states_.mem_inner(t + 1, r, h * c.pool_h);
    stride = l_.Cp;
    if (c.pool == Pool::none) return mem;  // update() has quantised mem
    const int64_t row = l_.mem.row(), first = argmax_.row(t, r.n, h);
    for (int64_t w = 0; w < l_.Wp; ++w)
      for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
        const T* window = mem + w * c.pool_w * l_.Cp + ch;
        const int64_t k = w * l_.Cp + ch;
        R v;
        if (c.pool == Pool::max) {
          v = PoolWindow<M>::max(c, window, row, l_.Cp);
          if (argmax_.present())
            argmax_.put(first + k, PoolWindow<M>::argmax(c, window, row, l_.Cp, v));
        } else {
          v = PoolWindow<M>::mean(c, window, row, l_.Cp);
        }
        S::store(pooled + k, quantised<M>(v, a_));
      }
    return pooled;
  }

  // Writes the spikes of rows [begin, end) of the pooled image.
  void fire(int64_t t, const Rows& r, int64_t begin, int64_t end, T* pooled) const {
    const T size = spike_of<T>(a_);
    const R spike = S::splat(size), silent = S::splat(T(0) * size);
    const auto spikes = [&](R mem, int64_t ch) {
      return S::where(Neuron<M>::fires(mem, S::load(threshold_ + ch)), spike, silent);
    };
    const int64_t rows = a_.cell.pool == Pool::none ? end - begin : 1;
    for (int64_t h = begin; h < end; h += rows) {
      int64_t stride;
      const T* row = pooled_row(t, r, h, pooled, stride);
      store_rows<S>(row, Pixels{l_.Wp, l_.mem.row(), stride}, rows, a_.cell.C, a_.spk, t, r.n, h,
                    spikes);
    }
  }

  const ForwardArgs& a_;
  const Layout<T, VL>& l_;
  const StateRows<T, VL>& states_;
  Argmax<M> argmax_;
  T* threshold_ = nullptr;
  T** pooled_ = nullptr;  // (Wp, Cp) for each thread
};

SNNLSTM_END_ISA
