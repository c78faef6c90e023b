// Looks at x before a call, because its zeros and its largest value decide on the algorithms.
#pragma once

#include <algorithm>

#include "../api.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

// Looks at VL values at once.
template <class T, int VL>
struct LookAtLanes {
  using S = Simd<T, VL>;
  typename S::Mask zeros = {};  // minus the number of zeros in each lane
  typename S::R largest = {};

  // Looks at whole vectors of `number` values that are `step` apart, and leaves the rest.
  template <class Step>
  SNNLSTM_INLINE void add(const T*& values, int64_t& number, Step step) {
    for (; number >= VL; number -= VL, values += VL * step) {
      typename S::R v;
      for (int lane = 0; lane < VL; ++lane) v[lane] = values[lane * step];
      zeros += v == typename S::R{};
      largest = S::greater(S::abs(v), largest);  // NaN changes nothing
    }
  }

  void put(cpu::Seen& seen) const {
    for (int lane = 0; lane < VL; ++lane) {
      seen.nonzero += zeros[lane];
      seen.largest = std::max(seen.largest, double(largest[lane]));
    }
  }
};

template <class T, class Distance>
class Look {
 public:
  // Looks at every `distance`-th value, or at such rows if an image has gaps. The distance may be
  // known when this is compiled.
  Look(const Cell& cell, const View& x, Distance distance)
      : c(cell), s(x.stride), size(c.Cin * c.H * c.W), distance(distance) {
    dense = (s[4] == 1 && s[3] == c.W && s[2] == c.H * c.W) ||
            (s[2] == 1 && s[4] == c.Cin && s[3] == c.W * c.Cin);
  }

  void image(const T* values) {
    if (dense) {
      if (next < size) {
        const int64_t chosen = (size - next + distance - 1) / distance;
        add(values + next, chosen, distance);
        next += chosen * distance;
      }
      next -= size;
      return;
    }
    const bool column = c.W == 1;  // which is taken as one row
    const int64_t rows = column ? 1 : c.H, length = column ? c.H : c.W;
    const int64_t step = column ? s[3] : s[4];
    for (int64_t channel = 0; channel < c.Cin; ++channel)
      for (int64_t row = 0; row < rows; ++row) {
        if (next == 0) {
          const T* first = values + channel * s[2] + row * s[3];
          if (step == 1)
            add(first, length, std::integral_constant<int64_t, 1>());
          else
            add(first, length, step);
          next = distance;
        }
        --next;
      }
  }

  cpu::Seen seen() const {
    cpu::Seen seen{count, count};
    wide.put(seen), narrow.put(seen), single.put(seen);
    return seen;
  }

 private:
  template <class Step>
  SNNLSTM_INLINE void add(const T* values, int64_t number, Step step) {
    count += number;
    wide.add(values, number, step), narrow.add(values, number, step);
    single.add(values, number, step);
  }

  const Cell& c;
  const int64_t* s;
  const int64_t size;
  const Distance distance;
  bool dense;        // whether an image's values fill its memory
  int64_t next = 0;  // place of the next value, or rows before the next row
  int64_t count = 0;
  LookAtLanes<T, kNativeBytes / sizeof(T)> wide;
  LookAtLanes<T, 16 / sizeof(T)> narrow;
  LookAtLanes<T, 1> single;
};

template <class T, class Distance>
static cpu::Seen look_at_images(const Cell& cell, const View& x, const int64_t* lengths,
                                int64_t begin, int64_t end, Distance distance) {
  Look<T, Distance> look(cell, x, distance);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t t = k / cell.N, n = k % cell.N;
    if (lengths && t >= lengths[n]) continue;
    look.image(static_cast<const T*>(x.data) + t * x.stride[0] + n * x.stride[1]);
  }
  return look.seen();
}

static cpu::Seen look_at(const Cell& cell, const View& x, const int64_t* lengths, int64_t begin,
                         int64_t end, int64_t distance) {
  const auto look = [&](auto distance) {
    return cell.dtype == DType::float64
               ? look_at_images<double>(cell, x, lengths, begin, end, distance)
               : look_at_images<float>(cell, x, lengths, begin, end, distance);
  };
  return distance == 1 ? look(std::integral_constant<int64_t, 1>()) : look(distance);
}

SNNLSTM_END_ISA
