// Copies between the caller's tensors (any strides) and channels-last rows. Rows of adjacent
// columns (NCHW) are transposed in registers. Several rows that follow each other without a gap in
// the caller's tensor are transposed as one long row, because short rows would not fill the
// registers.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

// Returns the first channel and column of row h of image n at step t.
template <class T>
T* row_of(const View& v, int64_t t, int64_t n, int64_t h) {
  return static_cast<T*>(v.data) + t * v.stride[0] + n * v.stride[1] + h * v.stride[3];
}

// Clears the image of step t and sample n, of `size` values. A result's images lie in one piece.
template <class T>
void clear_image(const View& v, int64_t t, int64_t n, int64_t size) {
  std::memset(row_of<T>(v, t, n, 0), 0, size * sizeof(T));
}

// Says where the pixels of channels-last rows lie, counted through all rows.
struct Pixels {
  int64_t W, row, pixel;

  int64_t at(int64_t p) const { return p / W * row + p % W * pixel; }
  // Says whether all pixels are equally far apart, and distance() how far.
  bool regular() const { return W == 1 || row == W * pixel; }
  int64_t distance() const { return W == 1 ? row : pixel; }

  // Writes the places of n pixels from the p-th on.
  template <int n>
  SNNLSTM_INLINE void places(int64_t p, int64_t* to) const {
    int64_t w = p % W;
    int64_t place = p / W * row + w * pixel;
    const int64_t turn = row - (W - 1) * pixel;
    for (int k = 0; k < n; ++k) {
      to[k] = place;
      const bool last = ++w == W;
      place += last ? turn : pixel;
      w = last ? 0 : w;
    }
  }
};

// Says where pixels lie that are all equally far apart.
struct Row {
  int64_t pixel;

  int64_t at(int64_t p) const { return p * pixel; }
  template <int n>
  SNNLSTM_INLINE void places(int64_t p, int64_t* to) const {
    for (int k = 0; k < n; ++k) to[k] = (p + k) * pixel;
  }
};

// Calls f(first) for squares of VL columns that cover W >= VL. The last one may overlap another.
template <int VL, class F>
SNNLSTM_INLINE void each_square(int64_t W, F&& f) {
  int64_t w = 0;
  for (; w + VL <= W; w += VL) f(w);
  if (w < W) f(W - VL);
}

// Loads VL columns of at most VL channels into the pixels from the w-th on, and sets the lanes from
// `channels` on to zero.
template <class S, class Places, class T = typename S::Scalar>
SNNLSTM_INLINE void load_square(const T* src, int64_t stride_c, int64_t channels, T* dst,
                                const Places& to, int64_t w) {
  constexpr int VL = S::lanes;
  typename S::R v[VL];
  int64_t place[VL];
  to.template places<VL>(w, place);
#pragma GCC unroll 16
  for (int k = 0; k < VL; ++k) v[k] = k < channels ? S::load(src + k * stride_c) : typename S::R{};
  S::transpose(v);
#pragma GCC unroll 16
  for (int k = 0; k < VL; ++k) S::store(dst + place[k], v[k]);
}

// dst[to.at(w) + c] = src[c * stride_c + w * stride_w] for w < W, c < C, and zero for
// C <= c < filled.
template <class S, class Places, class T = typename S::Scalar>
void load_row(const T* src, int64_t stride_c, int64_t stride_w, int64_t W, int64_t C, T* dst,
              const Places& to, int64_t filled) {
  constexpr int VL = S::lanes;
  int64_t done = 0;  // channels
  if (stride_w == 1 && stride_c != 1) {
    if constexpr (VL > 4)
      if (W < VL) return load_row<Simd<T, VL / 2>>(src, stride_c, stride_w, W, C, dst, to, filled);
    for (; W >= VL && done + VL <= filled; done += VL) {
      const auto squares = [&](int64_t channels) __attribute__((always_inline)) {
        each_square<VL>(W, [&](int64_t w) {
          load_square<S>(src + done * stride_c + w, stride_c, channels, dst + done, to, w);
        });
      };
      C - done >= VL ? squares(VL) : squares(C - done);
    }
  }
  for (int64_t w = 0; done < filled && w < W; ++w) {
    T* out = dst + to.at(w);
    for (int64_t c = done; c < C; ++c) out[c] = src[c * stride_c + w * stride_w];
    for (int64_t c = done < C ? C : done; c < filled; ++c) out[c] = 0;
  }
}

// Says whether to take `rows` rows of the caller's tensor as one row. Their pixels must follow each
// other without a gap. Unless our pixels are equally far apart, this must also save a fifth of the
// squares.
template <int VL>
bool one_row(const Pixels& ours, int64_t rows, int64_t stride_h, int64_t stride_w) {
  const int64_t W = ours.W;
  const int64_t long_row = (rows * W + VL - 1) / VL;
  const int64_t short_rows = (W + VL - 1) / VL * rows;
  if (W == 1) return true;
  return stride_h == W * stride_w && (ours.regular() || 5 * long_row < 4 * short_rows);
}

// Calls load_row for `rows` rows of image n at step t, from row `first` on. The rows are written
// to.row apart.
template <class S, class T = typename S::Scalar>
void load_rows(const View& v, int64_t t, int64_t n, int64_t first, int64_t rows, int64_t C, T* dst,
               const Pixels& to, int64_t filled) {
  const T* const src = row_of<const T>(v, t, n, first);
  const int64_t stride_c = v.stride[2];
  const int64_t stride_h = v.stride[3];
  const int64_t stride_w = v.stride[4];
  const int64_t W = to.W;
  const int64_t next = W == 1 ? stride_h : stride_w;
  if (C == 1 && filled == 1 && stride_w == 1 && to.pixel == 1) {
    for (int64_t h = 0; h < rows; ++h)
      std::memcpy(dst + h * to.row, src + h * stride_h, W * sizeof(T));
  } else if (!one_row<S::lanes>(to, rows, stride_h, stride_w)) {
    for (int64_t h = 0; h < rows; ++h)
      load_row<S>(src + h * stride_h, stride_c, stride_w, W, C, dst + h * to.row, Row{to.pixel},
                  filled);
  } else if (to.regular()) {
    load_row<S>(src, stride_c, next, rows * W, C, dst, Row{to.distance()}, filled);
  } else {
    load_row<S>(src, stride_c, next, rows * W, C, dst, to, filled);
  }
}

// Stores the first `count` lanes of a vector, at least one.
template <class S, class T = typename S::Scalar>
SNNLSTM_INLINE void store_some(T* dst, typename S::R v, int64_t count) {
  constexpr int half = S::lanes > 1 ? S::lanes / 2 : 1;
  using Half = Simd<T, half>;
  alignas(64) T lanes[S::lanes];
  S::store(lanes, v);
  if (count < half) {
    for (int64_t k = 0; k < count; ++k) dst[k] = lanes[k];
    return;
  }
  Half::store(dst, Half::load(lanes));
  Half::store(dst + count - half, Half::load(lanes + count - half));
}

// dst[c * stride_c + w * stride_w] = f(src[from.at(w) + c], c) for w < W, c < C.
// f maps a vector whose first lane is channel c. src has whole vectors: Cp channels.
template <class S, class Places, class F, class T = typename S::Scalar>
void store_row(const T* src, const Places& from, int64_t W, int64_t C, T* dst, int64_t stride_c,
               int64_t stride_w, F&& f) {
  constexpr int VL = S::lanes;
  for (int64_t c0 = 0; c0 < C; c0 += VL) {
    const int64_t n = C - c0 < VL ? C - c0 : VL;
    const T* in = src + c0;
    T* out = dst + c0 * stride_c;
    if (stride_w == 1 && stride_c != 1) {
      const auto square = [&](int64_t w, int64_t columns,
                              int64_t channels) __attribute__((always_inline)) {
        typename S::R v[VL];
        int64_t place[VL];
        from.template places<VL>(w, place);
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < columns ? f(S::load(in + place[k]), c0) : typename S::R{};
        S::transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) {
          if (k >= channels) break;
          if (columns == VL)
            S::store(out + k * stride_c + w, v[k]);
          else
            store_some<S>(out + k * stride_c + w, v[k], columns);
        }
      };
      if (W < VL)
        square(0, W, n);
      else if (n == VL)
        each_square<VL>(W, [&](int64_t w) { square(w, VL, VL); });
      else
        each_square<VL>(W, [&](int64_t w) { square(w, VL, n); });
      continue;
    }
    for (int64_t w = 0; w < W; ++w) {
      const typename S::R v = f(S::load(in + from.at(w)), c0);
      if (stride_c == 1 && n == VL)
        S::store(out + w * stride_w, v);
      else
        for (int64_t k = 0; k < n; ++k) out[k * stride_c + w * stride_w] = v[k];
    }
  }
}

// Calls store_row for `rows` rows that lie from.row apart. They are written to image n at step t,
// from row `first` on.
template <class S, class F, class T = typename S::Scalar>
void store_rows(const T* src, const Pixels& from, int64_t rows, int64_t C, const View& v, int64_t t,
                int64_t n, int64_t first, F&& f) {
  T* const dst = row_of<T>(v, t, n, first);
  const int64_t stride_c = v.stride[2];
  const int64_t stride_h = v.stride[3];
  const int64_t stride_w = v.stride[4];
  const int64_t W = from.W;
  const int64_t next = W == 1 ? stride_h : stride_w;
  if (!one_row<S::lanes>(from, rows, stride_h, stride_w)) {
    for (int64_t h = 0; h < rows; ++h)
      store_row<S>(src + h * from.row, Row{from.pixel}, W, C, dst + h * stride_h, stride_c,
                   stride_w, f);
  } else if (from.regular()) {
    store_row<S>(src, Row{from.distance()}, rows * W, C, dst, stride_c, next, f);
  } else {
    store_row<S>(src, from, rows * W, C, dst, stride_c, next, f);
  }
}

SNNLSTM_END_ISA
