// Reads and writes images, the caller's and our own, in patches. A patch, 2 neighbouring pixels and
// CH neighbouring channels, is what one thread holds of a tile.
//
// Lane l of a warp holds pixels 2g, 2g + 1 (g = l % 8 or l / 4) and channels q * CH ... (q the
// other part of l). So a warp's access covers whole 32-byte sectors in both usual layouts:
//   channels last   for a pixel CH channels in one vector, neighbouring lanes side by side
//   contiguous      for a channel 2 pixels in one vector, neighbouring lanes side by side
// Other layouts (odd sizes, odd strides, unaligned pointers) are accessed element by element.
#pragma once

#include "math.cuh"

namespace snnlstm::cuda {

enum class Access : int {
  none,      // no tensor
  scalar,    // element by element
  rows,      // the channel's 2 pixels as one vector
  channels,  // the pixel's CH channels as one vector
};

// (T, N, channels, H, W), strides in elements. A tensor may have any size, but an image of it
// reaches over less than 2^31 elements.
struct Tensor {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int c = 0, h = 0, w = 0;
  int channels = 0;  // load_patch() gives 0 for channels beyond, store_patch() drops them
  Access access = Access::none;
  DType type = DType::float32;

  SNNLSTM_BOTH bool present() const { return access != Access::none; }
};

// The two neighbouring pixels of a patch. valid: whether each lies in the image.
struct PixelPair {
  int t, n;
  int y[2], x[2];
  bool valid[2];
};

// Returns the image of one time step and sample.
SNNLSTM_DEVICE void* image_of(const Tensor& a, int t, int n) {
  return static_cast<char*>(a.data) + (t * a.t + n * a.n) * bytes_of(a.type);
}
SNNLSTM_DEVICE int offset(const Tensor& a, int c, int y, int x) {
  return c * a.c + y * (fault(Fault::wrong_row_stride) ? a.w : a.h) + x * a.w;
}

// Images of ours, (T, N, H, width, planes, Cp), in which the vectors of every pixel are aligned.
struct Image {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int width = 0;
  int planes = 1;  // 4 if there is one for each gate
  int Cp = 0;
  DType type = DType::float32;

  SNNLSTM_BOTH bool present() const { return data != nullptr; }
};

SNNLSTM_DEVICE void* image_of(const Image& a, int t, int n) {
  return static_cast<char*>(a.data) + (t * a.t + n * a.n) * bytes_of(a.type);
}
SNNLSTM_DEVICE int offset(const Image& a, int plane, int c, int y, int x) {
  return ((y * a.width + x) * a.planes + plane) * a.Cp + c;
}

// Calls move(p, values) for the CH channels of each pixel, or for both pixels of each channel, or
// for each element, as the layout allows. The values come from v[pixel][channel] and go back there.
template <class Known, class R, int CH, class Move>
SNNLSTM_DEVICE void move_patch(const Tensor& a, const PixelPair& at, int c0, R (&v)[2][CH],
                               Move&& move) {
  if (c0 >= a.channels) return;
  with_stored<R, Known>(a.type, [&](auto of) {
    auto* p = static_cast<decltype(of)*>(image_of(a, at.t, at.n));
    decltype(p) pixel[2] = {p + offset(a, c0, at.y[0], at.x[0]),
                            p + offset(a, c0, at.y[1], at.x[1])};
    if (a.access == Access::channels) {
      unrolled<2>([&](int px) {
        if (at.valid[px]) move(pixel[px], v[px]);
      });
    } else if (Known::kVectors || a.access == Access::rows) {
      unrolled<CH>([&](int ch) {
        if (!at.valid[0] || c0 + ch >= a.channels) return;
        R pair[2] = {v[0][ch], v[1][ch]};
        move(pixel[0] + ch * a.c, pair);
        v[0][ch] = pair[0], v[1][ch] = pair[1];
      });
    } else {
      unrolled<CH, 2>([&](int ch, int px) {
        if (!at.valid[px] || c0 + ch >= a.channels) return;
        R one[1] = {v[px][ch]};
        move(pixel[px] + ch * a.c, one);
        v[px][ch] = one[0];
      });
    }
  });
}

// Loads v[pixel][channel] of channels c0, c0 + 1, ...; values outside of the tensor are 0.
template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void load_patch(const Tensor& a, const PixelPair& at, int c0, R (&v)[2][CH]) {
  clear<2 * CH>(&v[0][0]);
  move_patch<Known>(a, at, c0, v, [](const auto* p, auto& values) { load_vector(p, values); });
}

template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void store_patch(const Tensor& a, const PixelPair& at, int c0, const R (&v)[2][CH]) {
  R copy[2][CH];
  unrolled<2, CH>([&](int px, int ch) { copy[px][ch] = v[px][ch]; });
  move_patch<Known>(a, at, c0, copy, [](auto* p, auto& values) { store_vector(p, values); });
}

template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void load_patch(const Image& a, const PixelPair& at, int c0, R (&v)[2][CH],
                               int plane = 0) {
  const void* p = image_of(a, at.t, at.n);
  clear<2 * CH>(&v[0][0]);
  unrolled<2>([&](int px) {
    if (at.valid[px] && c0 < a.Cp)
      read_vector<R, Known>(p, a.type, offset(a, plane, c0, at.y[px], at.x[px]), v[px]);
  });
}

template <class Known = Unknown, class R, int CH>
SNNLSTM_DEVICE void store_patch(const Image& a, const PixelPair& at, int c0, const R (&v)[2][CH],
                                int plane = 0) {
  void* p = image_of(a, at.t, at.n);
  unrolled<2>([&](int px) {
    if (at.valid[px] && c0 < a.Cp)
      write_vector<R, Known>(p, a.type, offset(a, plane, c0, at.y[px], at.x[px]), v[px]);
  });
}

// The values of a patch that a thread keeps in shared memory, in vectors of kLength. Vectors of
// neighbouring threads are neighbours.
template <class R, int CH>
struct Slot {
  static constexpr int kVectors = CH == 1 ? 1 : CH / 2, kLength = 2 * CH / kVectors;

  SNNLSTM_DEVICE static R* of(R* slots, int patch) {
    return slots + (patch * kVectors * int(blockDim.x) + int(threadIdx.x)) * kLength;
  }
  SNNLSTM_DEVICE static void keep(R* slot, const R (&v)[2][CH]) {
    const R* flat = &v[0][0];
    unrolled<kVectors>([&](int k) {
      R part[kLength];
      unrolled<kLength>([&](int i) { part[i] = flat[k * kLength + i]; });
      store_vector(slot + k * kLength * int(blockDim.x), part);
    });
  }
  SNNLSTM_DEVICE static void get(const R* slot, R (&v)[2][CH]) {
    R* flat = &v[0][0];
    unrolled<kVectors>([&](int k) {
      R part[kLength];
      load_vector(slot + k * kLength * int(blockDim.x), part);
      unrolled<kLength>([&](int i) { flat[k * kLength + i] = part[i]; });
    });
  }
};

}  // namespace snnlstm::cuda
