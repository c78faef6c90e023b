// The numbers of pixels in their pooling windows: in memory a uint8_t or, if windows have more than
// 256 pixels, an int32_t each, and in registers the lanes of a vector of integers.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

// Converts a vector of `count` integers that are not negative. GCC converts them one by one if a
// step does more than double or halve their size.
template <class N, int count, class V>
SNNLSTM_INLINE typename VectorOf<N, count>::type converted(V v) {
  constexpr size_t from = sizeof(V) / count, to = sizeof(N), next = to > from ? 2 * from : from / 2;
  using Next = std::conditional_t<next == 4, uint32_t, uint16_t>;
  if constexpr (to > 2 * from || from > 2 * to)
    return converted<N, count>(__builtin_convertvector(v, typename VectorOf<Next, count>::type));
  else
    return __builtin_convertvector(v, typename VectorOf<N, count>::type);
}

// The places of the windows of neighbouring lanes. `M` is the Simd of the vectors that are pooled.
template <class M>
class StoredPlaces {
 public:
  using Mask = typename M::Mask;

  StoredPlaces(const void* data, bool has_32_bits)
      : data_(const_cast<void*>(data)), has_32_bits_(has_32_bits) {}

  bool present() const { return data_ != nullptr; }
  SNNLSTM_INLINE void put(int64_t k, Mask places) const {
    has_32_bits_ ? put(static_cast<int32_t*>(data_) + k, places)
                 : put(static_cast<uint8_t*>(data_) + k, places);
  }
  SNNLSTM_INLINE Mask get(int64_t k) const {
    return has_32_bits_ ? get(static_cast<const int32_t*>(data_) + k)
                        : get(static_cast<const uint8_t*>(data_) + k);
  }

 private:
  template <class Place>
  static SNNLSTM_INLINE void put(Place* to, Mask places) {
    const auto stored = converted<Place, M::lanes>(places);
    std::memcpy(to, &stored, sizeof(stored));
  }
  template <class Place>
  static SNNLSTM_INLINE Mask get(const Place* from) {
    typename VectorOf<Place, M::lanes>::type stored;
    std::memcpy(&stored, from, sizeof(stored));
    return reinterpret_cast<Mask>(converted<typename M::Bits, M::lanes>(stored));
  }

  void* data_;
  bool has_32_bits_;
};

SNNLSTM_END_ISA
