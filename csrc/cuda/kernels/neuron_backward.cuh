// The neurons of the backward pass of one time step: spike, pooling, reset, LSTM. All backward
// kernels share this; they differ in how they sum the recurrent gradient of mem. The forward pass
// has saved the activated gates and syn before the step, from which this part recomputes mem.
//   d_gates         (T, N, Ho, Wo, 4, Cp)  gradient of the gates before activation
//   mem_for_weight  (T, N, Ho, Wo, Cp)     mem after the step, for the weight gradient
//   d_syn           (N, Ho, Wo, Cp)        in the compute type, passed from step to step
#pragma once

#include "neuron_forward.cuh"

namespace snnlstm::cuda {

struct NeuronBackward : NeuronStep {
  Surrogate surrogate = Surrogate::none;
  double p0 = 0, p1 = 0;
  Tensor gates;  // as the forward pass has saved them
  Tensor syn_prev;
  Tensor grad_syn, grad_mem;   // the caller's, for the states after this step
  bool at_ends = false;        // these are for the states after each sample's own last step
  Tensor spikes_in;            // if the cell pools: gradient of mem through the spikes, by fire.cuh
  Tensor d_syn_in, d_syn_out;  // may be the same
  Tensor grad_syn0;            // if present, replaces d_syn_out
  Tensor d_gates, mem_for_weight;
  // (blocks of pixels, columns * channels): the threshold's gradient, summed over the block's
  // pixels and over the launches so far. Null if it is not needed.
  void* sums = nullptr;
  bool first_sums = true;  // the launch sets the sums instead of adding to them
};

// The sums of the threshold's gradient of a row of warps: (channels,) in shared memory, over the
// lanes that differ in the three bits from `bit` on. set: overwrites the old sums.
template <class R>
struct RowSums {
  R* sums;
  int bit;
  bool set;
};

template <class R, class OfStates = Unknown, class OfGates = Unknown>
class BackwardTile {
  using OwnImage = Known<R, Access::channels>;  // images in the compute type

 public:
  using N = Neuron<Math<R>>;

  // vectors: (channels,) thresholds in shared memory.
  SNNLSTM_DEVICE BackwardTile(const NeuronBackward& p, const Tiling& tiling,
                              const BlockPlace& block, int c0, int channels, R* vectors)
      : p_(p), tiling_(tiling), block_(block), c0_(c0), channels_(channels), vectors_(vectors) {}

  SNNLSTM_DEVICE void load_vectors() const {
    for (int i = int(threadIdx.x); i < channels_; i += int(blockDim.x))
      vectors_[i] = threshold_of<R>(p_.fire, c0_ + i);
  }

  // Says whether the block's step comes after its sample's last one. Then the gradients are
  // skipped, but a launch that sets the threshold's sums sets them to 0.
  SNNLSTM_DEVICE bool is_padded() const {
    const bool padded = p_.fire.is_padded(block_.n);
    if (padded && p_.first_sums) write_sums(nullptr, 0);
    return padded;
  }

  // Returns the gradient that a spike passes to the mem that it came from. u: mem - threshold.
  SNNLSTM_DEVICE R spike_gradient(R u, R grad) const {
    return N::surrogate_gradient(p_.surrogate, u, R(p_.p0), R(p_.p1)) *
           (grad * graded_of<R>(p_.fire));
  }

  // Returns one neuron's mem after the step.
  SNNLSTM_DEVICE R mem_at(int c, int y, int x, R threshold) const {
    const void* gates = image_of(p_.gates, block_.t, block_.n);
    R gate[4];
    unrolled<4>([&](int k) {
      gate[k] = read<R>(gates, p_.gates.type, offset(p_.gates, c, y, x) + k * p_.gates.plane);
    });
    const R syn_prev = read<R>(image_of(p_.syn_prev, block_.t, block_.n), p_.syn_prev.type,
                               offset(p_.syn_prev, c, y, x));
    const Gates<R> a = {gate[0], gate[1], Math<R>::abs(gate[2]), gate[3]};
    const R mem = N::next_mem(a.o, Math<R>::tanh(N::next_syn(a, syn_prev)));
    return rounded(
        p_.syn_prev.type,
        quantised(p_.fire, N::after_reset(p_.reset, mem, is_flagged(gate[2]), threshold)));
  }

  // Runs the step backward for pixels m, m + 1 and 4 of the block's channels, from `first` on.
  // recurrent(d_mem) writes the thread's gradients of mem, d_mem[pixel][channel], which are 0
  // before.
  template <class Recurrent>
  SNNLSTM_DEVICE void patch(int m, int first, Recurrent&& recurrent, const RowSums<R>& sums) const {
    Patch p;
    load(p, m, first);
    if (p_.mem_for_weight.present())
      store_patch<Ours<OfGates>>(p_.mem_for_weight, p.at, p.c0, p.mem);
    R d_syn[2][4] = {}, d_mem[2][4] = {}, spike[2][4] = {}, d_threshold[2][4];
    from_later(p, recurrent, d_syn, d_mem);
    from_spikes(p, spike);
    differentiate(p, spike, d_mem, d_syn, d_threshold);
    if (p_.d_gates.present())
      unrolled<4>([&](int k) { store_patch<Ours<OfGates>>(p_.d_gates, p.at, p.c0, p.gate[k], k); });
    if (p_.grad_syn0.present())
      store_patch<OfStates>(p_.grad_syn0, p.at, p.c0, d_syn);
    else if (p_.d_syn_out.present())
      store_patch<OwnImage>(p_.d_syn_out, p.at, p.c0, d_syn);
    if (p_.sums == nullptr) return;
    R sum[4];
    unrolled<4>([&](int ch) { sum[ch] = d_threshold[0][ch] + d_threshold[1][ch]; });
    reduce(sum, first, sums);
  }

  // Calls put(i, j, gradient) with the gradient that element (i, j) of a window gets through its
  // spike. at(i, j): the element's mem; y, x: the window's row and column.
  template <class At, class Put>
  SNNLSTM_DEVICE void spread_window(int c, int y, int x, R threshold, At&& at, Put&& put) const {
    const Fire& f = p_.fire;
    R mem = 0;
    int where = 0;
    if (f.pool == Pool::avg) {
      mem = mean_of_window<R>(f, at);
    } else {
      const int64_t pooled = f.pooled_index(block_.n, c, y, x);
      where = f.wide_argmax() ? static_cast<const int32_t*>(f.argmax)[pooled]
                              : static_cast<const uint8_t*>(f.argmax)[pooled];
      for_each_element(f, [&](int i, int j, int number) {
        if (number == where) mem = at(i, j);
      });
    }
    mem = quantised(f, mem);
    R grad = read<R>(image_of(f.spk, block_.t, block_.n), f.spk.type, offset(f.spk, c, y, x));
    grad = spike_gradient(mem - threshold, grad);
    if (f.pool == Pool::avg) grad /= R(f.pool_h * f.pool_w);
    for_each_element(f, [&](int i, int j, int number) {
      put(i, j, f.pool == Pool::avg || number == where ? grad : R(0));
    });
  }

  // Adds the rows' sums up in global memory. A barrier must come before.
  SNNLSTM_DEVICE void write_sums(const R* row_sums, int rows) const {
    if (p_.sums == nullptr) return;
    const int total = tiling_.columns * channels_;  // channels of all column blocks
    R* out = static_cast<R*>(p_.sums) + int64_t(block_.tile) * total + c0_;
    for (int i = int(threadIdx.x); i < channels_; i += int(blockDim.x)) {
      R value = p_.first_sums ? R(0) : out[i];
      for (int row = 0; row < rows; ++row) value += row_sums[row * channels_ + i];
      out[i] = value;
    }
  }

 private:
  // What a thread holds of the step: 2 pixels x 4 channels, from channel c0 of all.
  struct Patch {
    PixelPair at;
    int c0;
    R gate[4][2][4], syn_prev[2][4], tanh_syn[2][4], mem[2][4], threshold[4];
  };

  // Loads what was saved, and computes mem after the step from it.
  SNNLSTM_DEVICE void load(Patch& p, int m, int first) const {
    p.at = pixel_pair(tiling_, block_, m, p_.Ho, p_.Wo);
    p.c0 = c0_ + first;
    unrolled<4>([&](int k) { load_patch<Ours<OfGates>>(p_.gates, p.at, p.c0, p.gate[k], k); });
    load_patch<OfStates>(p_.syn_prev, p.at, p.c0, p.syn_prev);
    load_vector(vectors_ + first, p.threshold);
    unrolled<4, 2>([&](int ch, int px) {
      const Gates<R> a = activated(p.gate, px, ch);
      p.tanh_syn[px][ch] = Math<R>::tanh(N::next_syn(a, p.syn_prev[px][ch]));
      p.mem[px][ch] = N::after_reset(p_.reset, N::next_mem(a.o, p.tanh_syn[px][ch]),
                                     is_flagged(p.gate[2][px][ch]), p.threshold[ch]);
    });
    if (p_.fire.num_levels > 0) for_each_value(p.mem, [&](R x) { return quantised(p_.fire, x); });
    if (std::is_same_v<typename OfStates::Type, AnyType>) {
      const DType type = p_.syn_prev.type;
      unrolled<2, 4>([&](int px, int ch) { p.mem[px][ch] = rounded(type, p.mem[px][ch]); });
    }
  }

  // Adds the gradients of syn and mem from the next step, and from the caller.
  template <class Recurrent>
  SNNLSTM_DEVICE void from_later(const Patch& p, Recurrent&& recurrent, R (&d_syn)[2][4],
                                 R (&d_mem)[2][4]) const {
    const bool starts = p_.fire.is_last(block_.n);  // nothing comes from later steps
    if (p_.d_syn_in.present() && !starts) load_patch<OwnImage>(p_.d_syn_in, p.at, p.c0, d_syn);
    if (!starts) recurrent(d_mem);
    if (starts || !p_.at_ends)
      add_patch(p_.grad_mem, p.at, p.c0, d_mem), add_patch(p_.grad_syn, p.at, p.c0, d_syn);
    if (!p_.fire.spiking) add_patch(p_.fire.spk, p.at, p.c0, d_mem);
  }

  // Writes the gradients of mem through the spikes. Without pooling p.mem becomes mem - threshold.
  SNNLSTM_DEVICE void from_spikes(Patch& p, R (&spike)[2][4]) const {
    if (p_.spikes_in.present()) {
      load_patch<OwnImage>(p_.spikes_in, p.at, p.c0, spike);
    } else if (p_.fire.spk.present() && p_.surrogate != Surrogate::none) {
      unrolled<2, 4>([&](int px, int ch) { p.mem[px][ch] -= p.threshold[ch]; });
      load_patch<OfStates>(p_.fire.spk, p.at, p.c0, spike);
      if (p_.surrogate == Surrogate::atan) {
        const R graded = graded_of<R>(p_.fire);
        unrolled<2, 4>([&](int px, int ch) {
          spike[px][ch] =
              N::surrogate_gradient(Surrogate::atan, p.mem[px][ch], R(p_.p0), R(p_.p1)) *
              (spike[px][ch] * graded);
        });
      } else {
        const auto gradient = [&](R grad, R u) { return spike_gradient(u, grad); };
        for_each_value(spike, gradient, p.mem);
      }
    }
  }

  // p.gate becomes the gradients of the gates before activation, d_syn those of syn before the
  // step.
  SNNLSTM_DEVICE void differentiate(Patch& p, const R (&spike)[2][4], const R (&d_mem)[2][4],
                                    R (&d_syn)[2][4], R (&d_threshold)[2][4]) const {
    unrolled<2>([&](int px) {
      // Pixels after the last whole window are in no window.
      const bool pooled = p_.fire.pool == Pool::none || (p.at.y[px] < p_.fire.Hp * p_.fire.pool_h &&
                                                         p.at.x[px] < p_.fire.Wp * p_.fire.pool_w);
      unrolled<4>([&](int ch) {
        const bool real = pooled && p.at.valid[px] && p.c0 + ch < p_.C;
        const R through_spike = real ? spike[px][ch] : R(0);
        const R grad = p.at.valid[px] ? d_mem[px][ch] + through_spike : R(0);
        const Gates<R> a = activated(p.gate, px, ch);
        const bool reset = is_flagged(p.gate[2][px][ch]);
        const NeuronGrad<R> d = N::backward(p_.reset, a, p.syn_prev[px][ch], p.tanh_syn[px][ch],
                                            reset, grad, d_syn[px][ch]);
        d_syn[px][ch] = d.syn_prev;
        p.gate[0][px][ch] = d.pre.i;
        p.gate[1][px][ch] = d.pre.f;
        p.gate[2][px][ch] = d.pre.o;
        p.gate[3][px][ch] = d.pre.g;
        d_threshold[px][ch] = -through_spike - (p_.reset == Reset::subtract && reset ? grad : R(0));
      });
    });
  }

  // Sums over 8 lanes. The first two exchanges each halve the channels that a lane keeps.
  SNNLSTM_DEVICE void reduce(const R (&sum)[4], int first, const RowSums<R>& to) const {
    const int bit = to.bit;
    const bool upper = (int(threadIdx.x) & bit) != 0;
    const bool odd = (int(threadIdx.x) & 2 * bit) != 0;
    R two[2];
    unrolled<2>([&](int ch) {
      const R mine = upper ? sum[2 + ch] : sum[ch];
      const R other = upper ? sum[ch] : sum[2 + ch];
      two[ch] = mine + __shfl_xor_sync(full_warp, other, bit);
    });
    const R mine = odd ? two[1] : two[0];
    const R other = odd ? two[0] : two[1];
    R one = mine + __shfl_xor_sync(full_warp, other, 2 * bit);
    one += __shfl_xor_sync(full_warp, one, 4 * bit);
    if ((int(threadIdx.x) & 4 * bit) != 0) return;
    R& out = to.sums[first + (upper ? 2 : 0) + (odd ? 1 : 0)];
    out = to.set ? one : out + one;
  }
  // Adds the caller's tensor to v, if there is one.
  SNNLSTM_DEVICE static void add_patch(const Tensor& a, const PixelPair& at, int c0, R (&v)[2][4]) {
    if (!a.present()) return;
    R more[2][4];
    load_patch<OfStates>(a, at, c0, more);
    unrolled<2, 4>([&](int px, int ch) { v[px][ch] += more[px][ch]; });
  }
  SNNLSTM_DEVICE static Gates<R> activated(const R (&gate)[4][2][4], int px, int ch) {
    return {gate[0][px][ch], gate[1][px][ch], Math<R>::abs(gate[2][px][ch]), gate[3][px][ch]};
  }

  const NeuronBackward& p_;
  const Tiling& tiling_;
  const BlockPlace& block_;
  int c0_, channels_;
  R* vectors_;
};

}  // namespace snnlstm::cuda
