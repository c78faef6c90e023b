// Between the caller's tensors (any strides) and channels-last rows: one image row at a time,
// transposed in registers where the caller's columns are contiguous (NCHW), copied where its
// channels are (channels_last).
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

// dst[w * dst_stride + c] = src[c * stride_c + w * stride_w] for w < W, c < C.
template <class S, class T = typename S::Scalar>
void load_row(const T* src, int64_t stride_c, int64_t stride_w, int64_t W, int64_t C, T* dst,
              int64_t dst_stride) {
  constexpr int VL = S::lanes;
  if (stride_c == 1 || C == 1) {
    if (C == 1 && stride_w == 1 && dst_stride == 1) {
      std::memcpy(dst, src, W * sizeof(T));
      return;
    }
    for (int64_t w = 0; w < W; ++w)
      for (int64_t c = 0; c < C; ++c) dst[w * dst_stride + c] = src[w * stride_w + c];
    return;
  }
  int64_t c0 = 0;
  if (stride_w == 1) {
    for (; c0 + VL <= C; c0 += VL) {
      int64_t w0 = 0;
      for (; w0 + VL <= W; w0 += VL) {
        typename S::R v[VL];
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) v[k] = S::load(src + (c0 + k) * stride_c + w0);
        S::transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) S::store(dst + (w0 + k) * dst_stride + c0, v[k]);
      }
      for (; w0 < W; ++w0)
        for (int k = 0; k < VL; ++k) dst[w0 * dst_stride + c0 + k] = src[(c0 + k) * stride_c + w0];
    }
  }
  for (int64_t c = c0; c < C; ++c)
    for (int64_t w = 0; w < W; ++w) dst[w * dst_stride + c] = src[c * stride_c + w * stride_w];
}

// dst[c * stride_c + w * stride_w] = f(src[w * src_stride + c], c) for w < W, c < C.
// f maps a vector whose first lane is channel c. src has whole vectors: Cp channels.
template <class S, class F, class T = typename S::Scalar>
SNNLSTM_INLINE void store_row(const T* src, int64_t src_stride, int64_t W, int64_t C, T* dst,
                              int64_t stride_c, int64_t stride_w, F&& f) {
  constexpr int VL = S::lanes;
  for (int64_t c0 = 0; c0 < C; c0 += VL) {
    const int n = C - c0 < VL ? int(C - c0) : VL;
    int64_t w0 = 0;
    if (stride_w == 1 && stride_c != 1) {
      for (; w0 + VL <= W; w0 += VL) {
        typename S::R v[VL];
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) v[k] = f(S::load(src + (w0 + k) * src_stride + c0), c0);
        S::transpose(v);
        if (n == VL) {
#pragma GCC unroll 16
          for (int k = 0; k < VL; ++k) S::store(dst + (c0 + k) * stride_c + w0, v[k]);
        } else {
          for (int k = 0; k < n; ++k) S::store(dst + (c0 + k) * stride_c + w0, v[k]);
        }
      }
    }
    for (; w0 < W; ++w0) {
      const typename S::R v = f(S::load(src + w0 * src_stride + c0), c0);
      T* out = dst + c0 * stride_c + w0 * stride_w;
      if (stride_c == 1 && n == VL) {
        S::store(out, v);
      } else {
        for (int k = 0; k < n; ++k) out[k * stride_c] = v[k];
      }
    }
  }
}

SNNLSTM_END_ISA
