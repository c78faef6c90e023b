// The backward pass of a sequence, last step first. One phase a step, in which these run side by
// side:
//   rows     the recurrent data gradient of step t, and behind it, while the rows lie in cache, the
//            pointwise backward of step t - 1 (neuron_backward.h)
//   inputs   the data gradient of x, where it is wanted (with Winograd the rows tasks do it too)
//   weights  step t's part of the weight gradient; each task owns its part of the sums, which do
//            not depend on who computes what when (weight_sums.h)
// Memory beside the results: two time steps of d gates, mem and x, whatever T is.
#pragma once

#include "data_grad.h"
#include "neuron_backward.h"
#include "schedule.h"
#include "sparse_grad.h"
#include "weight_grad.h"
#include "weight_sums.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Backward {
  using S = Simd<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int64_t kPiece = 48;      // rows of K in a weight gradient task
  static constexpr int64_t kTilePiece = 64;  // with Winograd: input channels
  // Each split of the weight gradient has sums of its own, to be cleared and added up: so many
  // pixels, of all steps, pay for that.
  static constexpr int64_t kSplitPixels = 4096;

  // Channel blocks whose weight gradients share the lists, or the transformed tiles, of the input.
  static constexpr int64_t kShared = 4;
  using Sparse = SparseWeightGrad<T, VL>;

  struct Scratch {
    T* x;                  // rows of the gradient of x
    T* d_gates;            // of one channel block and some pixels
    T* few_sums;           // weights_of_few()
    T *values, *products;  // Winograd: tiles.h
    typename Sparse::Lists lists;
    typename Sparse::Scratch listing;
  };

 public:
  explicit Backward(const BackwardArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args.threads),
        to_mem_(l_, l_.Cb, l_.Wo, 1, 1),
        to_x_(l_, l_.x_blocks, args.cell.W, args.cell.stride_h, args.cell.stride_w),
        sparse_(l_),
        neuron_(a_, l_, tasks_),
        x_runs_(args.cell, args.cell.Cin, l_.Wx * args.cell.Cin, args.cell.Cin, 0, kPiece),
        mem_runs_(args.cell, args.cell.C, l_.Wm * l_.Cp, l_.Cp, l_.Kx, kPiece),
        x_groups_(groups(x_runs_)),
        mem_groups_(groups(mem_runs_)),
        splits_(count_splits()),
        sums_(l_, x_in_tiles(), splits_, (args.cell.N + splits_ - 1) / splits_ * pixel_blocks()) {
    const Cell& c = a_.cell;
    x_rows_ = l_.block_rows();
    x_blocks_ = (c.H + x_rows_ - 1) / x_rows_;
    Arena arena(args.workspace);
    carve(arena);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    BackwardArgs args;
    args.cell = cell;
    args.threads = threads;
    Backward b(args);
    Arena arena(nullptr);
    b.carve(arena);
    return arena.bytes();
  }

  void run() {
    const Cell& c = a_.cell;
    const int64_t T_ = c.T, slices = l_.Cb * pieces();
    const int64_t weight_tasks = a_.grad_weight ? splits_ * slices : 0;
    const int64_t x_tasks = a_.grad_x.data && !l_.tiled_x() ? c.N * x_blocks_ : 0;
    const Phases phases(counters_, most_phases());
    neuron_.pack_vectors();
    parallel(a_.threads, 3 * double(c.N) * l_.pixels * l_.K() * 4 * c.C, [&](int thread) {
      phases.run(0, tasks_.count + (a_.grad_weight ? splits_ : 0), [&](int64_t task) {
        if (task < tasks_.count)
          neuron_.clear(task);
        else
          sums_.clear(task - tasks_.count);
      });
      phases.run(1, tasks_.count, [&](int64_t task) {
        neuron_.start(task, thread);
        neuron_.rows(T_ - 1, task, thread);
      });
      int64_t phase = 2;
      for (int64_t t = T_ - 1; t >= 0; --t) {
        // The largest tasks first: nobody begins one when all others are done.
        phases.run(phase++, weight_tasks + x_tasks + tasks_.count, [&](int64_t task) {
          if (task < weight_tasks) return weights(t, task / slices, task % slices, thread);
          task -= weight_tasks;
          if (task < x_tasks) return inputs(t, task, thread);
          rows(t, task - x_tasks, thread);
        });
        if (a_.grad_weight && sums_.due(t))
          phases.run(phase++, sums_.fold_tasks(), [&](int64_t task) { sums_.fold(task, t); });
      }
      phases.run(phase, l_.Cb + (a_.grad_weight ? sums_.write_tasks() : 0), [&](int64_t task) {
        if (task < l_.Cb) return neuron_.reduce(task);
        sums_.write(task - l_.Cb, static_cast<T*>(a_.grad_weight));
      });
    });
  }

 private:
  int64_t most_phases() const { return 2 * a_.cell.T + 3; }

  // So many tasks that all threads have some, and no more than the sums are worth.
  int64_t count_splits() const {
    const Cell& c = a_.cell;
    const int64_t tasks = (l_.Cb + kShared - 1) / kShared * pieces();
    int64_t splits = 4 * a_.threads / tasks;
    if (splits > c.N) splits = c.N;
    const int64_t worth = (c.T * c.N * l_.pixels + kSplitPixels - 1) / kSplitPixels;
    if (splits > worth) splits = worth;
    return splits < 1 ? 1 : splits;
  }

  // Of an image, as the weight gradient of mem takes it.
  int64_t pixel_blocks() const {
    const int64_t rows = l_.grad_tile > 0 ? l_.rows_of_tiles(l_.grad_tile) : pixel_block_rows();
    return (l_.Ho + rows - 1) / rows;
  }

  void carve(Arena& arena) {
    const Cell& c = a_.cell;
    counters_ = arena.take<Phases::Counter>(most_phases());
    sums_.carve(arena);
    neuron_.carve(arena);
    scratch_ = arena.take<Scratch>(a_.threads);
    const int64_t rows = l_.tiled_x() ? l_.block_rows() : x_rows_;
    for (int k = 0; k < a_.threads; ++k) {
      const int64_t most = 4 * l_.Cp > kTilePiece + VL ? 4 * l_.Cp : kTilePiece + VL;
      int64_t values = 0, products = 0;
      const int64_t sizes[] = {l_.tile, l_.grad_tile};
      for (const int64_t m : sizes) {
        if (m == 0) continue;
        const TileBlock<T> b = tile_block(l_, m, 0, most);
        const int64_t v = l_.points_of(m) * b.values_stride,
                      p = l_.points_of(m) * b.products_stride;
        if (v > values) values = v;
        if (p > products) products = p;
      }
      Scratch s;
      s.x = arena.take<T>(rows * to_x_.row_size());
      const bool gathered = l_.Cb > 1 || l_.few_channels();
      s.d_gates = arena.take<T>(gathered ? pixel_block_rows() * l_.Wo * kGates : 0);
      s.few_sums = arena.take<T>(l_.few_channels() ? kPiece * 2 * VL : 0);
      s.values = arena.take<T>(values);
      s.products = arena.take<T>(products);
      if (c.x_way == Way::sparse) {
        sparse_.carve(arena, s.lists);
        sparse_.carve(arena, s.listing);
      }
      if (scratch_) scratch_[k] = s;
    }
  }

  void rows(int64_t t, int64_t task, int thread) {
    const bool mem_wanted = t > 0 || a_.grad_mem0.data, x_wanted = a_.grad_x.data && l_.tiled_x();
    if (!mem_wanted && !x_wanted) return;
    const int64_t n = tasks_.image(task), begin = tasks_.begin(task), end = tasks_.end(task);
    T* mem_grad = neuron_.mem_grad(thread);
    const int64_t block = l_.block_rows();
    for (int64_t h = begin; h < end; h += block) {
      const int64_t stop = h + block < end ? h + block : end;
      T* out = mem_wanted ? mem_grad + (h - begin) * l_.Wo * l_.Cp : nullptr;
      if (a_.cell.tile == 0)
        to_mem_.rows(neuron_.d_gates(t, n),
                     static_cast<const T*>(a_.weight) + l_.x_blocks * l_.Kg * VL, h, stop, out);
      else if constexpr (kHasWinograd<T, VL>)
        with_winograd<S>(a_.cell.kernel_h, a_.cell.tile, [&](auto form) {
          tiled<decltype(form)>(t, n, h, stop, x_wanted, out, scratch_[thread]);
        });
    }
    if (t > 0) return neuron_.rows(t - 1, task, thread);
    for (int64_t h = begin; mem_wanted && h < end; ++h)
      neuron_.write_row(a_.grad_mem0, n, h, mem_grad + (h - begin) * l_.Wo * l_.Cp);
  }

  // Data gradients of state rows [begin, end) by Winograd: mem's into mem_grad, unless null; x's.
  template <class W>
  void tiled(int64_t t, int64_t n, int64_t begin, int64_t end, bool x_wanted, T* mem_grad,
             const Scratch& s) {
    const TileBlock<T> b = tile_block(l_, W::tile, end - begin, 4 * l_.Cp);
    const int64_t pixel = 4 * l_.Cp, row = l_.Wm * pixel;
    transform_inputs<W, S>(b, W::tile, neuron_.d_gates(t, n) + begin * row, row, pixel, s.values);
    if (mem_grad)
      to_mem_.template tiles<W>(b, s.values, static_cast<const T*>(a_.weight_mem), s.products,
                                begin, end, mem_grad);
    if (!x_wanted) return;
    to_x_.template tiles<W>(b, s.values, static_cast<const T*>(a_.weight_x), s.products, begin, end,
                            s.x);
    write_x(t, n, begin, end, s.x);
  }

  void inputs(int64_t t, int64_t task, int thread) {
    const int64_t n = task / x_blocks_, begin = task % x_blocks_ * x_rows_;
    const int64_t end = begin + x_rows_ < a_.cell.H ? begin + x_rows_ : a_.cell.H;
    T* rows = scratch_[thread].x;
    to_x_.rows(neuron_.d_gates(t, n), static_cast<const T*>(a_.weight), begin, end, rows);
    write_x(t, n, begin, end, rows);
  }

  void write_x(int64_t t, int64_t n, int64_t begin, int64_t end, const T* rows) {
    const View& v = a_.grad_x;
    for (int64_t h = begin; h < end; ++h)
      store_row<S>(rows + (h - begin) * to_x_.row_size(), l_.x_blocks * VL, a_.cell.W, a_.cell.Cin,
                   static_cast<T*>(v.data) + t * v.stride[0] + n * v.stride[1] + h * v.stride[3],
                   v.stride[2], v.stride[4], [](typename S::R g, int64_t) { return g; });
  }

  // Whether x's weight gradient goes by Winograd: few channels gain nothing, and direct sums round
  // less.
  bool x_in_tiles() const {
    return a_.cell.x_way == Way::winograd && l_.grad_tile > 0 && a_.cell.Cin > 4;
  }

  // Pieces of K that weight gradient tasks take.
  static int64_t tile_pieces(int64_t channels) { return (channels + kTilePiece - 1) / kTilePiece; }
  int64_t x_pieces() const {
    if (a_.cell.x_way == Way::sparse) return 1;
    return x_in_tiles() ? tile_pieces(a_.cell.Cin) : x_groups_;
  }
  int64_t pieces() const {
    return x_pieces() + (l_.grad_tile > 0 ? tile_pieces(a_.cell.C) : mem_groups_);
  }
  static int64_t groups(const RunList& list) {
    int64_t count = 0;
    list.chunks(kPiece, [&](const Run*, int) { ++count; });
    return count;
  }

  void weights(int64_t t, int64_t split, int64_t slice, int thread) {
    const Cell& c = a_.cell;
    const int64_t cb = slice % l_.Cb, index = slice / l_.Cb;
    const bool of_x = index < x_pieces();
    const int64_t piece = of_x ? index : index - x_pieces();
    if (of_x && c.x_way == Way::sparse)
      weights_by_lists(t, split, cb, scratch_[thread]);
    else if (of_x ? !x_in_tiles() : l_.grad_tile == 0)
      weights_directly(t, split, cb, of_x, piece, scratch_[thread]);
    else if constexpr (kHasWinograd<T, VL>)
      with_grad_winograd<S>(c.kernel_h, int(l_.grad_tile), [&](auto form) {
        weights_by_tiles<decltype(form)>(t, split, cb, of_x, piece, scratch_[thread]);
      });
  }

  // Of x, from the lists of its nonzeros: the first of some channel blocks does them all.
  void weights_by_lists(int64_t t, int64_t split, int64_t cb, Scratch& s) {
    if (cb % kShared != 0) return;
    const Cell& c = a_.cell;
    for (int64_t n = c.N * split / splits_; n < c.N * (split + 1) / splits_; ++n)
      for (int64_t block = 0; block < sparse_.blocks(); ++block) {
        sparse_.build(neuron_.x(t, n), block, s.listing, s.lists);
        for (int64_t b = cb; b < cb + kShared && b < l_.Cb; ++b)
          sparse_.run(s.lists, neuron_.d_gates(t, n) + b * kGates, s.listing,
                      sums_.rows(split, b, true));
      }
  }

  template <class W>
  void weights_by_tiles(int64_t t, int64_t split, int64_t cb, bool of_x, int64_t piece,
                        const Scratch& s) {
    if (cb % kShared != 0) return;
    const Cell& c = a_.cell;
    const int64_t channels = of_x ? c.Cin : c.C, first = piece * kTilePiece;
    const int64_t len = channels - first < kTilePiece ? channels - first : kTilePiece;
    const int64_t block = l_.rows_of_tiles(W::tile), stride = channels * kGates;
    for (int64_t n = c.N * split / splits_; n < c.N * (split + 1) / splits_; ++n)
      for (int64_t h = 0; h < l_.Ho; h += block) {
        PixelRows<T> p = pixel_rows(t, n, h, h + block < l_.Ho ? block : l_.Ho - h, cb, of_x);
        const TileBlock<T> b = tile_block(l_, W::tile, p.rows, (len + VL - 1) / VL * VL);
        transform_inputs<W, S>(b, W::tile, p.in + first, p.in_row, p.in_pixel, s.values);
        for (int64_t k = cb; k < cb + kShared && k < l_.Cb; ++k, p.d_gates += kGates)
          weight_grad_tiles<W, S>(p, b, s.values, len, s.products,
                                  sums_.points(split, k, of_x) + first * kGates, stride);
      }
  }

  // What the weight gradient of rows [h, h + rows) and channel block cb sums over.
  PixelRows<T> pixel_rows(int64_t t, int64_t n, int64_t h, int64_t rows, int64_t cb, bool of_x) {
    const Cell& c = a_.cell;
    PixelRows<T> p;
    p.d_pixel = 4 * l_.Cp;
    p.d_row = l_.Wm * p.d_pixel;
    p.d_gates = neuron_.d_gates(t, n) + (h + l_.ph) * p.d_row + l_.pw * p.d_pixel + cb * kGates;
    p.rows = rows;
    p.pixels = l_.Wo;
    if (of_x) {
      p.in_row = c.stride_h * l_.Wx * c.Cin;
      p.in_pixel = c.stride_w * c.Cin;
      p.in = neuron_.x(t, n) + h * p.in_row;
    } else {
      p.in_row = l_.Wm * l_.Cp;
      p.in_pixel = l_.Cp;
      p.in = neuron_.mem_before(t, n) + h * p.in_row;
    }
    return p;
  }

  // Rows of pixels whose d gates of one channel block stay in L1 while all of a piece passes by.
  int64_t pixel_block_rows() const {
    const int64_t rows = 128 / l_.Wo;
    return rows < 1 ? 1 : rows < l_.Ho ? rows : l_.Ho;
  }

  void weights_directly(int64_t t, int64_t split, int64_t cb, bool of_x, int64_t piece,
                        const Scratch& s) {
    T* out = sums_.rows(split, cb, of_x);
    (of_x ? x_runs_ : mem_runs_).chunks(kPiece, [&](const Run* runs, int count) {
      if (piece-- != 0) return;
      if (l_.few_channels()) return weights_of_few(t, split, of_x, runs, count, s, out);
      each_pixel_block(t, split, cb, of_x, [&](PixelRows<T> p) {
        if (l_.Cb > 1) gather_d_gates(p, s.d_gates);
        for (int r = 0; r < count; ++r)
          weight_grad_run<S>(p, runs[r].in, runs[r].len, out + runs[r].w * kGates);
      });
    });
  }

  template <class F>
  void each_pixel_block(int64_t t, int64_t split, int64_t cb, bool of_x, F&& f) {
    const int64_t block = pixel_block_rows();
    for (int64_t n = a_.cell.N * split / splits_; n < a_.cell.N * (split + 1) / splits_; ++n)
      for (int64_t h = 0; h < l_.Ho; h += block)
        f(pixel_rows(t, n, h, h + block < l_.Ho ? block : l_.Ho - h, cb, of_x));
  }

  // Where most lanes are zero: the gates of the others close up, and so do the sums.
  void weights_of_few(int64_t t, int64_t split, bool of_x, const Run* runs, int count,
                      const Scratch& s, T* out) {
    const int64_t C = a_.cell.C, vectors = 4 * C <= VL ? 1 : 2, width = vectors * VL;
    T* const sums = s.few_sums;
    std::memset(sums, 0, kPiece * width * sizeof(T));
    each_pixel_block(t, split, 0, of_x, [&](PixelRows<T> p) {
      gather_lanes(p, width, s.d_gates);
      T* to = sums;
      for (int r = 0; r < count; to += runs[r++].len * width)
        if (vectors == 1)
          weight_grad_run<S, 1>(p, runs[r].in, runs[r].len, to);
        else
          weight_grad_run<S, 2>(p, runs[r].in, runs[r].len, to);
    });
    const T* from = sums;
    for (int r = 0; r < count; ++r)
      for (int64_t k = 0; k < runs[r].len; ++k, from += width)
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t ch = 0; ch < C; ++ch)
            out[(runs[r].w + k) * kGates + gate * VL + ch] += from[gate * C + ch];
  }

  void gather_lanes(PixelRows<T>& p, int64_t width, T* to) const {
    const int64_t C = a_.cell.C;
    T* dst = to;
    for (int64_t h = 0; h < p.rows; ++h)
      for (int64_t w = 0; w < p.pixels; ++w, dst += width) {
        const T* d = p.d_gates + h * p.d_row + w * p.d_pixel;
        for (int64_t gate = 0; gate < 4; ++gate)
          for (int64_t ch = 0; ch < C; ++ch) dst[gate * C + ch] = d[gate * VL + ch];
        for (int64_t k = 4 * C; k < width; ++k) dst[k] = 0;
      }
    p.d_gates = to;
    p.d_pixel = width;
    p.d_row = p.pixels * width;
  }

  // Side by side: pixels of many channels are so far apart that few sets of the cache hold them.
  void gather_d_gates(PixelRows<T>& p, T* to) const {
    T* dst = to;
    for (int64_t h = 0; h < p.rows; ++h)
      for (int64_t w = 0; w < p.pixels; ++w, dst += kGates)
        std::memcpy(dst, p.d_gates + h * p.d_row + w * p.d_pixel, kGates * sizeof(T));
    p.d_gates = to;
    p.d_pixel = kGates;
    p.d_row = p.pixels * kGates;
  }

  const BackwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  DataGrad<T, VL> to_mem_, to_x_;
  Sparse sparse_;
  NeuronBackward<T, VL> neuron_;
  RunList x_runs_, mem_runs_;
  int64_t x_groups_, mem_groups_;  // pieces of the runs
  int64_t splits_;
  int64_t x_rows_, x_blocks_;
  WeightSums<T, VL> sums_;
  Phases::Counter* counters_ = nullptr;
  Scratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
