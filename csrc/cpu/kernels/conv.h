// The inner product of every convolution here: a register tile of P pixels by NV vectors of
// output channels, summed over runs of adjacent input values.
//
//   out[p][v] (+)= sum over runs, k:  in[p * pixel_stride + run.in + k] * w[run.w + k][v]
//
// for each v < NV * VL.
//
// The input is channels-last: the taps of one kernel row and all their channels lie side by side
// and are one run. With dilation each tap is a run. The weight is packed in the order in which the
// tile reads it.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

struct Run {
  int64_t in;  // distance from the output pixel's place in the input, in elements
  int64_t w;   // row of the packed weight
  int64_t len;
};

// The largest P for NV vectors. The accumulators, one broadcast per pixel and a weight must fit in
// the registers (16 of them, or 32 with AVX-512 and on Arm).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
template <int NV>
constexpr int kMaxPixels = kAccumulators / NV < 8 ? kAccumulators / NV : 8;

// The values to which the sums of a row of pixels are added: none (null), a bias for every pixel
// (pixel_stride 0), or the output's own.
template <class T>
struct Start {
  const T* from = nullptr;
  int64_t pixel_stride = 0;
};

template <class S, int NV, int P>
SNNLSTM_INLINE void conv_tile(const typename S::Scalar* in, int64_t pixel_stride, const Run* runs,
                              int num_runs, const typename S::Scalar* w,
                              Start<typename S::Scalar> start, typename S::Scalar* out,
                              int64_t out_stride) {
  using R = typename S::R;
  constexpr int VL = S::lanes;
  R acc[P][NV];
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      acc[p][v] = R{};  // small sums round less than sums that begin with `start`
  for (int r = 0; r < num_runs; ++r) {
    const typename S::Scalar* a = in + runs[r].in;
    const typename S::Scalar* b = w + runs[r].w * (NV * VL);
    const int64_t len = runs[r].len;
    for (int64_t k = 0; k < len; ++k) {
      // The shorter side stays in registers while the longer one streams past.
      if constexpr (P <= NV) {
        R x[P];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) x[p] = S::splat(a[p * pixel_stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const R weight = S::load(b + v * VL);
#pragma GCC unroll 32
          for (int p = 0; p < P; ++p) acc[p][v] += x[p] * weight;
        }
      } else {
        R weight[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) weight[v] = S::load(b + v * VL);
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
          const R x = S::splat(a[p * pixel_stride + k]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[p][v] += x * weight[v];
        }
      }
      b += NV * VL;
    }
  }
  if (start.from)
#pragma GCC unroll 32
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[p][v] += S::load(start.from + p * start.pixel_stride + v * VL);
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) S::store(out + p * out_stride + v * VL, acc[p][v]);
}

// The function is not inlined, because a caller's loops would take registers from the tiles.
template <class S, int NV>
__attribute__((noinline)) void conv_row_of(const typename S::Scalar* in, int64_t pixel_stride,
                                           const Run* runs, int num_runs,
                                           const typename S::Scalar* w,
                                           Start<typename S::Scalar> start, typename S::Scalar* out,
                                           int64_t out_stride, int64_t count) {
  constexpr int P = kMaxPixels<NV>;
  for (int64_t done = 0, tiles = (count + P - 1) / P; tiles > 0; --tiles) {
    const int64_t n = (count - done + tiles - 1) / tiles;
    const auto* a = in + done * pixel_stride;
    auto* o = out + done * out_stride;
    with_count<P>(n, [&](auto pixels) __attribute__((always_inline)) {
      conv_tile<S, NV, decltype(pixels)::value>(a, pixel_stride, runs, num_runs, w, start, o,
                                                out_stride);
    });
    if (start.from) start.from += n * start.pixel_stride;
    done += n;
  }
}

// Sums `count` pixels of one row, in tiles of nearly equal size.
template <class S, int NV>
SNNLSTM_INLINE void conv_row(const typename S::Scalar* in, int64_t pixel_stride, const Run* runs,
                             int num_runs, const typename S::Scalar* w,
                             Start<typename S::Scalar> start, typename S::Scalar* out,
                             int64_t out_stride, int64_t count) {
  using V = Merged<S, NV>;
  conv_row_of<typename V::Vector, V::count>(in, pixel_stride, runs, num_runs, w, start, out,
                                            out_stride, count);
}

SNNLSTM_END_ISA
