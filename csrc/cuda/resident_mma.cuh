// Products on tensor cores of images and weights that lie in shared memory as a whole.
#pragma once

#include "mma.cuh"
#include "resident.cuh"

namespace snnlstm::cuda {

// One half of a convolution for a warp's 32 pixels x NT n-tiles.
template <class Element, int NT>
struct ResidentWalk {
  Multiply multiply;
  const Tiling& tiling;
  const SharedImage& image;  // pixels with all channels
  const Segment& taps;
  int chunks, tail_steps;  // of K, as MmaSegment has them
  int unit_bytes;

  // b: the lane's B fragments of the first unit, moved on to the unit behind the last.
  SNNLSTM_DEVICE void add(int first_pixel, int step_h, int step_w, const unsigned char* from,
                          const unsigned char*& b, float (&acc)[2][NT][4]) const {
    const int lane = int(threadIdx.x) % 32;
    const unsigned char* row[2];
    int column[2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      int y;
      const int m = first_pixel + mi * 16 + 2 * (lane % 8) + (lane >> 3 & 1);
      locate(tiling, image, m, step_h, step_w, y, column[mi]);
      if (fault(Fault::wrong_halo, 20)) ++column[mi];
      row[mi] = from + y + (lane >> 4) * 16;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int steps = chunk + 1 < chunks ? 2 : tail_steps;
#pragma unroll 1
      for (int tap_h = 0; tap_h < taps.taps_h; ++tap_h) {
        const int down = tap_h * taps.dilation_h * image.row + chunk * 64;
#pragma unroll 1
        for (int tap_w = 0; tap_w < taps.taps_w; ++tap_w) {
          int at[2];
#pragma unroll
          for (int mi = 0; mi < 2; ++mi)
            at[mi] = down + image.pixel(0, column[mi] + tap_w * taps.dilation_w);
#pragma unroll 1
          for (int step = 0; step < steps; ++step) {
            uint32_t a[2][4];
#pragma unroll
            for (int mi = 0; mi < 2; ++mi) ldmatrix(a[mi], row[mi] + at[mi] + step * 32);
            MmaGemm<Element, NT, true>::product(multiply, a, b, acc);
            b += unit_bytes;
          }
        }
      }
    }
  }
};

}  // namespace snnlstm::cuda
