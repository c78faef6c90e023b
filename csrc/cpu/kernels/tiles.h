// Winograd on blocks of tiles (winograd.h has the transforms of one): transform all tiles of a
// block, then for each of the A * A points one matrix product over the channels
//
//   products[point][tile][NV * VL] (+)= sum over k:  values[point][tile][k] * weight[point][k][NV *
//   VL]
//
// A point's rows of weight and products stay in L1 while the block's tiles pass over them, and the
// block is chosen to keep `values` and `products` in L2.
#pragma once

#include "layout.h"
#include "winograd.h"

SNNLSTM_BEGIN_ISA

// Elements between the points of `count` elements each. An odd number of cache lines: the points of
// a tile must not all fall into the same sets of the cache.
template <class T>
inline int64_t point_stride(int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((count + line - 1) / line | 1) * line;
}

// Tile rows [first row / M, ...) of one image, each of all its columns of tiles.
template <class T>
struct TileBlock {
  int64_t rows, columns;  // of tiles
  int64_t channels;       // of values, per tile; whole vectors
  int64_t values_stride, products_stride;

  int64_t count() const { return rows * columns; }
};

// `rows` rows, of a block at most, in tiles of m x m with so many input channels.
template <class T, int VL>
TileBlock<T> tile_block(const Layout<T, VL>& l, int64_t m, int64_t rows, int64_t channels) {
  const int64_t columns = (l.Wo + m - 1) / m, most = l.rows_of_tiles(m) / m * columns;
  return {(rows + m - 1) / m, columns, channels, point_stride<T>(most * channels),
          point_stride<T>(most * 4 * VL)};
}

// What one thread keeps of a block: values and products at all points.
template <class T>
struct TileBuffers {
  T *values, *products;
};

// The number of elements of TileBuffers for tiles of m x m with so many input channels; 0 for m =
// 0.
struct TileSizes {
  int64_t values = 0, products = 0;

  template <class T, int VL>
  TileSizes(const Layout<T, VL>& l, int64_t m, int64_t channels) {
    if (m == 0) return;
    const TileBlock<T> b = tile_block(l, m, 0, channels);
    values = l.points_of(m) * b.values_stride;
    products = l.points_of(m) * b.products_stride;
  }
  void cover(const TileSizes& other) {
    if (other.values > values) values = other.values;
    if (other.products > products) products = other.products;
  }
  template <class T>
  TileBuffers<T> carve(Arena& arena) const {
    T* first = arena.take<T>(values);
    return {first, arena.take<T>(products)};
  }
};

// in: first pixel of the first tile's inputs, border included.
template <class W, class S, class T = typename S::Scalar>
void transform_inputs(const TileBlock<T>& b, int64_t tile, const T* in, int64_t row, int64_t pixel,
                      T* values) {
  for (int64_t r = 0; r < b.rows; ++r)
    for (int64_t c = 0; c < b.columns; ++c, values += b.channels) {
      const T* corner = in + r * tile * row + c * tile * pixel;
      for (int64_t ch = 0; ch < b.channels; ch += S::lanes)
        W::inputs(corner + ch, row, pixel, values + ch, b.values_stride);
    }
}

// weight: (points, len, NV * VL). add: to what products hold already.
template <class S, int NV, class T = typename S::Scalar>
void multiply(const TileBlock<T>& b, int points, const T* values, const T* weight, int64_t len,
              bool add, T* products) {
  constexpr int64_t width = NV * S::lanes, in_cache = chunk_length<T>(width);
  constexpr int64_t chunk = in_cache < 48 ? in_cache : 48;  // longer sums would round more
  for (int k = 0; k < points; ++k) {
    T* out = products + k * b.products_stride;
    Start<T> start;
    if (add) start = {out, width};
    for (int64_t first = 0; first < len; first += chunk) {
      const Run run{first, first, len - first < chunk ? len - first : chunk};
      conv_row<S, NV>(values + k * b.values_stride, b.channels, &run, 1, weight + k * len * width,
                      start, out, width, b.count());
      start = {out, width};
    }
  }
}

SNNLSTM_END_ISA
