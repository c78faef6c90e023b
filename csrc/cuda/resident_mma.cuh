// Products on tensor cores of images and weights that lie in shared memory as a whole.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "resident.cuh"

namespace snnlstm::cuda {

// The type in which an image holds operands: tf32 is rounded once, when it is stored, and not
// whenever it is read.
template <class Element>
using Stored = std::conditional_t<std::is_same_v<Element, float>, tf32, Element>;

// table[2 u], table[2 u + 1]: bytes from a pixel of an even column, and of an odd one, to what unit
// u of a walk over the taps reads. chunks, tail_steps: of K, as MmaSegment has them.
SNNLSTM_DEVICE void fill_walk(int* table, const Segment& s, const SharedImage& image, int chunks,
                              int tail_steps) {
  const int full = 2 * s.taps(), units = full * (chunks - 1) + s.taps() * tail_steps;
  for (int u = int(threadIdx.x); u < units; u += int(blockDim.x)) {
    const int chunk = min(u / full, chunks - 1);
    const int steps = chunk + 1 < chunks ? 2 : tail_steps;
    const int tap = (u - chunk * full) / steps, step = (u - chunk * full) % steps;
    const int right = tap % s.taps_w * s.dilation_w;
    const int down = tap / s.taps_w * s.dilation_h * image.row + chunk * 64 + step * 32;
    unrolled<2>([&](int odd) {
      table[2 * u + odd] = down + image.pixel(0, odd + right) - image.pixel(0, odd);
    });
  }
}

// acc += a b for one k-step, as MmaGemm::product(), a of Stored<Element>.
template <class Element, int NT>
SNNLSTM_DEVICE void product_of_stored(Multiply multiply, uint32_t (&a)[2][4], SharedPlace b,
                                      float (&acc)[2][NT][4]) {
  using Gemm = MmaGemm<Element, NT, true>;
  if constexpr (std::is_same_v<Element, float>) {
    unrolled<NT / 2>(
        [&](int pair) { Gemm::add_pair(acc, pair, a, load<uint4>(b + pair * Gemm::kPairBytes)); });
  } else {
    Gemm::product(multiply, a, b, acc);
  }
}

// One half of a convolution for a warp's 32 pixels x NT n-tiles.
template <class Element, int NT>
struct ResidentWalk {
  static constexpr bool kParts = MmaGemm<Element, NT, true>::kParts;
  static constexpr int kFolded = 32;  // k-steps, where the tensor cores' sums are folded

  Multiply multiply;
  const Tiling& tiling;
  const SharedImage& image;  // pixels with all channels
  const int* table;          // see fill_walk()
  int units, unit_bytes;

  // b: the lane's B fragments of the first unit, moved on to the unit behind the last.
  SNNLSTM_DEVICE void add(int first_pixel, int step_h, int step_w, const unsigned char* from,
                          SharedPlace& b, float (&acc)[2][NT][4]) const {
    const int lane = int(threadIdx.x) % 32;
    SharedPlace row[2];
    int column = 0;
    unrolled<2>([&](int mi) {
      int y;
      const int m = first_pixel + mi * 16 + 2 * (lane % 8) + (lane >> 3 & 1);
      locate(tiling, image, m, step_h, step_w, y, column);
      if (fault(Fault::wrong_halo, 20)) ++column;
      row[mi] = shared_place(from + y + image.pixel(0, column) + (lane >> 4) * 16);
    });
    const int* offset = table + (column & 1);  // of both pixels: tiles are of even width
    if constexpr (kParts) {
#pragma unroll 1
      for (int first = 0; first < units; first += kFolded) {
        float part[2][NT][4] = {};
        add_units(row, offset, first, min(first + kFolded, units), b, part);
        unrolled<2 * NT * 4>([&](int i) { (&acc[0][0][0])[i] += (&part[0][0][0])[i]; });
      }
    } else {
      add_units(row, offset, 0, units, b, acc);
    }
  }

 private:
  SNNLSTM_DEVICE void add_units(const SharedPlace (&row)[2], const int* offset, int first, int last,
                                SharedPlace& b, float (&acc)[2][NT][4]) const {
#pragma unroll 1
    for (int u = first; u < last; ++u, b = b + unit_bytes) {
      const int at = offset[2 * u];
      uint32_t a[2][4];
      unrolled<2>([&](int mi) { ldmatrix(a[mi], row[mi] + at); });
      product_of_stored<Element>(multiply, a, b, acc);
    }
  }
};

}  // namespace snnlstm::cuda
