// Winograd on blocks of tiles (winograd.h has the transforms). After the transform of the inputs of
// all tiles of a block, each point of a tile has one matrix product over the channels and over the
// parts of the kernel:
//
//   products[point][tile][NV * VL] (+)= sum over part, k:
//       values[point][tile + part][k] * weight[point][part][k][NV * VL]
//
// A point's rows of weight and products stay in L1 while the block's tiles pass over them, and the
// block is chosen to keep `values` and `products` in L2.
#pragma once

#include <type_traits>

#include "layout.h"
#include "winograd.h"

SNNLSTM_BEGIN_ISA

// Returns the distance of points of `count` elements each. It is an odd number of cache lines, so
// that the points of a tile do not all fall into the same sets of the cache.
template <class T>
inline int64_t point_stride(int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((count + line - 1) / line | 1) * line;
}

// The block has whole rows of tiles of one image, or of several images one after the other. With
// dilation d a tile takes every d-th pixel, and d tiles that begin at neighbouring pixels
// interleave.
template <class T>
struct TileBlock {
  WinogradTile winograd;
  int64_t dilation_h, dilation_w;
  int64_t rows, columns;        // of tiles
  int64_t in_rows, in_columns;  // of tiles of inputs, with the tiles that other parts read
  int64_t channels;             // of a tile's values, in whole vectors
  int64_t values_stride, products_stride;
  int64_t images = 1;

  int64_t count() const { return rows * columns; }  // of one image
  int64_t image_values() const { return in_rows * in_columns * channels; }
  // These return the first row and column of a tile.
  int64_t row(int64_t r) const {
    return r / dilation_h * dilation_h * winograd.h.tile + r % dilation_h;
  }
  int64_t column(int64_t c) const {
    return c / dilation_w * dilation_w * winograd.w.tile + c % dilation_w;
  }
  // Returns the distance, in a point's values, from a tile to the one that part (i, j) of the
  // kernel sees.
  int64_t part(int64_t i, int64_t j) const {
    return (i * dilation_h * in_columns + j * dilation_w) * channels;
  }
};

// Describes a block of `rows` rows (at most rows_of_tiles()) and `channels` input channels in
// `images` images, with memory for most_images.
template <class T, int VL>
TileBlock<T> tile_block(const Layout<T, VL>& l, const WinogradTile& winograd, int64_t rows,
                        int64_t channels, int64_t images, int64_t most_images) {
  TileBlock<T> b;
  b.winograd = winograd;
  b.dilation_h = l.c.dilation_h;
  b.dilation_w = l.c.dilation_w;
  const auto more = [&](const Axis& a, int64_t dilation) { return (a.parts - 1) * dilation; };
  b.rows = l.tiles(winograd.h, l.c.dilation_h, rows);
  b.columns = l.tiles(winograd.w, l.c.dilation_w, l.Wo);
  b.in_rows = b.rows + more(winograd.h, l.c.dilation_h);
  b.in_columns = b.columns + more(winograd.w, l.c.dilation_w);
  b.channels = channels;
  b.images = images;
  const int64_t most = l.tiles(winograd.h, l.c.dilation_h, l.rows_of_tiles(winograd));
  b.values_stride = point_stride<T>(most_images * (most + more(winograd.h, l.c.dilation_h)) *
                                    b.in_columns * channels);
  b.products_stride = point_stride<T>(most_images * most * b.columns * 4 * VL);
  return b;
}

// Counts the pixels of a tile along an axis, one of every `dilation`, among the last `left` pixels.
inline int64_t pixels_inside(int64_t left, int64_t dilation, int64_t tile) {
  const int64_t count = left > 0 ? (left + dilation - 1) / dilation : 0;
  return count < tile ? count : tile;
}

// A thread keeps a block's values and products at all points.
template <class T>
struct TileBuffers {
  T *values, *products;
};

// The number of elements of TileBuffers for Winograd's tiles of some images with `channels` input
// channels. It is 0 for a cell without tiles.
struct TileSizes {
  int64_t values = 0, products = 0;

  template <class T, int VL>
  TileSizes(const Layout<T, VL>& l, const WinogradTile& winograd, int64_t channels,
            int64_t images) {
    if (!l.c.tiled()) return;
    const TileBlock<T> b = tile_block(l, winograd, 0, channels, images, images);
    values = winograd.points() * b.values_stride;
    products = winograd.points() * b.products_stride;
  }
  void cover(const TileSizes& other) {
    if (other.values > values) values = other.values;
    if (other.products > products) products = other.products;
  }
  template <class T>
  TileBuffers<T> allocate(Workspace& workspace) const {
    T* first = workspace.take<T>(values);
    return {first, workspace.take<T>(products)};
  }
};

// Transforms the inputs of a block.
template <class S>
class InputTransform {
  using T = typename S::Scalar;
  using Longer = typename Merged<S, 2>::Vector;  // taken if a tile's channels fill whole vectors
  struct Nothing {};
  static constexpr int kTiles = 4;  // neighbouring tiles share the transform along their columns

 public:
  InputTransform() = default;
  explicit InputTransform(const WinogradTile& t)
      : h_(AxisTransforms<S>::inputs(t.h)), w_(AxisTransforms<S>::inputs(t.w)) {
    if constexpr (Longer::lanes > S::lanes) longer_ = InputTransform<Longer>(t);
  }

  // Transforms one image. `in` is the first pixel, counted with the border, of the first tile's
  // inputs.
  void run(const TileBlock<T>& b, const T* in, int64_t row, int64_t pixel, T* values) const {
    if constexpr (Longer::lanes > S::lanes)
      if (b.channels % Longer::lanes == 0) return longer_.run(b, in, row, pixel, values);
    const int most = b.dilation_w > 1 ? 1 : kTiles;
    for (int64_t r = 0; r < b.in_rows; ++r)
      for (int64_t c = 0; c < b.in_columns; c += most) {
        const int count = b.in_columns - c < most ? int(b.in_columns - c) : most;
        const T* corner = in + b.row(r) * row + b.column(c) * pixel;
        T* out = values + (r * b.in_columns + c) * b.channels;
        for (int64_t ch = 0; ch < b.channels; ch += S::lanes)
          tiles(b, corner + ch, row * b.dilation_h, pixel * b.dilation_w, count, out + ch);
      }
  }

 private:
  // Transforms one vector of channels of neighbouring tiles.
  void tiles(const TileBlock<T>& b, const T* in, int64_t row, int64_t pixel, int count,
             T* out) const {
    const int inputs = b.winograd.w.inputs();
    const int64_t point = b.values_stride;
    const int64_t points = inputs * point;
    const int64_t next = b.winograd.w.tile * pixel;
    if (!w_) return h_(in, {row, pixel, 0}, out, {points, b.channels, 0}, count, 1, nullptr, {});
    if (!h_) return w_(in, {pixel, next, 0}, out, {point, b.channels, 0}, count, 1, nullptr, {});
    alignas(64) T half[8 * (3 * 4 + 8) * S::lanes];
    const int columns = (count - 1) * b.winograd.w.tile + inputs;
    const int64_t half_row = columns * S::lanes;
    h_(in, {row, pixel, 0}, half, {half_row, S::lanes, 0}, columns, 1, nullptr, {});
    w_(half, {S::lanes, half_row, b.winograd.w.tile * S::lanes}, out, {point, points, b.channels},
       b.winograd.h.inputs(), count, nullptr, {});
  }

  AxisTransform<T> h_ = nullptr, w_ = nullptr;
  std::conditional_t<(Longer::lanes > S::lanes), InputTransform<Longer>, Nothing> longer_;
};

// The channels of a part that a tile's products sum over: the first `used` of every `every`.
struct SummedChannels {
  int64_t len, every, used;
  SummedChannels(int64_t len) : len(len), every(len), used(len) {}  // NOLINT
  SummedChannels(int64_t len, int64_t every, int64_t used) : len(len), every(every), used(used) {}
};

// Calls f(first run, number of runs) for pieces of at most `most` of the values that a tile's
// products sum over. Sums in pieces round less.
template <int most, class T, class F>
void part_runs(const TileBlock<T>& b, const SummedChannels& summed, F&& f) {
  const int64_t len = summed.len;
  const int64_t used = summed.used;
  const int64_t pieces = (used + most - 1) / most;
  Run runs[most];
  int64_t values = 0;
  int number = 0;
  for (int i = 0; i < b.winograd.h.parts; ++i)
    for (int j = 0; j < b.winograd.w.parts; ++j)
      for (int64_t first = 0; first < len; first += summed.every)
        for (int64_t p = 1, begin = 0, end; p <= pieces; ++p, begin = end) {
          end = p < pieces ? used * p / pieces : used;
          if (values + end - begin > most) {
            f(runs, number);
            values = number = 0;
          }
          runs[number++] = {b.part(i, j) + first + begin,
                            (i * b.winograd.w.parts + j) * len + first + begin, end - begin};
          values += end - begin;
        }
  if (number > 0) f(runs, number);
}

// A block's tiles as the longest rows of tiles whose values lie side by side.
struct TileRows {
  int64_t images, rows, columns;
  int64_t image, row;  // distances of values, from one image or row to the next

  template <class T>
  explicit TileRows(const TileBlock<T>& b)
      : images(b.images),
        rows(b.rows),
        columns(b.columns),
        image(b.image_values()),
        row(b.in_columns * b.channels) {
    if (b.in_columns == b.columns) {
      columns *= rows;
      rows = 1;
    }
    if (rows == 1 && image == columns * b.channels) {
      columns *= images;
      images = 1;
    }
  }
};

// Writes the products with a weight (points, parts, len, NV * VL), or adds them to `products`. Sums
// of more than `longest` values would have larger errors.
template <class S, int NV, int longest = 48, class T = typename S::Scalar>
void multiply(const TileBlock<T>& b, const T* values, const T* weight, const SummedChannels& summed,
              bool add, T* products) {
  constexpr int64_t width = NV * S::lanes;
  constexpr int64_t in_cache = chunk_length<T>(width);
  constexpr int most = in_cache < longest ? in_cache : longest;
  const TileRows rows(b);
  for (int k = 0; k < b.winograd.points(); ++k) {
    const T* w = weight + k * b.winograd.parts() * summed.len * width;
    T* out = products + k * b.products_stride;
    bool more = add;
    part_runs<most>(b, summed, [&](const Run* runs, int number) {
      for (int64_t n = 0; n < rows.images; ++n)
        for (int64_t r = 0; r < rows.rows; ++r) {
          T* to = out + (n * rows.rows + r) * rows.columns * width;
          conv_row<S, NV>(values + k * b.values_stride + n * rows.image + r * rows.row, b.channels,
                          runs, number, w, more ? Start<T>{to, width} : Start<T>{}, to, width,
                          rows.columns);
        }
      more = true;
    });
  }
}

SNNLSTM_END_ISA
