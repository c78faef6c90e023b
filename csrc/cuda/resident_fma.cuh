// Products without tensor cores of images and weights that lie in shared memory as a whole.
#pragma once

#include "fma.cuh"
#include "resident.cuh"

namespace snnlstm::cuda {

// Copies packed weights (column blocks, rows, 64), see fma.cuh, to (depth, columns) in shared
// memory; the caller waits for them. columns: a multiple of 4.
template <class R>
SNNLSTM_DEVICE void copy_rows(R* to, const R* from, int depth, int rows, int columns) {
  constexpr int kVector = 16 / sizeof(R);
  const int vectors = columns / kVector;
  for (int i = int(threadIdx.x); i < depth * vectors; i += int(blockDim.x)) {
    const int k = i / vectors, column = i % vectors * kVector;
    cp_async<16>(to + i * kVector, from + (column / fma::kColumns * rows + k) * fma::kColumns +
                                       column % fma::kColumns);
  }
}

// acc[pair][pixel][column] += the product of rows 0 ... depth - 1 of K, for 4 columns of weight and
// the pairs of pixels first, first + 1, first + 16, ... table: see fill_taps().
template <class R>
SNNLSTM_DEVICE void add_products(const Tiling& tiling, const SharedImage& image, int first,
                                 int step_h, int step_w, const unsigned char* from, int depth,
                                 const int* table, const R* weight, int pitch, R (&acc)[4][2][4]) {
  const unsigned char* pixels[4];
  unrolled<4>([&](int i) {
    int y, x;
    locate(tiling, image, first + 16 * i, step_h, step_w, y, x);
    pixels[i] = from + y + image.pixel(0, x);
  });
  const int next = step_w * int(sizeof(R));
#pragma unroll 2
  for (int k = 0; k < depth; ++k, weight += pitch) {
    const int tap = table[k];
    R right[4];
    load_vector(weight, right);
    unrolled<4>([&](int i) {
      const unsigned char* p = pixels[i] + tap;
      const R left[2] = {*reinterpret_cast<const R*>(p), *reinterpret_cast<const R*>(p + next)};
      unrolled<2, 4>([&](int px, int c) { acc[i][px][c] += left[px] * right[c]; });
    });
  }
}

}  // namespace snnlstm::cuda
