// Pooling and quantisation, which lead from the membrane potential to the spike, and back from the
// gradient of the spike.
#pragma once

#include "layout.h"
#include "math.h"

SNNLSTM_BEGIN_ISA

// Does what cell.h's quantise() does, for all lanes at once: all lanes take the steps of one binary
// search, without branches. quantise() itself does the lanes that tie or are not finite.
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

// One pooling window of channels-last rows. `mem` is the window's first pixel and channel.
template <class M>
struct PoolWindow {
  using T = typename M::Scalar;
  using R = typename M::R;
  using Mask = typename M::Mask;

  // Does what torch.nn.functional.max_pool2d does: a NaN wins, and the first of equal values.
  // `where` gets the winner's place.
  static SNNLSTM_INLINE R max(const Cell& c, const T* mem, int64_t row, int64_t pixel,
                              Mask& where) {
    R best = M::load(mem);
    where = Mask{};
    typename M::Bits place = 0;
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j, ++place) {
        const R v = M::load(mem + i * row + j * pixel);
        const Mask better = (v > best) | (v != v);
        best = M::where(better, v, best);
        where = better ? Mask{} + place : where;
      }
    return best;
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
    typename M::Bits place = 0;
    for (int i = 0; i < c.pool_h; ++i)
      for (int j = 0; j < c.pool_w; ++j, ++place) {
        T* p = out + i * row + j * pixel;
        const R g = c.pool == Pool::max ? M::where(where == Mask{} + place, grad, R{}) : grad;
        M::store(p, M::load(p) + g);
      }
  }
};

// Returns the membrane potential that the threshold sees at one pooled pixel: it is pooled and,
// with a quantiser, quantised once more. `mem` is the window's first pixel.
template <class M>
SNNLSTM_INLINE typename M::R pooled_mem(const Cell& c, const typename M::Scalar* mem, int64_t row,
                                        int64_t pixel, const typename M::Scalar* levels,
                                        typename M::Mask& where) {
  typename M::R v;
  if (c.pool == Pool::max)
    v = PoolWindow<M>::max(c, mem, row, pixel, where);
  else if (c.pool == Pool::avg)
    v = PoolWindow<M>::mean(c, mem, row, pixel);
  else
    v = M::load(mem);
  if (c.num_levels > 0) v = quantise_lanes<M>(v, levels, c.num_levels);
  return v;
}

SNNLSTM_END_ISA
