// Reading and writing images, the caller's and our own, in patches of 2 neighbouring pixels and CH
// neighbouring channels: what one thread holds of a tile.
//
// Lane l of a warp holds pixels 2g, 2g + 1 (g = l % 8 or l / 4) and channels q * CH ... (q the other
// part of l). So a warp's access covers whole 32-byte sectors in both usual layouts:
//   channels last   per pixel CH channels in one vector, neighbouring lanes side by side
//   contiguous      per channel 2 pixels in one vector, neighbouring lanes side by side
// and anything else (odd sizes, odd strides, unaligned pointers) goes element by element.
#pragma once

#include "math.cuh"

namespace snnlstm::cuda {

enum class Access : int {
  none,      // no tensor
  scalar,    // element by element
  rows,      // the channel's 2 pixels as one vector
  channels,  // the pixel's CH channels as one vector
};

// (T, N, channels, H, W), strides in elements. Tensors may have any size, one of their images less
// than 2^31 elements from its first to its last.
struct Tensor {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int c = 0, h = 0, w = 0;
  int channels = 0;  // reads beyond give 0, writes beyond are dropped
  Access access = Access::none;

  SNNLSTM_BOTH bool present() const { return access != Access::none; }
};

// Where a patch lies.
struct Place {
  int t, n;
  int y[2], x[2];
  bool valid[2];
};

// N elements of type S in one access (two for 4 doubles).
template <class S, int N>
SNNLSTM_DEVICE void load_vector(const S* p, RealOf<S> (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_real(load<S>(p));
  } else if constexpr (sizeof(S) == 8) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const double2 d = load<double2>(p + k);
      v[k] = d.x, v[k + 1] = d.y;
    }
  } else if constexpr (sizeof(S) == 4) {
    if constexpr (N == 2) {
      const float2 d = load<float2>(p);
      v[0] = d.x, v[1] = d.y;
    } else {
      const float4 d = load<float4>(p);
      v[0] = d.x, v[1] = d.y, v[2] = d.z, v[3] = d.w;
    }
  } else if constexpr (N == 2) {
    const unsigned d = load<unsigned>(p);
    v[0] = unpack_lo<S>(d), v[1] = unpack_hi<S>(d);
  } else {
    const uint2 d = load<uint2>(p);
    v[0] = unpack_lo<S>(d.x), v[1] = unpack_hi<S>(d.x);
    v[2] = unpack_lo<S>(d.y), v[3] = unpack_hi<S>(d.y);
  }
}

template <class S, int N>
SNNLSTM_DEVICE void store_vector(S* p, const RealOf<S> (&v)[N]) {
  if constexpr (N == 1) {
    store<S>(p, from_real<S>(v[0]));
  } else if constexpr (sizeof(S) == 8) {
#pragma unroll
    for (int k = 0; k < N; k += 2) store(p + k, make_double2(v[k], v[k + 1]));
  } else if constexpr (sizeof(S) == 4) {
    if constexpr (N == 2)
      store(p, make_float2(v[0], v[1]));
    else
      store(p, make_float4(v[0], v[1], v[2], v[3]));
  } else if constexpr (N == 2) {
    store(p, pack<S>(v[0], v[1]));
  } else {
    store(p, make_uint2(pack<S>(v[0], v[1]), pack<S>(v[2], v[3])));
  }
}

template <class S>
SNNLSTM_DEVICE S* image_of(const Tensor& a, int t, int n) {
  return static_cast<S*>(a.data) + (t * a.t + n * a.n);
}
SNNLSTM_DEVICE int offset(const Tensor& a, int c, int y, int x) {
  return c * a.c + y * a.h + x * a.w;
}

// An image of ours, channels-last, every pixel's vectors aligned: (T, N, H, width, planes, Cp).
struct Image {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int width = 0;
  int planes = 1;  // 4 where there is one for each gate
  int Cp = 0;

  SNNLSTM_BOTH bool present() const { return data != nullptr; }
};

template <class S>
SNNLSTM_DEVICE S* image_of(const Image& a, int t, int n) {
  return static_cast<S*>(a.data) + (t * a.t + n * a.n);
}
SNNLSTM_DEVICE int offset(const Image& a, int plane, int c, int y, int x) {
  return ((y * a.width + x) * a.planes + plane) * a.Cp + c;
}

// Where the code would otherwise be there eight times over: body(value) for every value in turn, in
// a loop that stays one. The values pass through v[0][0]: registers cannot be indexed.
template <int CH, class R, class Body>
SNNLSTM_DEVICE void for_each_value(R (&v)[2][CH], Body&& body) {
  R* flat = &v[0][0];
#pragma unroll 1
  for (int k = 0; k < 2 * CH; ++k) {
    const R done = body(flat[0], k / CH, k % CH);
#pragma unroll
    for (int i = 0; i + 1 < 2 * CH; ++i) flat[i] = flat[i + 1];
    flat[2 * CH - 1] = done;
  }
}

// v[pixel][channel] of channels c0, c0 + 1, ...; 0 where there is nothing.
template <class S, int CH>
SNNLSTM_DEVICE void load_patch(const Tensor& a, const Place& at, int c0, RealOf<S> (&v)[2][CH]) {
#pragma unroll
  for (int px = 0; px < 2; ++px)
#pragma unroll
    for (int ch = 0; ch < CH; ++ch) v[px][ch] = 0;
  if (c0 >= a.channels) return;
  const S* p = image_of<const S>(a, at.t, at.n);
  const S* first = p + offset(a, c0, at.y[0], at.x[0]);
  const S* second = p + offset(a, c0, at.y[1], at.x[1]);
  if (a.access == Access::channels) {
    if (at.valid[0]) load_vector<S>(first, v[0]);
    if (at.valid[1]) load_vector<S>(second, v[1]);
  } else if (a.access == Access::rows) {
    if (!at.valid[0]) return;
#pragma unroll
    for (int ch = 0; ch < CH; ++ch) {
      RealOf<S> pair[2] = {0, 0};
      if (c0 + ch < a.channels) load_vector<S>(first + ch * a.c, pair);
      v[0][ch] = pair[0], v[1][ch] = pair[1];
    }
  } else {
    for_each_value(v, [&](RealOf<S>, int px, int ch) {
      const bool real = (px ? at.valid[1] : at.valid[0]) && c0 + ch < a.channels;
      return real ? to_real((px ? second : first)[ch * a.c]) : RealOf<S>(0);
    });
  }
}

template <class S, int CH>
SNNLSTM_DEVICE void store_patch(const Tensor& a, const Place& at, int c0,
                                RealOf<S> (&v)[2][CH]) {
  if (c0 >= a.channels) return;
  S* p = image_of<S>(a, at.t, at.n);
  S* first = p + offset(a, c0, at.y[0], at.x[0]);
  S* second = p + offset(a, c0, at.y[1], at.x[1]);
  if (a.access == Access::channels) {
    if (at.valid[0]) store_vector<S>(first, v[0]);
    if (at.valid[1]) store_vector<S>(second, v[1]);
  } else if (a.access == Access::rows) {
    if (!at.valid[0]) return;
#pragma unroll
    for (int ch = 0; ch < CH; ++ch) {
      const RealOf<S> pair[2] = {v[0][ch], v[1][ch]};
      if (c0 + ch < a.channels) store_vector<S>(first + ch * a.c, pair);
    }
  } else {
    for_each_value(v, [&](RealOf<S> value, int px, int ch) {
      const bool real = (px ? at.valid[1] : at.valid[0]) && c0 + ch < a.channels;
      if (real) (px ? second : first)[ch * a.c] = from_real<S>(value);
      return value;
    });
  }
}

template <class S, int CH>
SNNLSTM_DEVICE void load_patch(const Image& a, const Place& at, int c0, RealOf<S> (&v)[2][CH],
                               int plane = 0) {
  const S* p = image_of<const S>(a, at.t, at.n);
#pragma unroll
  for (int px = 0; px < 2; ++px) {
#pragma unroll
    for (int ch = 0; ch < CH; ++ch) v[px][ch] = 0;
    if (at.valid[px] && c0 < a.Cp)
      load_vector<S>(p + offset(a, plane, c0, at.y[px], at.x[px]), v[px]);
  }
}

template <class S, int CH>
SNNLSTM_DEVICE void store_patch(const Image& a, const Place& at, int c0,
                                const RealOf<S> (&v)[2][CH], int plane = 0) {
  S* p = image_of<S>(a, at.t, at.n);
#pragma unroll
  for (int px = 0; px < 2; ++px)
    if (at.valid[px] && c0 < a.Cp)
      store_vector<S>(p + offset(a, plane, c0, at.y[px], at.x[px]), v[px]);
}

}  // namespace snnlstm::cuda
