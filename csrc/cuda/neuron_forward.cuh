// What happens to the gates of a tile: the LSTM update, reset, quantisation, pooling and spike.
// Shared by all forward kernels, which differ in how they come by the gates.
//
// Our own images are channels-last with Cp channels, C rounded up to a multiple of 8, so that every
// pixel starts at a multiple of 16 bytes and vectors never need a tail; channels from C on hold 0.
//   gates         (T, N, Ho, Wo, 4, Cp)  activated, the sign of the output gate says "was reset"
//   gate sums     (T, N, Ho, Wo, 4, Cp)  the input half of the gates, before activation and bias
//   syn, mem      (N, Ho, Wo, Cp)
#pragma once

#include "tile.cuh"

namespace snnlstm::cuda {

// What the threshold looks at, and what becomes of it.
struct Fire {
  int C = 0, Hp = 0, Wp = 0;
  Pool pool = Pool::none;
  int pool_h = 1, pool_w = 1;
  int num_levels = 0;
  const void* levels = nullptr;     // (num_levels,) in the compute type
  const void* threshold = nullptr;  // (C,) or, with stride 0, one number
  int64_t threshold_stride = 0;
  double graded = 1;
  Tensor spk;  // (T, N, C, Hp, Wp)
};

struct NeuronForward {
  int C = 0, Cp = 0, Ho = 0, Wo = 0;
  Reset reset = Reset::none;
  Fire fire;
  bool fires = true;           // else a second kernel fires (pooling across tiles, inhibition)
  const void* bias = nullptr;  // (4C,)
  Image sums_in;               // gate sums to add, or absent
  Image sums_out;              // present: store the gate sums and do nothing else
  Tensor syn_in, mem_in;       // states before the step; mem_in is read for the reset alone
  Tensor syn_out, mem_out;     // the caller's
  Image syn_keep, mem_keep;    // ours
  Image gates_out;             // training
};

template <class S>
SNNLSTM_DEVICE RealOf<S> quantised(const Fire& f, RealOf<S> x) {
  if (f.num_levels == 0) return x;
  return rounded<S>(quantise(rounded<S>(x), static_cast<const RealOf<S>*>(f.levels), f.num_levels));
}

template <class S>
SNNLSTM_DEVICE RealOf<S> threshold_of(const Fire& f, int c) {
  return c < f.C ? to_real(static_cast<const S*>(f.threshold)[c * f.threshold_stride])
                 : RealOf<S>(1);
}

template <class S>
SNNLSTM_DEVICE RealOf<S> spike_of(const Fire& f, RealOf<S> mem, RealOf<S> threshold) {
  const RealOf<S> graded = RealOf<S>(f.graded);
  return Neuron<Math<RealOf<S>>>::fires(mem, threshold) ? graded : RealOf<S>(0) * graded;
}

// A window of mem, pooled as torch.nn.functional does: in max pooling a NaN wins, of equals the
// first. at(i, j): element (i, j) of the window. where: the number of the maximum's place.
template <class S, class At>
SNNLSTM_DEVICE RealOf<S> pooled(const Fire& f, At&& at, int& where) {
  using R = RealOf<S>;
  R value = 0;
  where = 0;
  if (f.pool == Pool::avg) {
    for (int i = 0; i < f.pool_h; ++i)
      for (int j = 0; j < f.pool_w; ++j) value += at(i, j);
    value = rounded<S>(value / R(f.pool_h * f.pool_w));
  } else {
    value = at(0, 0);
    for (int i = 0; i < f.pool_h; ++i)
      for (int j = 0; j < f.pool_w; ++j) {
        const R v = at(i, j);
        if (v > value || v != v) value = v, where = i * f.pool_w + j;
      }
  }
  return quantised<S>(f, value);
}

// The mem of a tile, for pooling: [channel][pixel], each row padded against bank conflicts.
template <class R>
struct MemTile {
  R* data = nullptr;
  int pitch = 0;  // even

  SNNLSTM_DEVICE R& at(int channel, int pixel) const { return data[channel * pitch + pixel]; }
};

// S: type of the caller's tensors and of the states; G: of everything that has gates.
template <class S, class G>
class ForwardTile {
 public:
  using R = RealOf<S>;
  using N = Neuron<Math<R>>;

  SNNLSTM_DEVICE ForwardTile(const NeuronForward& p, const Tiling& tiling, const Block& block,
                             MemTile<R> mem_tile)
      : p_(p), tiling_(tiling), block_(block), mem_tile_(mem_tile) {}

  // Pixels m, m + 1 and channels c0 ... c0 + CH - 1. sum[gate][pixel][channel].
  template <int CH>
  SNNLSTM_DEVICE void patch(int m, int c0, int tile_channel, R (&sum)[4][2][CH]) const {
    const Place at = place_of(tiling_, block_, m, p_.Ho, p_.Wo);
    if (p_.sums_out.present()) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) store_patch<R>(p_.sums_out, at, c0, sum[gate], gate);
      return;
    }
    R syn[2][CH], mem[2][CH] = {};
    load_patch<S>(p_.syn_in, at, c0, syn);
    const bool resets = p_.reset != Reset::none && !fault(Fault::missing_reset);
    if (resets) load_patch<S>(p_.mem_in, at, c0, mem);
    if (p_.sums_in.present()) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        R more[2][CH];
        load_patch<R>(p_.sums_in, at, c0, more, gate);
#pragma unroll
        for (int px = 0; px < 2; ++px)
#pragma unroll
          for (int ch = 0; ch < CH; ++ch) sum[gate][px][ch] += more[px][ch];
      }
    }
#pragma unroll
    for (int ch = 0; ch < CH; ++ch) {
      const int c = c0 + ch;
      const R threshold = threshold_of<S>(p_.fire, c);
      const Gates<R> bias = {bias_of(0, c), bias_of(1, c), bias_of(2, c), bias_of(3, c)};
#pragma unroll
      for (int px = 0; px < 2; ++px) {
        const int i = fault(Fault::swapped_gates) ? 1 : 0;
        const Gates<R> a = N::activate({sum[i][px][ch] + bias.i, sum[1 - i][px][ch] + bias.f,
                                        sum[2][px][ch] + bias.o, sum[3][px][ch] + bias.g});
        const bool reset = resets && N::fires(mem[px][ch], threshold);
        syn[px][ch] = N::next_syn(a, syn[px][ch]);
        mem[px][ch] = N::after_reset(
            p_.reset, N::next_mem(a.o, Math<R>::tanh(syn[px][ch])), reset, threshold);
        sum[0][px][ch] = a.i;
        sum[1][px][ch] = a.f;
        sum[2][px][ch] = flagged(a.o, reset);
        sum[3][px][ch] = a.g;
      }
    }
    if (p_.gates_out.present()) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) store_patch<G>(p_.gates_out, at, c0, sum[gate], gate);
    }
    if (p_.fire.num_levels > 0) {
      for_each_value(syn, [&](R x, int, int) { return quantised<S>(p_.fire, x); });
      for_each_value(mem, [&](R x, int, int) { return quantised<S>(p_.fire, x); });
    }
    if (p_.syn_keep.present()) store_patch<S>(p_.syn_keep, at, c0, syn);
    if (p_.mem_keep.present()) store_patch<S>(p_.mem_keep, at, c0, mem);
    const bool pools = p_.fire.pool != Pool::none;
    if (p_.fires && pools) {
#pragma unroll
      for (int ch = 0; ch < CH; ++ch) {
        const R pair[2] = {rounded<S>(mem[0][ch]), rounded<S>(mem[1][ch])};
        store_vector<R>(&mem_tile_.at(tile_channel + ch, m), pair);
      }
    }
    // The caller's tensors, in one loop: the code that knows all layouts is there once.
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      const Tensor& out = k == 0 ? p_.syn_out : k == 1 ? p_.mem_out : p_.fire.spk;
      const bool wanted = k < 2 ? out.present() : p_.fires && !pools;
      if (!wanted) continue;
      R v[2][CH];
#pragma unroll
      for (int ch = 0; ch < CH; ++ch)
#pragma unroll
        for (int px = 0; px < 2; ++px) {
          const R m_now = rounded<S>(mem[px][ch]);
          v[px][ch] = k == 0   ? syn[px][ch]
                      : k == 1 ? m_now
                               : spike_of<S>(p_.fire, m_now, threshold_of<S>(p_.fire, c0 + ch));
        }
      store_patch<S>(out, at, c0, v);
    }
  }

  // Does nothing without pooling. To be called by all threads, after a barrier: the tile's whole
  // windows, channels c0 ... c0 + Channels - 1.
  template <int Channels>
  SNNLSTM_DEVICE void finish(int c0) const {
    const Fire& f = p_.fire;
    if (!p_.fires || f.pool == Pool::none || p_.sums_out.present()) return;
    const unsigned windows = tiling_.by_windows.value;
    const bool by_channel = f.spk.c == 1;  // neighbouring threads write neighbouring elements
    S* spk = image_of<S>(f.spk, block_.t, block_.n);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < windows * Channels; i += blockDim.x) {
      unsigned row = i, ch = i;
      if (by_channel)
        ch = i % Channels, row = i / Channels;
      else
        row = tiling_.by_windows.split(ch);
      const int col = int(tiling_.by_window.split(row)), c = c0 + int(ch);
      const int y = block_.y0 / f.pool_h + int(row), x = block_.x0 / f.pool_w + col;
      if (c >= f.C || y >= f.Hp || x >= f.Wp) continue;
      const int m = int(row) * f.pool_h * tiling_.w + col * f.pool_w;
      int where;
      const R value = pooled<S>(
          f, [&](int i, int j) { return mem_tile_.at(int(ch), m + i * tiling_.w + j); }, where);
      spk[offset(f.spk, c, y, x)] = from_real<S>(spike_of<S>(f, value, threshold_of<S>(f, c)));
    }
  }

 private:
  SNNLSTM_DEVICE R bias_of(int gate, int c) const {
    if (p_.bias == nullptr || c >= p_.C) return 0;
    return to_real(static_cast<const S*>(p_.bias)[gate * p_.C + c]);
  }

  const NeuronForward& p_;
  const Tiling& tiling_;
  const Block& block_;
  MemTile<R> mem_tile_;
};

}  // namespace snnlstm::cuda
