// Copies between the caller's tensors (any strides) and channels-last rows, one image row at a
// time. Rows of contiguous columns (NCHW) are transposed in registers.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

// Calls f(first) for squares of VL columns that cover W >= VL. The last may overlap the one before.
template <int VL, class F>
SNNLSTM_INLINE void each_square(int64_t W, F&& f) {
  int64_t w = 0;
  for (; w + VL <= W; w += VL) f(w);
  if (w < W) f(W - VL);
}

// Loads VL columns of at most VL channels, and sets the lanes behind `channels` to zero.
template <class S, class T = typename S::Scalar>
SNNLSTM_INLINE void load_square(const T* src, int64_t stride_c, int64_t channels, T* dst,
                                int64_t dst_stride) {
  constexpr int VL = S::lanes;
  typename S::R v[VL];
#pragma GCC unroll 16
  for (int k = 0; k < VL; ++k) v[k] = k < channels ? S::load(src + k * stride_c) : typename S::R{};
  S::transpose(v);
#pragma GCC unroll 16
  for (int k = 0; k < VL; ++k) S::store(dst + k * dst_stride, v[k]);
}

// dst[w * dst_stride + c] = src[c * stride_c + w * stride_w] for w < W, c < C, and zero for
// C <= c < filled.
template <class S, class T = typename S::Scalar>
void load_row(const T* src, int64_t stride_c, int64_t stride_w, int64_t W, int64_t C, T* dst,
              int64_t dst_stride, int64_t filled) {
  constexpr int VL = S::lanes;
  if (C == 1 && filled == 1 && stride_w == 1 && dst_stride == 1) {
    std::memcpy(dst, src, W * sizeof(T));
    return;
  }
  int64_t done = 0;  // channels
  if (stride_w == 1 && stride_c != 1) {
    if constexpr (VL > 4)
      if (W < VL)
        return load_row<Simd<T, VL / 2>>(src, stride_c, stride_w, W, C, dst, dst_stride, filled);
    for (; W >= VL && done + VL <= filled; done += VL) {
      const int64_t channels = C - done;
      if (channels >= VL)
        each_square<VL>(W, [&](int64_t w) {
          load_square<S>(src + done * stride_c + w, stride_c, VL, dst + w * dst_stride + done,
                         dst_stride);
        });
      else
        each_square<VL>(W, [&](int64_t w) {
          load_square<S>(src + done * stride_c + w, stride_c, channels, dst + w * dst_stride + done,
                         dst_stride);
        });
    }
  }
  for (int64_t w = 0; done < filled && w < W; ++w) {
    T* out = dst + w * dst_stride;
    for (int64_t c = done; c < C; ++c) out[c] = src[c * stride_c + w * stride_w];
    for (int64_t c = done < C ? C : done; c < filled; ++c) out[c] = 0;
  }
}

// Stores the first `count` lanes, at least one.
template <class S, class T = typename S::Scalar>
SNNLSTM_INLINE void store_some(T* dst, typename S::R v, int64_t count) {
  constexpr int half = S::lanes / 2;
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

// dst[c * stride_c + w * stride_w] = f(src[w * src_stride + c], c) for w < W, c < C.
// f maps a vector whose first lane is channel c. src has whole vectors: Cp channels.
template <class S, class F, class T = typename S::Scalar>
SNNLSTM_INLINE void store_row(const T* src, int64_t src_stride, int64_t W, int64_t C, T* dst,
                              int64_t stride_c, int64_t stride_w, F&& f) {
  constexpr int VL = S::lanes;
  for (int64_t c0 = 0; c0 < C; c0 += VL) {
    const int64_t n = C - c0 < VL ? C - c0 : VL;
    const T* in = src + c0;
    T* out = dst + c0 * stride_c;
    if (stride_w == 1 && stride_c != 1) {
      const auto square = [&](int64_t w, int64_t columns,
                              int64_t channels) __attribute__((always_inline)) {
        typename S::R v[VL];
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < columns ? f(S::load(in + (w + k) * src_stride), c0) : typename S::R{};
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
      const typename S::R v = f(S::load(in + w * src_stride), c0);
      if (stride_c == 1 && n == VL)
        S::store(out + w * stride_w, v);
      else
        for (int64_t k = 0; k < n; ++k) out[k * stride_c + w * stride_w] = v[k];
    }
  }
}

SNNLSTM_END_ISA
