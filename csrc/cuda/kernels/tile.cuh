// The part of a tile (tile.h) that a block and its threads have.
#pragma once

#include "tensor.cuh"

namespace snnlstm::cuda {

struct BlockPlace {
  int t, n, y0, x0, column;
  unsigned tile;  // number of the tile among all images
};

SNNLSTM_DEVICE BlockPlace block_of(const Tiling& tiling, unsigned index) {
  const auto take = [&](int count) {
    const unsigned rest = index % unsigned(count);
    index /= unsigned(count);
    return int(rest);
  };
  BlockPlace b;
  b.column = take(tiling.columns);
  b.tile = index;
  b.x0 = take(tiling.cols) * tiling.w;
  b.y0 = take(tiling.rows) * tiling.h;
  b.n = take(tiling.batch);
  b.t = int(index);
  return b;
}

// Says whether the block's step comes after its sample's last one. lengths: (N,), or null.
SNNLSTM_DEVICE bool is_padded(const int64_t* lengths, const BlockPlace& b) {
  return lengths != nullptr && lengths[b.n] <= b.t;
}

// Returns the job of block `index`, which becomes the block's number within the job. The blocks of
// the first job come first.
template <class Job, class Index>
SNNLSTM_DEVICE const Job& job_of(const Job (&job)[2], Index blocks_of_first, Index& index) {
  const bool second = index >= blocks_of_first;
  if (second) index -= blocks_of_first;
  return job[second ? 1 : 0];
}

// Returns pixels m and m + 1 of the tile.
SNNLSTM_DEVICE PixelPair pixel_pair(const Tiling& tiling, const BlockPlace& b, int m, int height,
                                    int width) {
  PixelPair p;
  p.t = b.t;
  p.n = b.n;
  int row = m / tiling.w, col = m % tiling.w;
  unrolled<2>([&](int k) {
    p.y[k] = b.y0 + row;
    p.x[k] = b.x0 + col;
    const int limit = width + (fault(Fault::wrong_tail_mask) ? 1 : 0);
    p.valid[k] = row < tiling.h && p.y[k] < height && p.x[k] < limit;
    if (++col == tiling.w) {
      col = 0;
      ++row;
    }
  });
  return p;
}

}  // namespace snnlstm::cuda
