// Looks at x before a call, because its zeros and its largest value decide on the algorithms.
#pragma once

#include <algorithm>

#include "../api.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

template <class T, class Distance>
class Look {
  using S = Simd<T, kNativeBytes / sizeof(T)>;
  using R = typename S::R;
  using Mask = typename S::Mask;

 public:
  // Every `distance`-th value is looked at. The distance may be known when this is compiled.
  Look(const Cell& cell, const View& x, Distance distance)
      : c(cell), s(x.stride), size(c.Cin * c.H * c.W), distance(distance) {
    dense = (s[4] == 1 && s[3] == c.W && s[2] == c.H * c.W) ||
            (s[2] == 1 && s[4] == c.Cin && s[3] == c.W * c.Cin);
  }

  void image(const T* values) {
    if (dense) return run(values, size, 1);
    for (int64_t channel = 0; channel < c.Cin; ++channel)
      for (int64_t row = 0; row < c.H; ++row) run(values + channel * s[2] + row * s[3], c.W, s[4]);
  }

  cpu::Seen seen() const {
    cpu::Seen seen{count, nonzero, largest_of_rest};
    for (int lane = 0; lane < S::lanes; ++lane) {
      seen.nonzero -= zeros[lane];
      seen.largest = std::max(seen.largest, double(largest[lane]));
    }
    return seen;
  }

 private:
  // Looks at values that are `step` apart.
  SNNLSTM_INLINE void run(const T* values, int64_t length, int64_t step) {
    if (first < length) {
      const int64_t chosen = (length - first + distance - 1) / distance;
      if (step == 1)
        add(values + first, chosen, distance);
      else
        add(values + first * step, chosen, step * distance);
      first += chosen * distance;
    }
    first -= length;
  }

  template <class Step>
  SNNLSTM_INLINE void add(const T* values, int64_t number, Step step) {
    count += number, nonzero += number;
    for (; number >= S::lanes; number -= S::lanes, values += S::lanes * step) {
      R v;
      for (int lane = 0; lane < S::lanes; ++lane) v[lane] = values[lane * step];
      zeros -= v == R{};
      largest = S::greater(S::abs(v), largest);  // NaN changes nothing
    }
    for (; number > 0; --number, values += step) {
      const T v = std::abs(*values);
      nonzero -= v == T(0);
      largest_of_rest = v > largest_of_rest ? v : largest_of_rest;
    }
  }

  const Cell& c;
  const int64_t* s;
  const int64_t size;
  const Distance distance;
  bool dense;                      // whether an image's values fill its memory
  int64_t first = 0;               // place of the next value, from the next run's beginning
  int64_t count = 0, nonzero = 0;  // without the zeros in `zeros`, one number for each lane
  Mask zeros = {};
  R largest = {};
  T largest_of_rest = 1;
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
