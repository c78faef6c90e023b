// From the gate sums of a tile to the neurons' results: LSTM update, reset, quantisation and spike.
// All forward kernels share this; they differ in how they sum the gate sums. If the cell pools,
// fire.cuh forms the spikes from the whole image's mem.
//
// Our own images are channels-last with Cp channels, C rounded up to a multiple of 8: every pixel
// starts at a multiple of 16 bytes, and vectors need no tail. Channels from C on hold 0.
//   gates         (T, N, Ho, Wo, 4, Cp)  activated; the sign of the output gate says "was reset"
//   syn, mem      (N, Ho, Wo, Cp)
#pragma once

#include "tile.cuh"

namespace snnlstm::cuda {

// How spikes follow from mem.
struct Fire {
  bool spiking = true;  // false: spk, if present, gets mem itself
  int C = 0, Hp = 0, Wp = 0;
  Pool pool = Pool::none;
  int pool_h = 1, pool_w = 1;
  int num_levels = 0;
  const void* levels = nullptr;     // (num_levels,) in the compute type
  const void* threshold = nullptr;  // (C,) or, with stride 0, one number
  int64_t threshold_stride = 0;
  const void* graded = nullptr;  // one number
  Tensor spk;  // (1, N, C, Hp, Wp); threshold, graded factor and bias have the same type
  void* argmax = nullptr;  // max pooling in training: PassArgs::argmax of the step, (N, C, Hp, Wp)
  const int64_t* lengths = nullptr;  // (N,) steps of each sample, or null
  int step = 0;                      // number of the step

  // Says whether the step comes after sample n's last one, and is_last() whether it is that one.
  SNNLSTM_DEVICE bool is_padded(int n) const {
    return lengths != nullptr && int(lengths[n]) <= step;
  }
  SNNLSTM_DEVICE bool is_last(int n) const {
    return lengths != nullptr && int(lengths[n]) == step + 1;
  }
  SNNLSTM_DEVICE int64_t pooled_index(int64_t image, int c, int y, int x) const {
    return image * (int64_t(C) * Hp * Wp) + (c * Hp + y) * Wp + x;
  }
  SNNLSTM_DEVICE bool wide_argmax() const { return pool_h * pool_w > 256; }
};

// The arguments that the neurons' kernels of both passes share.
struct NeuronStep {
  int C = 0, Cp = 0, Ho = 0, Wo = 0;
  Reset reset = Reset::none;
  Fire fire;  // backward: spk is the gradient of the spikes, or absent
};

struct NeuronForward : NeuronStep {
  const void* bias = nullptr;  // (4C,)
  Tensor syn_in, mem_in;       // states before the step; mem_in is for the reset
  Tensor syn_out, mem_out;     // the caller's
  Tensor own_syn, own_mem;     // ours, instead of the caller's or beside them
  Tensor gates_out;            // in training
};

// What a kernel that multiplies Elements knows: gates have that type. States are float32 if
// Elements are floats.
template <class Element>
using KnownStates = Known<std::conditional_t<sizeof(Element) == 4, float, AnyType>, Access::scalar>;
template <class Element>
using KnownGates = Known<Element, Access::channels>;

// Moves every value one place towards v[0][0], whose value is lost, and puts `last` at the end.
template <int CH, class R>
SNNLSTM_DEVICE void shift_values(R (&v)[2][CH], R last) {
  R* flat = &v[0][0];
#pragma unroll
  for (int i = 0; i + 1 < 2 * CH; ++i) flat[i] = flat[i + 1];
  flat[2 * CH - 1] = last;
}

// Replaces each value of v by body(value, the others' values). The loop is not unrolled, so that
// the code holds the body once: quantisers and most surrogates are long and rare. A loop cannot
// index registers: the values pass through [0][0]. The others do not change.
template <int CH, class R, class Body, class... Others>
SNNLSTM_DEVICE void for_each_value(R (&v)[2][CH], Body&& body, Others&... others) {
#pragma unroll 1
  for (int k = 0; k < 2 * CH; ++k) {
    shift_values(v, body(v[0][0], others[0][0]...));
    (shift_values(others, others[0][0]), ...);
  }
}

template <class R>
SNNLSTM_DEVICE R quantised(const Fire& f, R x) {
  if (f.num_levels == 0) return x;
  const DType type = f.spk.type;
  return rounded(type, quantise(rounded(type, x), static_cast<const R*>(f.levels), f.num_levels));
}

template <class R>
SNNLSTM_DEVICE R threshold_of(const Fire& f, int c) {
  return f.spiking && c < f.C ? read<R>(f.threshold, f.spk.type, c * f.threshold_stride) : R(1);
}

template <class R>
SNNLSTM_DEVICE R graded_of(const Fire& f) {
  return fault(Fault::no_graded_factor) ? R(1) : read<R>(f.graded, f.spk.type, 0);
}

template <class R>
SNNLSTM_DEVICE R spike_of(const Fire& f, R mem, R threshold) {
  const R graded = graded_of<R>(f);
  return Neuron<Math<R>>::fires(mem, threshold) ? graded : R(0) * graded;
}

// Calls f(i, j, number) for the elements of a pooling window, row by row.
template <class F>
SNNLSTM_DEVICE void for_each_element(const Fire& fire, F&& f) {
  int number = 0;
  for (int i = 0; i < fire.pool_h; ++i)
    for (int j = 0; j < fire.pool_w; ++j, ++number) f(i, j, number);
}

// at(i, j): element (i, j) of a window.
template <class R, class At>
SNNLSTM_DEVICE R mean_of_window(const Fire& f, At&& at) {
  R sum = 0;
  for_each_element(f, [&](int i, int j, int) { sum += at(i, j); });
  return rounded(f.spk.type, sum / R(f.pool_h * f.pool_w));
}

// Returns the mem that is compared with the threshold: pooled, or at(0, 0) itself. In training it
// keeps the index of a window's maximum, at f.pooled_index(...) = pooled. NaN is the maximum.
template <class R, class At>
SNNLSTM_DEVICE R thresholded(const Fire& f, int64_t pooled, At&& at) {
  if (f.pool == Pool::none) return at(0, 0);
  if (f.pool == Pool::avg) return quantised(f, mean_of_window<R>(f, at));
  R largest = at(0, 0);
  for_each_element(f, [&](int i, int j, int) {
    const R v = at(i, j);
    if (v > largest || v != v) largest = v;
  });
  if (f.argmax != nullptr) {
    const R unit = last_place(f.spk.type, largest);
    int where = -1;
    for_each_element(f, [&](int i, int j, int number) {
      if (where < 0 && is_largest(R(at(i, j)), largest, unit)) where = number;
    });
    if (f.wide_argmax())
      static_cast<int32_t*>(f.argmax)[pooled] = where & (fault(Fault::narrow_argmax) ? 255 : -1);
    else
      static_cast<uint8_t*>(f.argmax)[pooled] = uint8_t(where);
  }
  return quantised(f, largest);
}

// The block's channels are c0 ... c0 + channels - 1, channels a power of two. OfStates, OfGates:
// what is known about the states and the saved gates.
template <class R, class OfStates = Unknown, class OfGates = Unknown>
class ForwardTile {
 public:
  using N = Neuron<Math<R>>;

  // vectors: (5, channels) in shared memory: the biases of i, f, o, g and the threshold.
  SNNLSTM_DEVICE ForwardTile(const NeuronForward& p, const Tiling& tiling, const BlockPlace& block,
                             int c0, int channels, R* vectors)
      : p_(p), tiling_(tiling), block_(block), c0_(c0), channels_(channels), vectors_(vectors) {}

  // A barrier must follow.
  SNNLSTM_DEVICE void load_vectors() const {
    for (int i = int(threadIdx.x); i < 5 * channels_; i += int(blockDim.x)) {
      const int row = i / channels_, c = c0_ + (i & (channels_ - 1));
      R value = row == 4 ? R(1) : R(0);
      if (c < p_.C && row == 4)
        value = threshold_of<R>(p_.fire, c);
      else if (c < p_.C && p_.bias != nullptr)
        value = read<R>(p_.bias, p_.fire.spk.type, row * p_.C + c);
      vectors_[i] = value;
    }
  }

  // Runs the step for pixels m, m + 1 and CH of the block's channels, from `first` on.
  // sum[gate][pixel][channel]: the gate sums.
  template <int CH>
  SNNLSTM_DEVICE void patch(int m, int first, R (&sum)[4][2][CH]) const {
    const int c0 = c0_ + first;
    const PixelPair at = pixel_pair(tiling_, block_, m, p_.Ho, p_.Wo);
    R syn[2][CH], mem[2][CH] = {};
    load_patch<OfStates>(p_.syn_in, at, c0, syn);
    const bool resets = p_.reset != Reset::none && !fault(Fault::no_reset);
    if (resets) load_patch<OfStates>(p_.mem_in, at, c0, mem);
    R threshold[CH];
    unrolled<CH>([&](int ch) {
      const R* vector = vectors_ + first + ch;
      const Gates<R> bias = {vector[0], vector[channels_], vector[2 * channels_],
                             vector[3 * channels_]};
      threshold[ch] = vector[4 * channels_];
      unrolled<2>([&](int px) {
        const int i = fault(Fault::swapped_gates) ? 1 : 0;
        const Gates<R> a = N::activate({sum[i][px][ch] + bias.i, sum[1 - i][px][ch] + bias.f,
                                        sum[2][px][ch] + bias.o, sum[3][px][ch] + bias.g});
        const bool reset = resets && N::fires(mem[px][ch], threshold[ch]);
        syn[px][ch] = N::next_syn(a, syn[px][ch]);
        mem[px][ch] = N::after_reset(p_.reset, N::next_mem(a.o, Math<R>::tanh(syn[px][ch])), reset,
                                     threshold[ch]);
        sum[0][px][ch] = a.i;
        sum[1][px][ch] = a.f;
        sum[2][px][ch] = flagged(a.o, reset);
        sum[3][px][ch] = a.g;
      });
    });
    if (p_.gates_out.present())
      unrolled<4>(
          [&](int gate) { store_patch<Ours<OfGates>>(p_.gates_out, at, c0, sum[gate], gate); });
    if (p_.fire.num_levels > 0) {
      const auto nearest = [&](R x) { return quantised(p_.fire, x); };
      for_each_value(syn, nearest);
      for_each_value(mem, nearest);
    }
    if (std::is_same_v<typename OfStates::Type, AnyType>) {
      const DType type = p_.fire.spk.type;
      unrolled<2, CH>([&](int px, int ch) { mem[px][ch] = rounded(type, mem[px][ch]); });
    }
    if (p_.own_syn.present()) store_patch<Ours<OfStates>>(p_.own_syn, at, c0, syn);
    if (p_.own_mem.present()) store_patch<Ours<OfStates>>(p_.own_mem, at, c0, mem);
    if (p_.syn_out.present()) store_patch<OfStates>(p_.syn_out, at, c0, syn);
    if (p_.mem_out.present()) store_patch<OfStates>(p_.mem_out, at, c0, mem);
    if (p_.fire.pool != Pool::none) return;
    if (!p_.fire.spiking) {
      if (p_.fire.spk.present()) store_patch<OfStates>(p_.fire.spk, at, c0, mem);
      return;
    }
    R spk[2][CH];
    unrolled<CH, 2>(
        [&](int ch, int px) { spk[px][ch] = spike_of(p_.fire, mem[px][ch], threshold[ch]); });
    store_patch<OfStates>(p_.fire.spk, at, c0, spk);
  }

 private:
  const NeuronForward& p_;
  const Tiling& tiling_;
  const BlockPlace& block_;
  int c0_, channels_;
  R* vectors_;
};

}  // namespace snnlstm::cuda
