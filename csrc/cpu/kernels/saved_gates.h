// The activated gates that the forward pass saves for the backward pass, by pixel and vector of
// channels: the numbers themselves or, packed, fixed point numbers of half their bits.
#pragma once

#include "neighbours.h"

SNNLSTM_BEGIN_ISA

// Whole: i, f, o, g in four vectors; the sign of o says "was reset".
// Packed: two words a lane, i below f and o below g. Codes of i and f count from 0 to 1, those of g
// from -1 to 1, and those of o, one bit shorter, from 0 to 1; the last bit of o's word says "was
// reset". One code of each stands for NaN.
template <class T, int VL>
class SavedGates {
 public:
  // `blocks` is the number of a pixel's vectors of channels.
  SavedGates(bool packed, int64_t blocks) : packed_(packed), blocks_(blocks) {}

  // Elements of a pixel's vector of channels, and of a pixel.
  int64_t size() const { return (packed_ ? 2 : 4) * VL; }
  int64_t pixel() const { return blocks_ * size(); }

  // Those of one vector of channels of P neighbouring pixels.
  template <int P>
  class Of;
  template <int P>
  Of<P> of(Count<P>) const {
    return Of<P>(packed_, pixel());
  }

 private:
  bool packed_;
  int64_t blocks_;
};

template <class T, int VL>
template <int P>
class SavedGates<T, VL>::Of {
  using M = Neighbours<T, VL, P>;
  using R = typename M::R;
  using Mask = typename M::Mask;
  using Bits = typename M::Bits;
  static constexpr int kBits = 4 * sizeof(T);
  static constexpr Bits kAll = (Bits(1) << kBits) - 1, kReset = Bits(1) << (kBits - 1);
  static constexpr Bits kFirst = kAll - 1, kShort = kReset - 2, kSigned = kReset - 1;  // codes of 1
  static constexpr T kInteger = T(int64_t(1) << M::K::mantissa);  // adding it rounds to an integer

 public:
  Of(bool packed, int64_t pixel) : packed_(packed), pixel_(pixel) {}

  // The gates, without the reset; put_output() follows.
  SNNLSTM_INLINE void put(T* to, const Gates<R>& act) const {
    if (packed_) {
      store(to, code(act.i, kFirst, 0, kAll) | code(act.f, kFirst, 0, kAll) << kBits);
      store(to + VL, code(act.o, kShort, 0, kSigned) | code(act.g, kSigned, kReset, 0) << kBits);
    } else {
      M::store(to, pixel_, act.i);
      M::store(to + VL, pixel_, act.f);
      M::store(to + 3 * VL, pixel_, act.g);
    }
  }
  SNNLSTM_INLINE void put_output(T* to, R o, Mask reset) const {
    if (packed_)
      store(to + VL, word(to + VL) | (reset & kReset));
    else
      M::store(to + 2 * VL, pixel_, M::flag(o, reset));
  }

  SNNLSTM_INLINE Gates<R> get(const T* from, Mask& reset) const {
    if (packed_) {
      const Mask first = word(from), second = word(from + VL);
      reset = (second & kReset) != 0;
      return {number(first & kAll, kFirst, 0, kAll), number(high(first), kFirst, 0, kAll),
              number(second & kSigned, kShort, 0, kSigned),
              number(high(second), kSigned, kReset, 0)};
    }
    const R o = M::load(from + 2 * VL, pixel_);
    reset = M::flagged(o);
    return {M::load(from, pixel_), M::load(from + VL, pixel_), M::abs(o),
            M::load(from + 3 * VL, pixel_)};
  }

 private:
  SNNLSTM_INLINE Mask word(const T* from) const {
    return reinterpret_cast<Mask>(M::load(from, pixel_));
  }
  SNNLSTM_INLINE void store(T* to, Mask word) const {
    M::store(to, pixel_, reinterpret_cast<R>(word));
  }
  static SNNLSTM_INLINE Mask high(Mask word) { return (word >> kBits) & kAll; }

  // `one` is the distance from the code of 0, which is `zero`, to that of 1.
  static SNNLSTM_INLINE Mask code(R v, Bits one, Bits zero, Bits nan) {
    const R rounded = v * T(one) + (kInteger + T(zero));
    return v == v ? reinterpret_cast<Mask>(rounded) & kAll : Mask{} + nan;
  }
  static SNNLSTM_INLINE R number(Mask code, Bits one, Bits zero, Bits nan) {
    const R v = __builtin_convertvector(code - zero, R) * (T(1) / T(one));
    return M::where(code == nan, M::splat(T(NAN)), v);
  }

  bool packed_;
  int64_t pixel_;  // from a pixel to the next
};

SNNLSTM_END_ISA
