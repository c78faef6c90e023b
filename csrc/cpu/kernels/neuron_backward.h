// The neurons of the backward pass, for a block of rows of one time step: spike, pooling, reset,
// LSTM. They fill the images that the step's convolutions read (step_images.h). The spikes'
// gradient reads mem after the step from the image of the next step, which starts from that mem.
#pragma once

#include "neighbours.h"
#include "pool.h"
#include "step_images.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class NeuronBackward {
  using M = Math<T, VL>;
  using S = Simd<T, VL>;
  using R = typename S::R;
  using Mask = typename S::Mask;
  static constexpr int kGates = 4 * VL;

 public:
  NeuronBackward(const BackwardArgs& a, const Layout<T, VL>& l, const RowTasks& tasks)
      : a_(a), l_(l), tasks_(tasks), argmax_(a, l.Cp), images_(l) {}

  void allocate(Workspace& workspace) {
    images_.allocate(workspace, a_.grad_weight != nullptr);
    threshold_ = workspace.take<T>(l_.Cp);
    threshold_sums_ = workspace.take<T>(tasks_.count * l_.Cp);
    bias_sums_ = workspace.take<T>(tasks_.count * 4 * l_.Cp);
    syn0_ = workspace.take<T>(a_.cell.N * l_.state_image());
    d_syn_ = workspace.take<T>(a_.cell.N * l_.state_image());
    scratch_ = workspace.take<NeuronScratch>(a_.threads);
    const int64_t rows = tasks_.most_together * task_size();
    const int64_t some_rows = rows_at_once() * l_.Wo * l_.Cp;
    for (int k = 0; k < a_.threads; ++k) {
      const NeuronScratch s{workspace.take<T>(rows), workspace.take<T>(some_rows)};
      if (scratch_) scratch_[k] = s;
    }
  }

  StepImages<T> images(int64_t t) const { return images_.images(t); }
  const T* d_gates(int64_t t, int64_t image) const { return images_.d_gates(t, image); }
  // Returns a task's rows of the gradient of mem, which the next step's convolution has computed.
  // `slot` counts the tasks that a thread works on together.
  T* mem_grad(int thread, int64_t slot) const {
    return scratch_[thread].mem_grad + slot * task_size();
  }

  void pack_vectors() { l_.write_thresholds(a_, threshold_); }

  // Clears borders and sums, and copies the first syn, channels-last.
  void clear(int64_t task) {
    const Sample p = sample(task);
    std::memset(threshold_sums_ + task * l_.Cp, 0, l_.Cp * sizeof(T));
    std::memset(bias_sums_ + task * 4 * l_.Cp, 0, 4 * l_.Cp * sizeof(T));
    const int64_t begin = tasks_.begin(task);
    images_.read_rows(a_.syn0, 0, p.n, begin, tasks_.end(task), state_row(syn0_, p, begin),
                      l_.Wo * l_.Cp);
    if (tasks_.begin(task) == 0) images_.clear_borders(p.image);
  }

  // Copies the gradients of the last step's states, or zeros.
  void start(int64_t task, int thread) {
    const Sample p = sample(task);
    const int64_t begin = tasks_.begin(task);
    const int64_t end = tasks_.end(task);
    const int64_t row = l_.Wo * l_.Cp;
    const auto read = [&](const View& v, T* dst) {
      if (v.data)
        images_.read_rows(v, a_.record ? p.steps - 1 : 0, p.n, begin, end, dst, row);
      else
        std::memset(dst, 0, (end - begin) * row * sizeof(T));
    };
    read(a_.grad_mem, mem_grad(thread, 0));
    read(a_.grad_syn, state_row(d_syn_, p, begin));
  }

  void rows(int64_t t, int64_t task, int thread, int64_t slot) {
    NeuronScratch s = scratch_[thread];
    s.mem_grad += slot * task_size();
    const Sample p = sample(task);
    const int64_t begin = tasks_.begin(task);
    const int64_t end = tasks_.end(task);
    const int64_t row = l_.Wo * l_.Cp;
    const bool last = t == p.steps - 1;
    if (a_.grad_weight) images_.read_x(a_.x, t, p.n, p.image, begin, end);
    if (a_.record && !last) {
      add_rows(a_.grad_mem, t, p.n, begin, end, s.mem_grad, s);
      add_rows(a_.grad_syn, t, p.n, begin, end, state_row(d_syn_, p, begin), s);
    }
    const bool spikes = a_.grad_spk.data && a_.cell.surrogate != Surrogate::none;
    if (!a_.cell.spiking) add_rows(a_.grad_spk, t, p.n, begin, end, s.mem_grad, s);
    for (int64_t h = begin; h < end; ++h) {
      if (last && spikes) recompute_mem(t, p, h, images_.mem_row(t + 1, p.image, h));
      if (t > 0) recompute_mem(t - 1, p, h, images_.mem_row(t, p.image, h));
    }
    if (t == 0 && a_.grad_weight)
      images_.read_rows(a_.mem0, 0, p.n, begin, end, images_.mem_row(t, p.image, begin),
                        l_.mem.row());
    if (spikes) spike(t, p, task, s);
    for (int64_t h = begin; h < end; ++h) step(t, p, h, task, s.mem_grad + (h - begin) * row);
    if (!images_.finite(bias_sums_ + task * 4 * l_.Cp, 4 * l_.Cp))
      images_.clear_empty_lanes(t, p.image, begin, end);
    if (t == 0 && a_.grad_syn0.data) write_rows(a_.grad_syn0, task, state_row(d_syn_, p, begin));
  }

  // Writes the gradient of a task's rows of a state to the caller's tensor.
  void write_rows(const View& v, int64_t task, const T* src) const {
    const int64_t begin = tasks_.begin(task);
    store_rows<S>(src, Pixels{l_.Wo, l_.Wo * l_.Cp, l_.Cp}, tasks_.end(task) - begin, a_.cell.C, v,
                  0, tasks_.sample(tasks_.image(task)), begin, [](R g, int64_t) { return g; });
  }

  // Sums the gradients of threshold and bias of one channel block over all tasks that have a step,
  // in the tasks' order.
  void reduce(int64_t cb) const {
    const int64_t count = tasks_.at(0).count;
    const auto total = [&](const T* sums, int64_t stride) {
      T sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += sums[k * stride];
      return sum;
    };
    const int64_t C = a_.cell.C;
    for (int64_t lane = 0; lane < VL && cb * VL + lane < C; ++lane) {
      const int64_t ch = cb * VL + lane;
      if (a_.grad_threshold)
        static_cast<T*>(a_.grad_threshold)[ch] = total(threshold_sums_ + ch, l_.Cp);
      for (int gate = 0; a_.grad_bias && gate < 4; ++gate)
        static_cast<T*>(a_.grad_bias)[gate * C + ch] =
            total(bias_sums_ + cb * kGates + gate * VL + lane, 4 * l_.Cp);
    }
  }

 private:
  struct NeuronScratch {
    T* mem_grad;  // (tasks of a group, rows, Wo, Cp)
    T* rows;      // (rows_at_once(), Wo, Cp)
  };

  int64_t task_size() const { return tasks_.most_rows() * l_.Wo * l_.Cp; }

  // Counts the rows that fill half of a 32 KiB L1.
  int64_t rows_at_once() const {
    const int64_t rows = 16384 / (l_.Wo * l_.Cp * int64_t(sizeof(T)));
    return rows < 1 ? 1 : rows < l_.Ho ? rows : l_.Ho;
  }

  struct Sample {
    int64_t n, image, steps;
  };
  Sample sample(int64_t task) const {
    const int64_t image = tasks_.image(task);
    return {tasks_.sample(image), image, tasks_.steps(task)};
  }
  T* state_row(T* states, const Sample& p, int64_t h) const {
    return states + l_.state_row(p.image, h);
  }

  // gates() returns a row of saved gates. load_gates() loads the gates of one vector of channels of
  // some pixels.
  const T* gates(int64_t t, int64_t n, int64_t h) const {
    return static_cast<const T*>(a_.saved_gates) + 4 * l_.state_row(t * a_.cell.N + n, h);
  }
  template <class N>
  Gates<typename N::R> load_gates(const T* from, typename N::Mask& reset) const {
    Gates<typename N::R> gates = N::load_gates(from, 4 * l_.Cp);
    reset = N::flagged(gates.o);
    gates.o = N::abs(gates.o);
    return gates;
  }
  // t = -1 asks for syn before the first step.
  const T* syn_after(int64_t t, const Sample& p, int64_t h) const {
    if (t < 0) return state_row(syn0_, p, h);
    return static_cast<const T*>(a_.saved_syn) + l_.state_row(t * a_.cell.N + p.n, h);
  }

  void add_rows(const View& v, int64_t t, int64_t n, int64_t begin, int64_t end, T* dst,
                const NeuronScratch& s) const {
    if (!v.data) return;
    const int64_t row = l_.Wo * l_.Cp;
    for (int64_t h = begin, stop; h < end; h = stop, dst += rows_at_once() * row) {
      stop = h + rows_at_once() < end ? h + rows_at_once() : end;
      images_.read_rows(v, t, n, h, stop, s.rows, row);
      for (int64_t k = 0; k < (stop - h) * row; k += VL)
        S::store(dst + k, S::load(dst + k) + S::load(s.rows + k));
    }
  }

  // Returns the tanh of the synaptic current before its quantisation.
  template <class N, class W = typename N::R>
  W tanh_syn(const Gates<W>& act, const T* syn, W syn_prev) const {
    if (a_.cell.num_levels == 0) return N::tanh(N::load(syn, l_.Cp));
    return N::tanh(Neuron<N>::next_syn(act, syn_prev));
  }

  // Computes mem after step t from the saved gates and syn.
  void recompute_mem(int64_t t, const Sample& p, int64_t h, T* out) const {
    const Cell& c = a_.cell;
    const T* gate = gates(t, p.n, h);
    const T* syn = syn_after(t, p, h);
    const T* syn_prev = syn_after(t - 1, p, h);
    each_neighbours<T, VL>(l_.Wo, [&](int64_t w, auto count) __attribute__((always_inline)) {
      using N = Neighbours<T, VL, decltype(count)::value>;
      for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
        const int64_t k = w * l_.Cp + ch;
        typename N::Mask reset;
        const auto act = load_gates<N>(gate + 4 * k, reset);
        auto mem =
            Neuron<N>::next_mem(act.o, tanh_syn<N>(act, syn + k, N::load(syn_prev + k, l_.Cp)));
        mem = Neuron<N>::after_reset(c.reset, mem, reset, N::repeat(threshold_ + ch));
        N::store(out + k, l_.Cp, quantised<N>(mem, a_));
      }
    });
  }

  // Adds the spikes' gradient to the rows of mem_grad.
  void spike(int64_t t, const Sample& p, int64_t task, const NeuronScratch& s) const {
    const Cell& c = a_.cell;
    const int64_t begin = tasks_.begin(task), row = l_.Wo * l_.Cp;
    T* sums = threshold_sums_ + task * l_.Cp;
    const T graded = spike_of<T>(a_);
    const int64_t first = begin / c.pool_h, last = tasks_.end(task) / c.pool_h;
    for (int64_t h = first; h < last; ++h) {
      const int64_t at = (h - first) % rows_at_once();  // among s.rows
      if (at == 0) {
        const int64_t stop = h + rows_at_once() < last ? h + rows_at_once() : last;
        pooled_rows(a_.grad_spk, t, p.n, h, stop, s.rows);
      }
      const T* const grads = s.rows + at * l_.Wp * l_.Cp;
      const int64_t top = (h * c.pool_h - begin) * row;
      const T* mem_after = images_.mem_row(t + 1, p.image, h * c.pool_h);
      const int64_t pooled = argmax_.row(t, p.n, h);
      const auto add = [&](int64_t w, auto count) __attribute__((always_inline)) {
        using N = Neighbours<T, VL, decltype(count)::value>;
        using W = typename N::R;
        for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
          const int64_t k = w * l_.Cp + ch, column = w * c.pool_w * l_.Cp + ch;
          T* const out = s.mem_grad + top + column;
          Mask where{};
          W mem;
          if constexpr (decltype(count)::value > 1) {
            mem = N::load(mem_after + column, l_.Cp);
          } else {
            if (c.pool == Pool::max) where = argmax_.get(pooled + k);
            mem = pooled_mem(mem_after + column, where);
          }
          const W slope = Neuron<N>::surrogate_gradient(
              c.surrogate, mem - N::repeat(threshold_ + ch), N::splat(T(c.surrogate_p0)),
              N::splat(T(c.surrogate_p1)));
          const W grad = slope * (N::load(grads + k, l_.Cp) * graded);
          S::store(sums + ch, S::load(sums + ch) - N::sum(grad));
          if (c.pool == Pool::none)
            N::store(out, l_.Cp, N::load(out, l_.Cp) + grad);
          else if constexpr (decltype(count)::value == 1)
            PoolWindow<M>::spread(c, grad, where, out, row, l_.Cp);
        }
      };
      if (c.pool == Pool::none)
        each_neighbours<T, VL>(l_.Wp, add);
      else
        for (int64_t w = 0; w < l_.Wp; ++w) add(w, Count<1>());
    }
  }

  // Returns the mem that the forward pass compared with the threshold. `mem` points to the window's
  // first pixel, and `where` is the index of the window's maximum.
  R pooled_mem(const T* mem, Mask where) const {
    const Cell& c = a_.cell;
    const int64_t row = l_.mem.row();
    if (c.pool == Pool::none) return S::load(mem);  // recompute_mem() has quantised mem
    return quantised<M>(c.pool == Pool::max ? PoolWindow<M>::at(c, mem, row, l_.Cp, where)
                                            : PoolWindow<M>::mean(c, mem, row, l_.Cp),
                        a_);
  }

  void pooled_rows(const View& v, int64_t t, int64_t n, int64_t begin, int64_t end, T* dst) const {
    load_rows<S>(v, t, n, begin, end - begin, a_.cell.C, dst, Pixels{l_.Wp, l_.Wp * l_.Cp, l_.Cp},
                 l_.Cp);
  }

  // Does the reset and the LSTM of one row.
  void step(int64_t t, const Sample& p, int64_t h, int64_t task, const T* mem_grad) const {
    const Cell& c = a_.cell;
    const T* gate = gates(t, p.n, h);
    const T* syn = syn_after(t, p, h);
    const T* syn_prev = syn_after(t - 1, p, h);
    T* d_syn = state_row(d_syn_, p, h);
    T* out = images_.d_gates_row(t, p.image, h);
    T* bias_sums = bias_sums_ + task * 4 * l_.Cp;
    T* threshold_sums = threshold_sums_ + task * l_.Cp;
    for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
      R bias[4] = {R{}, R{}, R{}, R{}}, threshold{};
      each_neighbours<T, VL>(l_.Wo, [&](int64_t w, auto count) __attribute__((always_inline)) {
        using N = Neighbours<T, VL, decltype(count)::value>;
        using W = typename N::R;
        const int64_t k = w * l_.Cp + ch;
        typename N::Mask reset;
        const Gates<W> act = load_gates<N>(gate + 4 * k, reset);
        const W grad = N::load(mem_grad + k, l_.Cp), before = N::load(syn_prev + k, l_.Cp);
        const NeuronGrad<W> d =
            Neuron<N>::backward(c.reset, act, before, tanh_syn<N>(act, syn + k, before), reset,
                                grad, N::load(d_syn + k, l_.Cp));
        if (c.reset == Reset::subtract) threshold -= N::sum(N::where(reset, grad, W{}));
        N::store(d_syn + k, l_.Cp, d.syn_prev);
        N::store_gates(out + 4 * k, 4 * l_.Cp, d.pre);
        const W pre[4] = {d.pre.i, d.pre.f, d.pre.o, d.pre.g};
        for (int v = 0; v < 4; ++v) bias[v] += N::sum(pre[v]);
      });
      for (int v = 0; v < 4; ++v) {
        T* sum = bias_sums + 4 * ch + v * VL;
        S::store(sum, S::load(sum) + bias[v]);
      }
      S::store(threshold_sums + ch, S::load(threshold_sums + ch) + threshold);
    }
  }

  const BackwardArgs& a_;
  const Layout<T, VL>& l_;
  const RowTasks& tasks_;
  Argmax<M> argmax_;
  StepBuffers<T, VL> images_;
  T *threshold_ = nullptr, *threshold_sums_ = nullptr, *bias_sums_ = nullptr;
  T *syn0_ = nullptr, *d_syn_ = nullptr;
  NeuronScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
