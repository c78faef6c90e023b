// The gradient of the weight, summed over time steps that are given one after the other. Each task
// owns its part of the sums, so that the result does not depend on the threads' order.
#pragma once

#include "step_images.h"
#include "threads.h"
#include "weight_products.h"
#include "weight_sums.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class WeightGradient {
  using S = Simd<T, VL>;
  static constexpr int kGates = 4 * VL;
  using GateVector = typename Merged<S, 4>::Vector;
  static constexpr int64_t kPiece = 48;      // rows of K in a task
  static constexpr int64_t kTilePiece = 64;  // with Winograd: input channels
  static constexpr int64_t kBlockPixels = 128;
  // Each split has sums of its own, which are cleared and added up. That pays if a split has this
  // many pixels, over all steps.
  static constexpr int64_t kSplitPixels = 4096;
  // This many channel blocks share the transformed tiles of the input.
  static constexpr int64_t kShared = 4;

  // The memory of one thread.
  struct WeightScratch {
    T *d_gates, *few_sums;
  };

  // The gradient of the weights that read x, or mem.
  struct Half : WeightHalf<T, VL> {
    Half(const Layout<T, VL>& l, const Input& in, bool in_tiles, int64_t first)
        : WeightHalf<T, VL>(l, in, in_tiles, first), runs(in.runs(l.c, kPiece)) {
      if (in_tiles)
        pieces = (in.channels + kTilePiece - 1) / kTilePiece;
      else
        runs.chunks(piece_rows(l), [&](const Run*, int) { ++pieces; });
    }

    RunList runs;
    int64_t pieces = 0;  // of K, which tasks take
  };

 public:
  // The work is cut into tasks for `cut` threads.
  WeightGradient(const Layout<T, VL>& l, int threads, int cut)
      : l_(l),
        c_(l.c),
        threads_(threads),
        cut_(cut),
        // With few channels Winograd gains nothing for x, and direct sums round less.
        x_(l, l.x, c_.x_algorithm == CpuAlgorithm::winograd && c_.Cin > 4, 0),
        mem_(l, l.mem, c_.tiled(), l.Cb * x_.size),
        image_splits_(std::min(count_splits(), std::max<int64_t>(c_.N, 1))),
        bands_(std::min(count_splits() / image_splits_, pixel_blocks())),
        sums_(l, x_, mem_, splits(), blocks_of_a_split()) {
    if constexpr (kHasWinograd<T, VL>) {
      inputs_ = InputTransform<S>(l.grad_winograd);
      taps_ = PlaneTransform<GateVector>::taps(l.grad_winograd, l.grad_winograd.h.tile,
                                               l.grad_winograd.w.tile);
    }
  }

  // Returns the sizes of the tile buffers that add() needs.
  TileSizes tile_sizes() const {
    return TileSizes(l_, l_.grad_winograd, kTilePiece + VL, images_together(true));
  }

  void allocate(Workspace& workspace) {
    sums_.allocate(workspace, threads_);
    scratch_ = workspace.take<WeightScratch>(threads_);
    for (int k = 0; k < threads_; ++k) {
      WeightScratch s;
      const int64_t pixels = images_together(false) * pixel_block_rows() * l_.Wo;
      s.d_gates = workspace.take<T>(pixels * kGates);
      s.few_sums = workspace.take<T>(l_.compacts_lanes() ? kPiece * 2 * VL : 0);
      if (scratch_) scratch_[k] = s;
    }
  }

  WeightSums<T, VL>& sums() { return sums_; }

  // Adds a step's part of the first N images. A task has a split, a piece of K and a channel block.
  // No other thread may use the tile buffers at the same time.
  int64_t tasks() const { return splits() * pieces() * l_.Cb; }
  void add(const StepImages<T>& step, int64_t N, int64_t task, int thread,
           const TileBuffers<T>& tiles) {
    const int64_t cb = task % l_.Cb;
    const int64_t index = task / l_.Cb % pieces();
    const int64_t split = task / l_.Cb / pieces();
    const int64_t part = split / bands_;
    const int64_t band = split % bands_;
    const int64_t blocks = pixel_blocks();
    const Images images{split, N * part / image_splits_, N * (part + 1) / image_splits_,
                        blocks * band / bands_ * block_rows(),
                        std::min(blocks * (band + 1) / bands_ * block_rows(), l_.Ho)};
    const Half& half = index < x_.pieces ? x_ : mem_;
    const int64_t piece = index < x_.pieces ? index : index - x_.pieces;
    if (!half.in_tiles)
      directly(step, images, cb, half, piece, scratch_[thread]);
    else if constexpr (kHasWinograd<T, VL>)
      by_tiles(step, images, cb, half, piece, tiles);
  }

 private:
  // The images whose rows [top, bottom) are added to the sums of a split.
  struct Images {
    int64_t split, first, last, top, bottom;
  };

  // Returns how many splits give all threads tasks, if each split is worth its sums. If there are
  // more splits than images, each image has several bands of rows.
  int64_t count_splits() const {
    const int64_t tasks = (l_.Cb + kShared - 1) / kShared * pieces();
    const int64_t worth = (c_.T * c_.N * l_.pixels + kSplitPixels - 1) / kSplitPixels;
    return std::max<int64_t>(std::min(4 * cut_ / tasks, worth), 1);
  }
  int64_t splits() const { return image_splits_ * bands_; }

  // Returns the blocks in which the weight gradient of mem takes an image, and their rows.
  int64_t pixel_blocks() const { return (l_.Ho + block_rows() - 1) / block_rows(); }
  int64_t block_rows() const {
    return c_.tiled() ? l_.rows_of_tiles(l_.grad_winograd) : pixel_block_rows();
  }
  int64_t blocks_of_a_split() const {
    return (c_.N + image_splits_ - 1) / image_splits_ * ((pixel_blocks() + bands_ - 1) / bands_);
  }

  // Returns how many small images are summed together, so that the sums are read and written once
  // for all of them.
  int64_t images_together(bool in_tiles) const {
    const int64_t rows = in_tiles ? l_.rows_of_tiles(l_.grad_winograd) : pixel_block_rows();
    if (rows < l_.Ho || c_.N == 0) return 1;
    const int64_t images = in_tiles ? l_.images_of(l_.grad_winograd) : kBlockPixels / l_.pixels;
    return images < 1 ? 1 : images < c_.N ? images : c_.N;
  }

  // Calls f(first image, number of images) for all of some images.
  template <class F>
  void each_images(const Images& images, bool in_tiles, F&& f) const {
    const int64_t most = images_together(in_tiles);
    for (int64_t n = images.first; n < images.last; n += most)
      f(n, images.last - n < most ? images.last - n : most);
  }

  // Returns how many rows of K a task has. With many channel blocks a task has more rows, so that d
  // gates are gathered less often.
  static int64_t piece_rows(const Layout<T, VL>& l) { return l.Cb < 8 ? kPiece : 4 * kPiece; }
  int64_t pieces() const { return x_.pieces + mem_.pieces; }

  void by_tiles(const StepImages<T>& step, const Images& all, int64_t cb, const Half& half,
                int64_t piece, const TileBuffers<T>& tiles) {
    if (cb % kShared != 0) return;
    const int64_t channels = half.in.channels;
    const int64_t first = piece * kTilePiece;
    const int64_t len = channels - first < kTilePiece ? channels - first : kTilePiece;
    const int64_t block = l_.rows_of_tiles(l_.grad_winograd), stride = channels * kGates;
    each_images(all, true, [&](int64_t n, int64_t images) {
      for (int64_t h = all.top; h < all.bottom; h += block) {
        PixelRows<T> p = pixel_rows(step, n, images, h, std::min(block, all.bottom - h), cb, half);
        const TileBlock<T> b = tile_block(l_, l_.grad_winograd, p.rows, (len + VL - 1) / VL * VL,
                                          images, images_together(true));
        for (int64_t k = 0; k < images; ++k)
          inputs_.run(b, p.in + k * p.in_image + first, p.in_row, p.in_pixel,
                      tiles.values + k * b.image_values());
        for (int64_t k = cb; k < cb + kShared && k < l_.Cb; ++k, p.d_gates += kGates)
          weight_grad_tiles<S>(taps_, p, b, tiles.values, len, tiles.products,
                               sums_.of(half, all.split, k) + first * kGates, stride);
      }
    });
  }

  // Returns what the weight gradient of channel block cb sums over, in rows [h, h + rows) of some
  // images from n on.
  PixelRows<T> pixel_rows(const StepImages<T>& step, int64_t n, int64_t images, int64_t h,
                          int64_t rows, int64_t cb, const Half& half) const {
    PixelRows<T> p;
    p.images = images;
    p.d_image = l_.gate_image();
    p.in_image = half.in.image();
    p.d_pixel = 4 * l_.Cp;
    p.d_row = l_.gate_row();
    p.d_gates = step.d_gates + n * p.d_image + h * p.d_row + cb * kGates;
    p.rows = rows;
    p.pixels = l_.Wo;
    p.in_row = half.in.stride_h * half.in.row();
    p.in_pixel = half.in.stride_w * half.in.pixel;
    p.in = (&half == &x_ ? step.x : step.mem) + n * p.in_image + h * p.in_row;
    return p;
  }

  // Returns how many rows of pixels a block has, so that its d gates of one channel block stay in
  // L1 while all of a piece is summed.
  int64_t pixel_block_rows() const {
    const int64_t rows = kBlockPixels / l_.Wo;
    return rows < 1 ? 1 : rows < l_.Ho ? rows : l_.Ho;
  }

  void directly(const StepImages<T>& step, const Images& images, int64_t cb, const Half& half,
                int64_t piece, const WeightScratch& s) {
    T* out = sums_.of(half, images.split, cb);
    half.runs.chunks(piece_rows(l_), [&](const Run* runs, int count) {
      if (piece-- != 0) return;
      if (l_.compacts_lanes()) return compactly(step, images, half, runs, count, s, out);
      each_pixel_block(step, images, cb, half, [&](int64_t h, PixelRows<T> p) {
        if (l_.Cb > 1) gather_pixels(p, s.d_gates);
        for (int r = 0; r < count; ++r)
          add_run<4>(step.finite, runs[r], half, met_by(runs + r, half, h, p),
                     out + (runs[r].w - half.in.first_k) * kGates);
      });
    });
  }

  // Adds the products of a run. If not all d gates are finite, each tap skips the pixels from which
  // it meets the border, because zero times infinity is NaN.
  template <int NV>
  void add_run(bool finite, const Run& run, const Half& half, const PixelRows<T>& p, T* out) const {
    if (finite) return weight_grad_run<S, NV>(p, run.in, run.len, out);
    const int64_t channels = half.in.channels;
    const int64_t first = run.w - half.in.first_k;
    for (int64_t k = first, n; k < first + run.len; k += n, out += n * NV * VL) {
      n = std::min(channels - k % channels, first + run.len - k);
      weight_grad_run<S, NV>(met_by(k / channels % c_.kernel_w, half.in, p), run.in + k - first, n,
                             out);
    }
  }

  // Returns the pixels, in whole rows, from which a column of taps meets the image.
  PixelRows<T> met_by(int64_t column, const Input& in, PixelRows<T> p) const {
    const int64_t first = column * c_.dilation_w - l_.pw;
    const auto meets = [&](int64_t w) {
      const int64_t at = first + w * in.stride_w;
      return 0 <= at && at < in.W;
    };
    int64_t w = 0;
    for (; p.pixels > 0 && !meets(w); ++w, --p.pixels) {
      p.in += p.in_pixel;
      p.d_gates += p.d_pixel;
    }
    while (p.pixels > 0 && !meets(w + p.pixels - 1)) --p.pixels;
    return p;
  }

  // Returns the pixels, from row h on, from which a run meets the image.
  PixelRows<T> met_by(const Run* run, const Half& half, int64_t h, PixelRows<T> p) const {
    const int64_t row = half.runs.row(run);
    const auto meets = [&](int64_t k) {
      const MetTaps taps = l_.met(k, half.in);
      return taps.first <= row && row < taps.last;
    };
    for (; p.rows > 0 && !meets(h); ++h, --p.rows) {
      p.in += p.in_row;
      p.d_gates += p.d_row;
    }
    while (p.rows > 0 && !meets(h + p.rows - 1)) --p.rows;
    return p;
  }

  // Calls f(first row, pixels) for the blocks of some images.
  template <class F>
  void each_pixel_block(const StepImages<T>& step, const Images& all, int64_t cb, const Half& half,
                        F&& f) {
    const int64_t block = pixel_block_rows();
    each_images(all, false, [&](int64_t n, int64_t images) {
      for (int64_t h = all.top; h < all.bottom; h += block)
        f(h, pixel_rows(step, n, images, h, std::min(block, all.bottom - h), cb, half));
    });
  }

  // Gathers the d gates of all pixels without gaps. copy(from, to) copies the `width` values of
  // one.
  template <class F>
  static void gather(PixelRows<T>& p, int64_t width, T* const to, F&& copy) {
    T* next = to;
    for (int64_t n = 0; n < p.images; ++n)
      for (int64_t h = 0; h < p.rows; ++h)
        for (int64_t w = 0; w < p.pixels; ++w, next += width)
          copy(p.d_gates + n * p.d_image + h * p.d_row + w * p.d_pixel, next);
    p.d_gates = to;
    p.d_pixel = width;
    p.d_row = p.pixels * width;
    p.d_image = p.rows * p.d_row;
  }
  static void gather_pixels(PixelRows<T>& p, T* to) {
    gather(p, kGates, to, [](const T* from, T* next) {
      for (int k = 0; k < kGates; k += VL) S::store(next + k, S::load(from + k));
    });
  }
  // Leaves out the lanes without a channel.
  void gather_lanes(PixelRows<T>& p, int64_t width, T* to) const {
    gather(p, width, to, [&](const T* from, T* next) {
      T* const end = next + width;
      for (int64_t gate = 0; gate < 4; ++gate, from += VL)
        for (int64_t ch = 0; ch < l_.lanes(0, gate); ++ch) *next++ = from[ch];
      while (next < end) *next++ = 0;
    });
  }

  // Computes the sums of a cell with so few channels that most lanes hold none: the lanes with a
  // channel are compacted.
  void compactly(const StepImages<T>& step, const Images& images, const Half& half, const Run* runs,
                 int count, const WeightScratch& s, T* out) {
    const int64_t vectors = l_.few_vectors();
    const int64_t width = vectors * VL;
    T* const sums = s.few_sums;
    std::memset(sums, 0, kPiece * width * sizeof(T));
    each_pixel_block(step, images, 0, half, [&](int64_t h, PixelRows<T> p) {
      gather_lanes(p, width, s.d_gates);
      T* to = sums;
      for (int r = 0; r < count; to += runs[r++].len * width) {
        const PixelRows<T> met = met_by(runs + r, half, h, p);
        if (vectors == 1)
          add_run<1>(step.finite, runs[r], half, met, to);
        else
          add_run<2>(step.finite, runs[r], half, met, to);
      }
    });
    const T* from = sums;
    for (int r = 0; r < count; ++r)
      for (int64_t k = 0; k < runs[r].len; ++k, from += width)
        for (int64_t gate = 0, next = 0; gate < 4; ++gate)
          for (int64_t ch = 0; ch < l_.lanes(0, gate); ++ch)
            out[(runs[r].w - half.in.first_k + k) * kGates + gate * VL + ch] += from[next++];
  }

  const Layout<T, VL>& l_;
  const Cell& c_;
  int threads_, cut_;
  InputTransform<S> inputs_;
  PlaneTransform<GateVector> taps_;
  const Half x_, mem_;
  int64_t image_splits_, bands_;  // splits of the images, and of each image's rows
  WeightSums<T, VL> sums_;
  WeightScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
