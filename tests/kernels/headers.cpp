// Compares headers of the CPU kernels, each alone, with plain loops in double: conv.h, winograd.h,
// tiles.h, sparse_list.h and sparse.h. test_headers.py compiles this file for each instruction set.
//
// The program prints the header and the sizes of the first case that differs, and ends with 1.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels/sparse.h"
#include "cpu/kernels/tiles.h"

SNNLSTM_BEGIN_ISA
namespace {

std::mt19937_64 random_bits(0);
int64_t compared = 0;

// Returns normally distributed numbers, of which a part is zero.
template <class T>
std::vector<T> numbers(int64_t count, double density = 1) {
  std::normal_distribution<double> normal;
  std::vector<T> made(count);
  for (T& one : made)
    if (std::generate_canonical<double, 32>(random_bits) < density) one = T(normal(random_bits));
  return made;
}

// A sum in double, with the sum of its terms' magnitudes.
struct Sum {
  double value = 0, terms = 0;
  void add(double term) { value += term, terms += std::abs(term); }
};

// What is compared, for the message: a header and some sizes.
struct Name {
  const char* header;
  std::vector<int64_t> sizes;
};

// `error` counts units of rounding of the terms.
template <class T>
void expect(T found, const Sum& exact, double error, const Name& name) {
  ++compared;
  if (std::abs(found - exact.value) <= error * std::numeric_limits<T>::epsilon() * exact.terms)
    return;
  std::printf("%s:", name.header);
  for (int64_t size : name.sizes) std::printf(" %d", int(size));
  std::printf(": found %.9g in the place of %.9g\n", double(found), exact.value);
  std::exit(1);
}

// ---- conv.h ------------------------------------------------------------------------------------

enum Beginning { nothing, bias, output };  // what the sums are added to

template <class S, int NV, class T = typename S::Scalar>
void check_conv() {
  constexpr int64_t width = NV * S::lanes, pixel = 7, next = width + 3;
  const Run runs[] = {{0, 0, 5}, {40, 9, 3}, {3, 5, 4}};  // not in the weight's order
  for (int64_t count : {1, 2, 3, 5, 8, 13, 25})
    for (int begin : {nothing, bias, output}) {
      const auto in = numbers<T>(count * pixel + 40), w = numbers<T>(12 * width);
      const auto before = numbers<T>(count * next), same = numbers<T>(width);
      auto out = before;
      const Start<T> start = begin == nothing ? Start<T>{}
                             : begin == bias  ? Start<T>{same.data(), 0}
                                              : Start<T>{out.data(), next};
      conv_row<S, NV>(in.data(), pixel, runs, 3, w.data(), start, out.data(), next, count);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t v = 0; v < next; ++v) {
          Sum sum;
          if (begin == output || v >= width) sum.add(before[p * next + v]);
          if (begin == bias && v < width) sum.add(same[v]);
          for (const Run& run : runs)
            for (int64_t k = 0; k < run.len && v < width; ++k)
              sum.add(double(in[p * pixel + run.in + k]) * w[(run.w + k) * width + v]);
          expect(out[p * next + v], sum, 4, {"conv.h", {S::lanes, NV, count, begin, p, v}});
        }
    }
}

// ---- winograd.h --------------------------------------------------------------------------------

// Correlates lines of vectors with taps by one axis' transforms, and adds what `outputs` held.
template <class S, class T = typename S::Scalar>
void check_transforms(int outputs, int taps) {
  const Axis axis{outputs, taps, 1};
  const int lines = 3, batches = 2, n = axis.inputs(), VL = S::lanes;
  const auto strides = [&](int length) {  // with a gap behind each line, and behind each batch
    const int64_t line = (length + 1) * VL;
    return Lines{VL, line, lines * line + VL};
  };
  const auto transformed = [&](auto pass, const std::vector<T>& from, int length, int to) {
    std::vector<T> out(batches * strides(to).batch);
    pass(from.data(), strides(length), out.data(), strides(to), lines, batches, nullptr, {});
    return out;
  };
  const auto x = numbers<T>(batches * strides(n).batch), start = numbers<T>(x.size());
  const auto w = numbers<T>(batches * strides(taps).batch);
  auto product = transformed(AxisTransforms<S>::inputs(axis), x, n, n);
  const auto of_taps = transformed(AxisTransforms<S>::taps(axis, taps), w, taps, n);
  for (size_t k = 0; k < product.size(); ++k) product[k] *= of_taps[k];
  std::vector<T> out(batches * strides(outputs).batch);
  AxisTransforms<S>::outputs(axis, outputs)(product.data(), strides(n), out.data(),
                                            strides(outputs), lines, batches, start.data(),
                                            strides(outputs));
  for (int b = 0; b < batches; ++b)
    for (int l = 0; l < lines; ++l)
      for (int m = 0; m < outputs; ++m)
        for (int lane = 0; lane < VL; ++lane) {
          const auto at = [&](int length, int k) {
            const Lines s = strides(length);
            return b * s.batch + l * s.line + k * s.step + lane;
          };
          Sum sum, all;  // the transforms round sums of all inputs
          sum.add(start[at(outputs, m)]);
          for (int k = 0; k < taps; ++k) sum.add(double(x[at(n, m + k)]) * w[at(taps, k)]);
          for (int k = 0; k < n; ++k) all.add(x[at(n, k)]);
          sum.terms += 2 * all.terms;
          expect(out[at(outputs, m)], sum, 6, {"winograd.h", {VL, outputs, taps, b, l, m, lane}});
        }
}

// ---- tiles.h -----------------------------------------------------------------------------------

// Convolves images in a block of tiles, with the transforms along both axes. The product is taken
// twice, and the second time added.
template <class S, int NV, class T = typename S::Scalar>
void check_tiles(const TileForm& form, int64_t dilation_h, int64_t dilation_w, int vectors) {
  constexpr int VL = S::lanes;
  constexpr int64_t width = NV * VL;
  TileBlock<T> b;
  b.form = form, b.dilation_h = dilation_h, b.dilation_w = dilation_w;
  b.images = 2, b.channels = vectors * VL;
  b.rows = 2 * dilation_h, b.columns = 5 * dilation_w;
  b.in_rows = b.rows + (form.h.parts - 1) * dilation_h;
  b.in_columns = b.columns + (form.w.parts - 1) * dilation_w;
  b.values_stride = point_stride<T>(b.images * b.image_values());
  b.products_stride = point_stride<T>(b.images * b.count() * width);
  const int64_t height = b.row(b.in_rows - 1) + form.h.inputs() * dilation_h;
  const int64_t row = (b.column(b.in_columns - 1) + form.w.inputs() * dilation_w) * b.channels;
  const int64_t len = b.channels - 1, taps = form.w.taps();  // the last channel has no weight
  const auto in = numbers<T>(b.images * height * row);
  const auto w = numbers<T>(form.h.taps() * taps * len * width);  // (kernel, len, width)

  std::vector<T> values(form.points() * b.values_stride);
  std::vector<T> products(form.points() * b.products_stride);
  std::vector<T> weight(form.points() * form.parts() * len * width);
  const InputTransform<S> transform(form);
  for (int64_t n = 0; n < b.images; ++n)
    transform.run(b, in.data() + n * height * row, row, b.channels,
                  values.data() + n * b.image_values());
  const auto of_taps = PlaneTransform<S>::taps(form, form.h.part, form.w.part);
  const int64_t tap = len * width, point = form.parts() * tap;
  for (int i = 0; i < form.h.parts; ++i)
    for (int j = 0; j < form.w.parts; ++j)
      for (int64_t k = 0; k < len; ++k)
        of_taps.run(w.data() + (i * form.h.part * taps + j * form.w.part) * tap + k * width,
                    {taps * tap, tap, VL}, weight.data() + (i * form.w.parts + j) * tap + k * width,
                    {form.w.inputs() * point, point, VL}, NV);
  multiply<S, NV>(b, values.data(), weight.data(), len, false, products.data());
  multiply<S, NV>(b, values.data(), weight.data(), len, true, products.data());

  const auto of_products = PlaneTransform<S>::outputs(form, form.h.tile, form.w.tile);
  std::vector<T> tile(form.h.tile * form.w.tile * width);
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t r = 0; r < b.rows; ++r)
      for (int64_t c = 0; c < b.columns; ++c) {
        of_products.run(products.data() + ((n * b.rows + r) * b.columns + c) * width,
                        {form.w.inputs() * b.products_stride, b.products_stride, VL}, tile.data(),
                        {form.w.tile * width, width, VL}, NV);
        for (int64_t out = 0; out < int64_t(tile.size()); ++out) {
          const int64_t y = b.row(r) + out / width / form.w.tile * dilation_h;
          const int64_t x = b.column(c) + out / width % form.w.tile * dilation_w;
          Sum sum;
          for (int i = 0; i < form.h.taps(); ++i)
            for (int j = 0; j < taps; ++j)
              for (int64_t k = 0; k < len; ++k)
                sum.add(2.0 * w[((i * taps + j) * len + k) * width + out % width] *
                        in[(n * height + y + i * dilation_h) * row +
                           (x + j * dilation_w) * b.channels + k]);
          expect(tile[out], sum, 32,
                 {"tiles.h",
                  {VL, NV, form.h.tile, form.h.taps(), form.w.tile, taps, dilation_h, dilation_w,
                   vectors, n, r, c, out}});
        }
      }
}

// ---- sparse_list.h and sparse.h ----------------------------------------------------------------

template <class T>
void check_list() {
  constexpr int shift = 5;
  for (int64_t count = 1; count < 28; ++count)
    for (double density : {0.0, 0.1, 0.5, 1.0}) {
      const int64_t rows = 3, row = count + 2, first = 96, next = 4096;
      auto x = numbers<T>(rows * row + kListSlack, density);
      x[0] = T(-0.0);  // is no entry, and NaN is one
      x[row] = std::numeric_limits<T>::quiet_NaN();
      std::vector<int32_t> label(rows * count + kListSlack);
      std::vector<T> value(label.size());
      const int64_t listed =
          list_nonzeros<shift>(x.data(), row, rows, count, first, next, label.data(), value.data());
      int64_t n = 0;
      const Name name{"sparse_list.h", {int64_t(sizeof(T)), count, int64_t(100 * density)}};
      for (int64_t k = 0; k < rows * count; ++k) {
        const T one = x[k / count * row + k % count];
        if (one == 0) continue;
        expect<double>(label[n], {double(first + k / count * next + (k % count << shift)), 0}, 0,
                       name);
        expect<double>(std::isnan(one) ? std::isnan(value[n]) : value[n] == one, {1, 0}, 0, name);
        ++n;
      }
      expect<double>(double(listed), {double(n), 0}, 0, name);
    }
}

template <class T, int VL>
void check_sparse(const Cell& c, double density) {
  const Layout<T, VL> l(c);
  const int64_t rows = 3, width = 4 * VL, taps = c.kernel_h * c.kernel_w;
  const SparseInput<T, VL> sparse(l, rows + 1);
  typename SparseInput<T, VL>::InputLists lists;
  Workspace counted(nullptr);
  sparse.carve(counted, lists);
  std::vector<char> memory(counted.bytes(), char(-1));
  Workspace arena(memory.data());
  sparse.carve(arena, lists);
  const int64_t row = l.Wx * c.Cin;
  const int64_t patch_rows = (rows - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
  const auto patch = numbers<T>(patch_rows * row + kListSlack, density);
  const auto w = numbers<T>(taps * c.Cin * width), before = numbers<T>(rows * l.Wr * width);
  auto out = before;
  sparse.build(patch.data(), rows, lists);
  sparse.convolve(lists, w.data(), out.data());
  for (int64_t p = 0; p < rows * l.Wo; ++p)
    for (int64_t v = 0; v < width; ++v) {
      Sum sum;
      sum.add(before[p * width + v]);
      const T* corner = patch.data() + p / l.Wo * c.stride_h * row + p % l.Wo * c.stride_w * c.Cin;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t k = 0; k < c.Cin; ++k)
          sum.add(double(corner[tap / c.kernel_w * c.dilation_h * row +
                                tap % c.kernel_w * c.dilation_w * c.Cin + k]) *
                  w[(tap * c.Cin + k) * width + v]);
      expect(out[p * width + v], sum, 4,
             {"sparse.h",
              {VL, c.Cin, c.W, c.kernel_h, c.kernel_w, c.stride_h, c.stride_w, c.dilation_h,
               c.dilation_w, int64_t(100 * density), p, v}});
    }
}

// ------------------------------------------------------------------------------------------------

template <class T, int VL>
void check_all() {
  using S = Simd<T, VL>;
  check_conv<S, 1>(), check_conv<S, 2>(), check_conv<S, 3>(), check_conv<S, 4>();
  check_list<T>();
  for (int64_t channels : {1, 5, 17, 60, 220})  // the taps of many channels are cut into groups
    for (const auto& [kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w] :
         {std::array<int, 6>{3, 3, 1, 1, 1, 1},
          {1, 1, 2, 3, 1, 1},
          {5, 3, 1, 2, 2, 3},
          {3, 5, 2, 1, 1, 2},
          {7, 1, 1, 3, 1, 1}}) {
      Cell c;
      c.N = 1, c.Cin = channels, c.C = 2 * VL - 1, c.H = c.W = 13;
      c.kernel_h = kernel_h, c.kernel_w = kernel_w, c.stride_h = stride_h, c.stride_w = stride_w;
      c.dilation_h = dilation_h, c.dilation_w = dilation_w;
      for (double density : {0.0, 0.07, 0.5}) check_sparse<T, VL>(c, density);
    }
  if constexpr (kHasWinograd<T, VL>) {
    using cpu::axis;
    // Outputs and taps; those of the weight gradient have the gradients of a tile as taps.
    for (const auto& [outputs, taps] :
         {std::pair{2, 3}, {3, 2}, {3, 3}, {4, 3}, {3, 4}, {2, 5}, {5, 2}, {4, 4}, {4, 5}})
      check_transforms<S>(outputs, taps);
    for (int vectors : {1, 2, 3})  // two short vectors are merged into a long one
      for (const auto& form : {TileForm{axis(3, 2), axis(3, 4)}, TileForm{axis(3, 3), axis(5, 2)},
                               TileForm{axis(5, 4), axis(1, 1)}, TileForm{axis(1, 1), axis(9, 4)},
                               TileForm{axis(9, 3), axis(7, 4)}, TileForm{axis(7, 4), axis(3, 3)}})
        for (const auto& [dilation_h, dilation_w] : {std::pair{1, 1}, {2, 1}, {1, 3}}) {
          check_tiles<S, 1>(form, dilation_h, dilation_w, vectors);
          check_tiles<S, 4>(form, dilation_h, dilation_w, vectors);
        }
  }
}

}  // namespace
SNNLSTM_END_ISA

int main() {
  using namespace snnlstm::SNNLSTM_ISA;
  check_all<float, kWideBytes / 4>();
  check_all<double, kWideBytes / 8>();
  if (kNarrowBytes < kWideBytes) check_all<float, kNarrowBytes / 4>();
  std::printf("%lld numbers\n", static_cast<long long>(compared));
}
