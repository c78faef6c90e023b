// Pooling, quantisation and the size of a spike, in both passes.
#pragma once

#include "math.h"
#include "places.h"

SNNLSTM_BEGIN_ISA

// Quantises all lanes as cell.h's quantise() does. All lanes take the steps of one binary search,
// without branches. Lanes that tie or are not finite call quantise() itself.
template <class M>
__attribute__((noinline)) typename M::R quantise_lanes(typename M::R v,
                                                       const typename M::Scalar* levels, int n) {
  using R = typename M::R;
  using Mask = typename M::Mask;
  const auto at = [&](Mask index) {
    R level;
    for (int k = 0; k < M::lanes; ++k) level[k] = levels[index[k]];
    return level;
  };
  Mask best{};
  for (int length = n; length > 1;) {
    const int half = length / 2;
    best += (at(best + (half - 1)) < v) & (Mask{} + half);
    length -= half;
  }
  best -= (at(best) < v) & (best < n - 1);  // the first level that is not below v, or the last one
  const Mask below = best + (best > 0);
  const R upper = at(best), lower = at(below);
  const R to_upper = M::abs(upper - v), to_lower = M::abs(lower - v);
  const Mask down = (best > 0) & (to_lower <= to_upper);
  R result = M::where(down, lower, upper);
  const Mask ties = down & (below > 0) & (M::abs(at(below + (below > 0)) - v) == to_lower);
  const Mask special = ties | (v - v != R{});
  bool any = false;
  for (int k = 0; k < M::lanes; ++k) any |= special[k] != 0;
  for (int k = 0; any && k < M::lanes; ++k)
    if (special[k]) result[k] = quantise<typename M::Scalar>(v[k], levels, n);
  return result;
}

// Returns a state after its quantisation, if the cell has a quantiser.
template <class M>
SNNLSTM_INLINE typename M::R quantised(typename M::R v, const PassArgs& a) {
  if (a.cell.num_levels == 0) return v;
  return quantise_lanes<M>(v, static_cast<const typename M::Scalar*>(a.levels), a.cell.num_levels);
}

// Returns what spk is where a neuron spikes.
template <class T>
SNNLSTM_INLINE T spike_of(const PassArgs& a) {
  return *static_cast<const T*>(a.graded_factor);
}

// One pooling window of channels-last rows. `mem` is the window's first pixel and channel.
template <class M>
struct PoolWindow {
  using T = typename M::Scalar;
  using R = typename M::R;
  using Mask = typename M::Mask;

  // Returns the maximum. NaN counts as the largest.
  static SNNLSTM_INLINE R max(const Cell& c, const T* mem, int64_t row, int64_t pixel) {
    R best = M::load(mem);
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j) {
        const R v = M::load(mem + i * row + j * pixel);
        best = M::where((v > best) | (v != v), v, best);
      }
    return best;
  }

  // Returns the index of the first pixel that counts as the maximum.
  static SNNLSTM_INLINE Mask argmax(const Cell& c, const T* mem, int64_t row, int64_t pixel,
                                    R maximum) {
    const R unit = M::last_place(maximum);
    Mask where{};
    for (int i = c.pool_h - 1; i >= 0; --i)
      for (int j = c.pool_w - 1; j >= 0; --j) {
        const Mask largest = is_largest(M::load(mem + i * row + j * pixel), maximum, unit);
        where = largest ? Mask{} + typename M::Bits(i * c.pool_w + j) : where;
      }
    return where;
  }

  // Returns the values of the pixels with the indices `where`.
  static SNNLSTM_INLINE R at(const Cell& c, const T* mem, int64_t row, int64_t pixel, Mask where) {
    R value{};
    typename M::Bits index = 0;
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j, ++index)
        value = M::where(where == Mask{} + index, M::load(mem + i * row + j * pixel), value);
    return value;
  }

  static SNNLSTM_INLINE R mean(const Cell& c, const T* mem, int64_t row, int64_t pixel) {
    R sum{};
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j) sum += M::load(mem + i * row + j * pixel);
    return sum / T(c.pool_h * c.pool_w);
  }

  // Adds the gradient of the pooled value to its window.
  static SNNLSTM_INLINE void spread(const Cell& c, R grad, Mask where, T* out, int64_t row,
                                    int64_t pixel) {
    if (c.pool == Pool::avg) grad = grad / T(c.pool_h * c.pool_w);
    typename M::Bits index = 0;
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j, ++index) {
        T* p = out + i * row + j * pixel;
        const R g = c.pool == Pool::max ? M::where(where == Mask{} + index, grad, R{}) : grad;
        M::store(p, M::load(p) + g);
      }
  }
};

// The indices of the pixels that max_pool chose: PassArgs::argmax, (T, N, Hp, Wp, Cp) on the CPU.
template <class M>
class Argmax : public StoredPlaces<M> {
 public:
  Argmax(const PassArgs& a, int64_t Cp)
      : StoredPlaces<M>(a.cell.pool == Pool::max ? a.argmax : nullptr, a.cell.argmax_bytes() > 1),
        N_(a.cell.N),
        Hp_(a.cell.Hp()),
        row_(a.cell.Wp() * Cp) {}

  // Returns where a row of an image begins.
  int64_t row(int64_t t, int64_t n, int64_t h) const { return ((t * N_ + n) * Hp_ + h) * row_; }

 private:
  int64_t N_, Hp_, row_;
};

SNNLSTM_END_ISA
