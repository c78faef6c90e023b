// max_pool2d and avg_pool2d of images, with results and gradients that equal torch's by bits.
//
// A vector has neighbouring outputs of a row or, in channels-last images, neighbouring channels of
// an output. A maximum starts at -infinity with the place of the first pixel, and goes through its
// window row by row; a pixel is taken if it is larger than the maximum so far, or NaN. An average
// is summed from +0 in the same order. So is a gradient, in the order of the outputs.
#pragma once

#include "places.h"
#include "threads.h"

SNNLSTM_BEGIN_ISA

// Lines of neighbouring outputs. Their windows have the same pixels within the image, or within the
// rows of it that a task has; all other pixels do not count here.
struct PoolRun {
  int64_t x, y;  // the offsets, in x and y, of the first window's first pixel and of its output
  int64_t lines, length;
  int64_t rows, columns;  // of pixels in a window
  int64_t place;          // the number of the first pixel in the whole window, row by row
  int64_t divisor;        // of an average
};

template <class T>
class Pool2d {
 public:
  static void forward(const PoolForwardArgs& a) {
    const Pool2d pool(a);
    if (a.channels_last || a.stride_w == 1) return pool.each_output<1>(a);
    if (a.stride_w == 2) return pool.each_output<2>(a);
    pool.each_output<0>(a);
  }

  static void backward(const PoolBackwardArgs& a) {
    const Pool2d pool(a);
    const int64_t rows = pool.images_ * a.H;
    const int64_t chunk = std::max(kTask / pool.row_, 4 * a.kernel_h);
    parallel_for(a.threads, (rows + chunk - 1) / chunk, 2 * chunk * pool.row_,
                 [&](int64_t task, int) {
                   pool.gradient(a, task * chunk, std::min(rows, (task + 1) * chunk));
                 });
  }

 private:
  static constexpr int VL = kWideBytes / sizeof(T);
  static constexpr int64_t kTask = 8192;  // elements of x, which fit the L1 cache
  template <int L>
  using Places = StoredPlaces<Simd<T, L>>;

  // The windows along one side of an image, which begin at `stride * k - padding`. Those from
  // `first` to `end` lie between `top` and `bottom`.
  struct Side {
    int64_t stride, padding, kernel, size, count, top, bottom, first, end;

    Side(int64_t stride_, int64_t padding_, int64_t kernel_, int64_t size_, int64_t count_)
        : stride(stride_), padding(padding_), kernel(kernel_), size(size_), count(count_) {
      *this = within(0, size);
    }
    Side within(int64_t top_, int64_t bottom_) const {
      Side s = *this;
      s.top = top_, s.bottom = bottom_;
      const int64_t last = bottom_ + padding - kernel;
      s.first = std::min(count, (top_ + padding + stride - 1) / stride);
      s.end = std::max(s.first, last < 0 ? 0 : std::min(count, last / stride + 1));
      return s;
    }
    // Returns how many windows, from k on and before `most`, have the same pixels.
    int64_t alike(int64_t k, int64_t most) const {
      return first <= k && k < end ? std::min(end, most) - k : 1;
    }
    int64_t begin(int64_t k) const { return k * stride - padding; }
    // Returns the length of window k between `top` and `bottom`.
    int64_t pixels(int64_t k) const {
      return std::min(begin(k) + kernel, bottom) - std::max(begin(k), top);
    }
    // Returns the length of window k by which an average is divided.
    int64_t counted(int64_t k, bool counts_padding) const {
      const int64_t least = counts_padding ? begin(k) : std::max<int64_t>(begin(k), 0);
      return std::min(begin(k) + kernel, counts_padding ? size + padding : size) - least;
    }
  };

  const PoolArgs& a;
  // The distances, in elements of x, of pixels and rows, of neighbouring outputs, and of lines.
  const int64_t pixel_ = a.channels_last ? a.C : 1, row_ = a.W * pixel_;
  const int64_t step_ = a.channels_last ? 1 : a.stride_w;
  const int64_t line_ = a.channels_last ? a.stride_w * pixel_ : a.stride_h * row_;
  const int64_t line_of_y_ = a.channels_last ? a.C : a.Wo;
  const int64_t images_ = a.channels_last ? a.N : a.N * a.C;
  const Side height_{a.stride_h, a.padding_h, a.kernel_h, a.H, a.Ho};
  const Side width_{a.stride_w, a.padding_w, a.kernel_w, a.W, a.Wo};
  const bool wide_ = a.place_bytes() > 1;
  int64_t offsets_[256] = {};  // what offset() returns, if windows have so few pixels

  explicit Pool2d(const PoolArgs& args) : a(args) {
    for (int64_t k = 0, i = 0; !wide_ && i < a.kernel_h; ++i)
      for (int64_t j = 0; j < a.kernel_w; ++j) offsets_[k++] = i * row_ + j * pixel_;
  }

  // Returns the offset of a pixel of a window from its first one.
  int64_t offset(int64_t place) const {
    return place / a.kernel_w * row_ + place % a.kernel_w * pixel_;
  }

  // ---- vectors -----------------------------------------------------------------------------------

  // Calls f(Count<L>(), k, done) for vectors of L numbers from k on, which cover n numbers. The
  // last vector's first `done` lanes are also those of the vector before.
  template <int L, class F>
  static SNNLSTM_INLINE void each_vector(int64_t n, F&& f) {
    if (n >= L)
      for (int64_t k = 0; k < n; k += L) {
        const int64_t at = std::min(k, n - L);
        f(Count<L>(), at, k - at);
      }
    else if constexpr (L * sizeof(T) > 16)
      each_vector<L / 2>(n, f);
    else
      for (int64_t k = 0; k < n; ++k) f(Count<1>(), k, int64_t(0));
  }

  // Calls f(Count<L>(), x, y, done) for the vectors of all lines of a run. x and y are offsets.
  template <class F>
  SNNLSTM_INLINE void each_vector_of(const PoolRun& run, F&& f) const {
    for (int64_t line = 0; line < run.lines; ++line)
      each_vector<VL>(
          run.length, [&](auto lanes, int64_t k, int64_t done) __attribute__((always_inline)) {
            f(lanes, run.x + line * line_ + k * step_, run.y + line * line_of_y_ + k, done);
          });
  }

  // Loads L numbers that are Step apart, or step_ if Step is 0. Reads nothing beyond the last one.
  template <int L, int Step>
  SNNLSTM_INLINE typename Simd<T, L>::R load(const T* p) const {
    using S = Simd<T, L>;
    if constexpr (Step == 1) {
      return S::load(p);
    } else if constexpr (Step == 2) {
      return S::every_other(S::load(p), S::load(p + L - 1));
    } else {
      typename S::R v;
      for (int lane = 0; lane < L; ++lane) v[lane] = p[lane * step_];
      return v;
    }
  }

  // ---- windows -----------------------------------------------------------------------------------

  // Calls f(run) for all runs of an image, in the rows of outputs from `begin` to `end`. `height` is
  // height_ or a part of it. If `in_order`, each pixel meets its windows in the order of outputs.
  template <class F>
  SNNLSTM_INLINE void each_run(const Side& height, int64_t image, int64_t begin, int64_t end,
                               bool in_order, F&& f) const {
    PoolRun run;
    const bool by_row = a.channels_last ||
                        (in_order && a.kernel_h > a.stride_h && width_.end - width_.first < a.Wo);
    for (int64_t oh = begin, high; oh < end; oh += high) {
      high = by_row ? 1 : height.alike(oh, end);
      const int64_t h = height.begin(oh), first_row = std::max(h, height.top);
      run.rows = height.pixels(oh);
      for (int64_t ow = 0, wide; ow < a.Wo; ow += wide) {
        wide = width_.alike(ow, a.Wo);
        const int64_t w = width_.begin(ow), first_column = std::max<int64_t>(w, 0);
        run.columns = width_.pixels(ow);
        run.x = (image * a.H + first_row) * row_ + first_column * pixel_;
        run.y = ((image * a.Ho + oh) * a.Wo + ow) * pixel_;
        run.lines = a.channels_last ? wide : high;
        run.length = a.channels_last ? a.C : wide;
        run.place = (first_row - h) * a.kernel_w + first_column - w;
        run.divisor =
            a.divisor ? a.divisor
                      : height.counted(oh, a.counts_padding) * width_.counted(ow, a.counts_padding);
        f(run);
      }
    }
  }

  // Calls f(pixel, i, j) for row i and column j of a window, whose first pixel is at x. K is the
  // number of rows and of columns, if this is compiled for it, else 0.
  template <int K, class F>
  SNNLSTM_INLINE void each_pixel(const PoolRun& run, const T* x, F&& f) const {
    const int64_t rows = K ? K : run.rows, columns = K ? K : run.columns;
#pragma GCC unroll 3
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 3
      for (int64_t j = 0; j < columns; ++j) f(x + i * row_ + j * pixel_, i, j);
  }

  // ---- the forward pass --------------------------------------------------------------------------

  template <int Step>
  void each_output(const PoolForwardArgs& f) const {
    const bool max = a.pool == Pool::max, placed = f.places;
    const auto compute = !max     ? &Pool2d::average<Step>
                         : placed ? &Pool2d::maximum<Step, true>
                                  : &Pool2d::maximum<Step, false>;
    const int64_t cost = a.Wo * pixel_ * a.kernel_h * a.kernel_w;
    const int64_t rows = images_ * a.Ho, chunk = std::max<int64_t>(1, 4 * kTask / cost);
    parallel_for(a.threads, (rows + chunk - 1) / chunk, chunk * cost, [&](int64_t task, int) {
      const int64_t begin = task * chunk, end = std::min(rows, begin + chunk);
      for (int64_t image = begin / a.Ho; image * a.Ho < end; ++image)
        each_run(height_, image, std::max<int64_t>(0, begin - image * a.Ho),
                 std::min(a.Ho, end - image * a.Ho), false,
                 [&](const PoolRun& run) { (this->*compute)(f, run); });
    });
  }

  template <int Step, bool placed>
  void maximum(const PoolForwardArgs& f, const PoolRun& run) const {
    const bool whole = run.rows == a.kernel_h && run.columns == a.kernel_w;
    if (Step > 0 && whole && run.rows == 2 && run.columns == 2)
      return maximum_of<Step, placed, 2>(f, run);
    if (Step > 0 && whole && run.rows == 3 && run.columns == 3)
      return maximum_of<Step, placed, 3>(f, run);
    maximum_of<Step, placed, 0>(f, run);
  }

  template <int Step, bool placed, int K>
  void maximum_of(const PoolForwardArgs& f, const PoolRun& run) const {
    const T* const from = static_cast<const T*>(f.x);
    T* const to = static_cast<T*>(f.y);
    each_vector_of(
        run, [&](auto lanes, int64_t x, int64_t y, int64_t) __attribute__((always_inline)) {
          constexpr int L = decltype(lanes)::value;
          if constexpr (L == 1) {
            T best = -INFINITY;
            int64_t place = run.place;
            each_pixel<0>(run, from + x, [&](const T* p, int64_t i, int64_t j) {
              if (*p > best || *p != *p) best = *p, place = run.place + i * a.kernel_w + j;
            });
            to[y] = best;
            if (placed && wide_) static_cast<int32_t*>(f.places)[y] = int32_t(place);
            if (placed && !wide_) static_cast<uint8_t*>(f.places)[y] = uint8_t(place);
          } else {
            using S = Simd<T, L>;
            using Bits = typename S::Bits;
            typename S::R best = S::splat(-INFINITY);
            typename S::Mask place = typename S::Mask{} + Bits(K ? 0 : run.place), number = place;
            each_pixel<K>(run, from + x, [&](const T* p, int64_t, int64_t j) {
              const typename S::R v = load<L, Step>(p);
              const typename S::Mask taken = (v > best) | (v != v);
              best = S::where(taken, v, best);
              if constexpr (placed) {
                place = taken ? number : place;
                number += Bits(K || j + 1 < run.columns ? 1 : a.kernel_w - run.columns + 1);
              }
            });
            S::store(to + y, best);
            if constexpr (placed) Places<L>(f.places, wide_).put(y, place);
          }
        });
  }

  template <int Step>
  void average(const PoolForwardArgs& f, const PoolRun& run) const {
    const T* const from = static_cast<const T*>(f.x);
    T* const to = static_cast<T*>(f.y);
    const T divisor = T(run.divisor);
    const T zero = a.channels_last ? T(-0.0) : T(0);  // torch makes -0 to +0 in contiguous images
    each_vector_of(
        run, [&](auto lanes, int64_t x, int64_t y, int64_t) __attribute__((always_inline)) {
          constexpr int L = decltype(lanes)::value;
          if constexpr (L == 1) {
            T sum = 0;
            each_pixel<0>(run, from + x, [&](const T* p, int64_t, int64_t) { sum += *p; });
            to[y] = sum / divisor + zero;
          } else {
            using S = Simd<T, L>;
            typename S::R sum{};
            each_pixel<0>(run, from + x,
                          [&](const T* p, int64_t, int64_t) { sum += load<L, Step>(p); });
            S::store(to + y, sum / divisor + zero);
          }
        });
  }

  // ---- the backward pass -------------------------------------------------------------------------

  // Computes the gradient of the rows of x from `begin` to `end`, among those of all images.
  void gradient(const PoolBackwardArgs& b, int64_t begin, int64_t end) const {
    const bool max = a.pool == Pool::max;
    // Vectors pay if windows have two columns and share no pixel; in channels-last images they pay
    // for averages and small windows.
    const bool pairs = !a.channels_last && a.stride_w == 2 && a.kernel_w == 2 &&
                       a.kernel_h <= a.stride_h && (!max || a.Wo >= 16);
    const bool vectors = a.channels_last ? !max || 2 * a.kernel_h * a.kernel_w <= VL : pairs;
    std::memset(static_cast<T*>(b.grad_x) + begin * row_, 0,
                size_t((end - begin) * row_) * sizeof(T));
    for (int64_t image = begin / a.H; image * a.H < end; ++image) {
      const Side height = height_.within(std::max<int64_t>(0, begin - image * a.H),
                                         std::min(a.H, end - image * a.H));
      const int64_t before = height.top + a.padding_h - a.kernel_h;
      const int64_t first = before < 0 ? 0 : before / a.stride_h + 1;
      const int64_t last =
          std::min(a.Ho, (height.bottom + a.padding_h + a.stride_h - 1) / a.stride_h);
      if (max && !vectors)
        for (int64_t oh = first; oh < last; ++oh)
          scatter_row(b, image, oh, begin * row_, end * row_);
      else
        each_run(height, image, first, last, true, [&](const PoolRun& run) {
          if (a.channels_last)
            max ? spread_channels<true>(b, run) : spread_channels<false>(b, run);
          else if (pairs && run.length > 1)
            max ? spread_pairs<true>(b, run) : spread_pairs<false>(b, run);
          else if (max)
            for (int64_t line = 0; line < run.lines; ++line)
              scatter(b, run.y + line * line_of_y_, run.length,
                      run.x + line * line_ - offset(run.place), begin * row_, end * row_);
          else
            spread_average(b, run);
        });
    }
  }

  // Adds the gradients of a row of maxima to the pixels of x from `first` to `end`.
  void scatter_row(const PoolBackwardArgs& b, int64_t image, int64_t oh, int64_t first,
                   int64_t end) const {
    const int64_t row = image * a.H + height_.begin(oh);
    for (int64_t ow = 0; ow < (a.channels_last ? a.Wo : 1); ++ow)
      scatter(b, ((image * a.Ho + oh) * a.Wo + ow) * pixel_, line_of_y_,
              row * row_ + width_.begin(ow) * pixel_, first, end);
  }

  // Adds the gradients of n maxima from y on. The window of the first one begins at `origin`, which
  // may lie in the padding.
  void scatter(const PoolBackwardArgs& b, int64_t y, int64_t n, int64_t origin, int64_t first,
               int64_t end) const {
    wide_ ? scatter_as(b, static_cast<const int32_t*>(b.places) + y, y, n, origin, first, end)
          : scatter_as(b, static_cast<const uint8_t*>(b.places) + y, y, n, origin, first, end);
  }
  template <class Place>
  void scatter_as(const PoolBackwardArgs& b, const Place* places, int64_t y, int64_t n,
                  int64_t origin, int64_t first, int64_t end) const {
    T* const x = static_cast<T*>(b.grad_x) + first;
    const T* const grad = static_cast<const T*>(b.grad_y) + y;
    for (int64_t lane = 0; lane < n; ++lane) {
      const Place place = places[lane];
      const int64_t to =
          origin - first + lane * step_ + (sizeof(Place) == 1 ? offsets_[place] : offset(place));
      // A hook on saved tensors may have changed a place, which must not lead to other memory.
      if (uint64_t(to) < uint64_t(end - first)) x[to] += grad[lane];
    }
  }

  // What outputs give to the pixels of their windows: an average gives the same to all, and a
  // maximum gives all to one.
  template <int L, bool max>
  struct Given {
    using S = Simd<T, L>;
    using Mask = typename S::Mask;
    typename S::R grad;
    Mask place{};

    SNNLSTM_INLINE Given(const PoolBackwardArgs& b, bool wide, const PoolRun& run, int64_t y)
        : grad(S::load(static_cast<const T*>(b.grad_y) + y)) {
      if constexpr (max)
        place = Places<L>(b.places, wide).get(y) - typename S::Bits(run.place);
      else
        grad /= T(run.divisor);
    }
    SNNLSTM_INLINE typename S::R to(int64_t number) const {
      if constexpr (max)
        return S::where(place == Mask{} + typename S::Bits(number), grad, typename S::R{});
      else
        return grad;
    }
  };

  // The outputs are neighbours in a row, whose windows have two columns and share no pixel.
  template <bool max>
  void spread_pairs(const PoolBackwardArgs& b, const PoolRun& run) const {
    each_vector_of(run,
                   [&](auto lanes, int64_t x, int64_t y, int64_t) __attribute__((always_inline)) {
                     constexpr int L = decltype(lanes)::value;
                     using S = Simd<T, L>;
                     const Given<L, max> given(b, wide_, run, y);
                     for (int64_t i = 0; i < run.rows; ++i) {
                       const auto left = given.to(2 * i) + T(0);  // +0 also where it is -0
                       const auto right = given.to(2 * i + 1) + T(0);
                       T* const p = static_cast<T*>(b.grad_x) + x + i * row_;
                       if constexpr (L == 1) {
                         p[0] = left[0], p[1] = right[0];
                       } else {
                         S::store(p, S::template interleave<0>(left, right));
                         S::store(p + L, S::template interleave<L / 2>(left, right));
                       }
                     }
                   });
  }

  // The outputs are channels of one pixel.
  template <bool max>
  void spread_channels(const PoolBackwardArgs& b, const PoolRun& run) const {
    each_vector_of(
        run, [&](auto lanes, int64_t x, int64_t y, int64_t done) __attribute__((always_inline)) {
          using S = Simd<T, decltype(lanes)::value>;
          Given<S::lanes, max> given(b, wide_, run, y);
          if (done > 0) given.grad = S::without(given.grad, done);
          for (int64_t i = 0; i < run.rows; ++i)
            for (int64_t j = 0; j < run.columns; ++j) {
              T* const p = static_cast<T*>(b.grad_x) + x + i * row_ + j * pixel_;
              S::store(p, S::load(p) + given.to(i * a.kernel_w + j));
            }
        });
  }

  // The outputs are neighbours in a row.
  void spread_average(const PoolBackwardArgs& b, const PoolRun& run) const {
    for (int64_t line = 0; line < run.lines; ++line) {
      T* x = static_cast<T*>(b.grad_x) + run.x + line * line_;
      const T* const grad = static_cast<const T*>(b.grad_y) + run.y + line * line_of_y_;
      for (int64_t lane = 0; lane < run.length; ++lane, x += step_) {
        const T part = grad[lane] / T(run.divisor);
        for (int64_t i = 0; i < run.rows; ++i)
          for (int64_t j = 0; j < run.columns; ++j) x[i * row_ + j] += part;
      }
    }
  }
};

SNNLSTM_END_ISA
