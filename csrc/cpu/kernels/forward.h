// The forward pass of a sequence. Each step and block of rows has its gates convolved, and right
// after that, while the gates still lie in L1, its LSTM update, reset, quantisation, pooling and
// spikes. A thread takes several small images together. state_rows.h holds the states.
#pragma once

#include "equal_pixels.h"
#include "pool.h"
#include "saved_gates.h"
#include "sparse.h"
#include "state_rows.h"
#include "threads.h"
#include "tiles.h"
#include "transpose.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Forward {
  using M = Math<T, VL>;
  using S = Simd<T, VL>;
  using R = typename S::R;
  using Mask = typename S::Mask;
  static constexpr int kGates = 4 * VL;
  using GateVector = typename Merged<S, 4>::Vector;
  using Rows = typename StateRows<T, VL>::Rows;

 public:
  explicit Forward(const ForwardArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args, true),
        states_(args, l_, tasks_),
        block_(l_.block_rows()),
        strip_(l_.strip_rows()),
        saved_(args.packed_gates),
        places_(args, l_.Cp),
        sparse_(l_, strip_),
        equal_(l_, block_, strip_) {
    if constexpr (kHasWinograd<T, VL>) {
      inputs_ = InputTransform<S>(l_.form);
      outputs_ = PlaneTransform<GateVector>::outputs(l_.form, l_.form.h.tile, l_.form.w.tile);
    }
    Workspace workspace(args.workspace);
    carve(workspace);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    ForwardArgs args;
    args.cell = cell;
    args.threads = threads;
    Forward f(args);
    Workspace workspace(nullptr);
    f.carve(workspace);
    return workspace.bytes();
  }

  void run() {
    const Cell& c = a_.cell;
    x_runs_.dense(c, l_.along_columns(c.Cin), c.Cin, l_.Wx * c.Cin, c.Cin, 0, kChunk);
    mem_runs_.dense(c, l_.along_columns(c.C), c.C, l_.Wm * l_.Cp, l_.Cp, l_.Kx, kChunk);
    pack_vectors();
    const Phases phases(counters_, c.T + 1);
    parallel(a_.threads, l_.step_work(), [&](int thread) {
      if (c.T > 1)
        phases.run(0, tasks_.count, [&](int64_t task) { states_.read(task, thread, 0); });
      for (int64_t t = 0; t < c.T; ++t) {
        const RowTasks tasks = tasks_.at(t);
        phases.run(t + 1, tasks.groups(), [&](int64_t group) { step(t, tasks, group, thread); });
      }
    });
  }

 private:
  static constexpr int64_t kChunk = chunk_length<T>(kGates);

  // The rows of one image that a thread works on, and their buffers.
  struct RowBlock {
    Rows r;
    T* patch;                                        // input rows under the block, with border
    T* gates;                                        // (strip rows, Wr, 4, VL)
    typename SparseInput<T, VL>::InputLists* lists;  // of x's nonzeros, for every strip
    Sums* sums;                                      // Winograd: of every pixel
  };

  struct ForwardScratch {
    RowBlock* blocks;
    T* pooled;                            // (Wp, Cp)
    T *mem_values, *x_values, *products;  // Winograd: tiles.h
    typename EqualPixels<T, VL>::Scratch equal;
  };

  void carve(Workspace& workspace) {
    const Cell& c = a_.cell;
    counters_ = workspace.take<Phases::Counter>(c.T + 1);
    bias_ = workspace.take<T>(l_.Cb * kGates);
    threshold_ = workspace.take<T>(l_.Cp);
    states_.carve(workspace);
    scratch_ = workspace.take<ForwardScratch>(a_.threads);
    const int64_t points = c.tiled() ? l_.form.points() : 0;
    const TileBlock<T> of_mem = tiles(block_, l_.Cp, 1), of_x = tiles(block_, x_channels(), 1);
    for (int k = 0; k < a_.threads; ++k) {
      const ForwardScratch s{
          workspace.take<RowBlock>(tasks_.most_together),
          workspace.take<T>(l_.Wp * l_.Cp),
          workspace.take<T>(points * of_mem.values_stride),
          workspace.take<T>(c.x_algorithm == CpuAlgorithm::winograd ? points * of_x.values_stride
                                                                    : 0),
          workspace.take<T>(points * of_mem.products_stride),
          equal_.carve(workspace)};
      for (int64_t slot = 0; slot < tasks_.most_together; ++slot) {
        const RowBlock b = carve_block(workspace);
        if (s.blocks) s.blocks[slot] = b;
      }
      if (scratch_) scratch_[k] = s;
    }
  }

  RowBlock carve_block(Workspace& workspace) const {
    const int64_t strips =
        a_.cell.x_algorithm == CpuAlgorithm::sparse ? (block_ + strip_ - 1) / strip_ : 0;
    const RowBlock b{{},
                     workspace.take<T>(patch_rows(block_) * l_.Wx * a_.cell.Cin + kReadAhead),
                     workspace.take<T>(strip_ * l_.Wr * kGates),
                     workspace.take<typename SparseInput<T, VL>::InputLists>(strips),
                     workspace.take<Sums>(equal_.decisions())};
    for (int64_t strip = 0; strip < strips; ++strip) {
      typename SparseInput<T, VL>::InputLists lists;
      sparse_.carve(workspace, lists);
      if (b.lists) b.lists[strip] = lists;
    }
    return b;
  }

  // Describes the tiles of `rows` rows of each of `together` images.
  TileBlock<T> tiles(int64_t rows, int64_t channels, int64_t together) const {
    return tile_block(l_, l_.form, rows, channels, together, tasks_.most_together);
  }
  int64_t x_channels() const { return l_.x_blocks * VL; }
  // Returns a channel block's weight for direct sums.
  const T* weight(int64_t cb) const {
    return static_cast<const T*>(a_.weight) + cb * l_.packed_rows() * kGates;
  }

  void pack_vectors() {
    const Cell& c = a_.cell;
    const T* bias = static_cast<const T*>(a_.bias);
    const T* threshold = static_cast<const T*>(a_.threshold);
    for (int64_t ch = 0; ch < l_.Cp; ++ch) {
      for (int gate = 0; gate < 4; ++gate)
        bias_[ch / VL * kGates + gate * VL + ch % VL] =
            bias && ch < c.C ? bias[gate * c.C + ch] : T(0);
      threshold_[ch] = c.spiking && ch < c.C ? threshold[ch * a_.threshold_stride] : T(1);
    }
  }

  // Does the tasks of a group, which are the same rows of each of its images.
  void step(int64_t t, const RowTasks& tasks, int64_t group, int thread) {
    const ForwardScratch& s = scratch_[thread];
    const int64_t first = tasks.first(group), together = tasks.together(group);
    const int64_t begin = tasks_.begin(first), end = tasks_.end(first);
    for (int64_t k = 0; k < together; ++k) {
      if (a_.cell.T == 1) states_.read(first + k, thread, k);
      s.blocks[k].r = states_.of(first + k, thread, k);
    }
    for (int64_t b0 = begin; b0 < end; b0 += block_) {
      const int64_t b1 = b0 + block_ < end ? b0 + block_ : end;
      for (int64_t k = 0; k < together && !a_.cell.pointwise(); ++k) {
        gather_x(t, s.blocks[k].r.n, b0, b1, s.blocks[k].patch);
        if (a_.cell.x_algorithm == CpuAlgorithm::sparse) list_x(b0, b1, s.blocks[k]);
      }
      if (!a_.cell.tiled())
        direct(t, together, b0, b1, s);
      else if constexpr (kHasWinograd<T, VL>)
        tiled(t, together, b0, b1, s);
    }
    for (int64_t k = 0; k < together; ++k) {
      const Rows& r = s.blocks[k].r;
      write_states(t, r, begin, end);
      if (a_.cell.inhibition)
        fire_winner(t, r, s);
      else if (a_.cell.spiking)
        fire(t, r, begin / a_.cell.pool_h, end / a_.cell.pool_h, s);
    }
  }

  // Returns how many input rows the kernel, or the tiles, of `rows` state rows look at.
  int64_t patch_rows(int64_t rows) const {
    const Cell& c = a_.cell;
    if (!l_.tiled_x()) return (rows - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
    return l_.whole(l_.form.h, c.dilation_h, rows) + (l_.form.h.taps() - 1) * c.dilation_h;
  }

  // Copies the input rows that state rows [b0, b1) look at, channels-last, with a zero border.
  void gather_x(int64_t t, int64_t n, int64_t b0, int64_t b1, T* patch) {
    const Span span(Part::copies);
    const Cell& c = a_.cell;
    const int64_t first = b0 * c.stride_h - l_.ph;
    const int64_t rows = patch_rows(b1 - b0);
    const int64_t row = l_.Wx * c.Cin, border = l_.pw * c.Cin, right = (l_.pw + c.W) * c.Cin;
    const auto clamp = [](int64_t k, int64_t least, int64_t most) {
      return k < least ? least : k < most ? k : most;
    };
    const int64_t top = clamp(-first, 0, rows), bottom = clamp(c.H - first, top, rows);
    std::memset(patch, 0, top * row * sizeof(T));
    std::memset(patch + bottom * row, 0, (rows - bottom) * row * sizeof(T));
    for (int64_t k = top; k < bottom; ++k) {
      std::memset(patch + k * row, 0, border * sizeof(T));
      std::memset(patch + k * row + right, 0, (row - right) * sizeof(T));
    }
    load_rows<S>(a_.x, t, n, first + top, bottom - top, c.Cin, patch + top * row + border,
                 Pixels{c.W, row, c.Cin}, c.Cin);
  }

  // Sums a half over `rows` rows of each block, from state row `first` on. mem's half and the bias
  // are written to the block's gates, x's is added. in(block) is what the first row sees.
  template <class In>
  void sweep(bool of_x, In&& in, int64_t row, int64_t pixel, int64_t first, int64_t rows,
             int64_t cb, const RowBlock* blocks, int64_t count) {
    const Span span(Part::products);
    const RunList& list = of_x ? x_runs_ : mem_runs_;
    const T* w = weight(cb);
    const PixelLines p(list.by_columns(), rows, l_.Wo, row, pixel, l_.Wr * kGates, kGates);
    list.chunks(kChunk, [&, add = of_x](const Run* chunk, int size) mutable {
      for (int64_t k = 0; k < p.lines; ++k) {
        const Run* runs = chunk;
        int number = size;
        list.limit(runs, number,
                   l_.met(list.by_columns(), list.by_columns() ? k : first + k, of_x));
        if (add && number == 0) continue;
        for (const RowBlock* b = blocks; b < blocks + count; ++b) {
          T* out = b->gates + k * p.out_line;
          conv_row<S, 4>(in(*b) + k * p.in_line, p.in_pixel, runs, number, w,
                         add ? Start<T>{out, p.out_pixel} : Start<T>{bias_ + cb * kGates, 0}, out,
                         p.out_pixel, p.pixels);
        }
      }
      add = true;
    });
  }

  void list_x(int64_t b0, int64_t b1, const RowBlock& b) {
    const Span span(Part::copies);
    const int64_t row = a_.cell.stride_h * l_.Wx * a_.cell.Cin;
    for (int64_t h = b0; h < b1; h += strip_)
      sparse_.build(b.patch + (h - b0) * row, h + strip_ < b1 ? strip_ : b1 - h,
                    b.lists[(h - b0) / strip_]);
  }

  // Adds the input half of a strip of each block: `rows` state rows, which begin `top` rows behind
  // the block's first, b0.
  void sweep_x(int64_t b0, int64_t top, int64_t rows, int64_t cb, const RowBlock* blocks,
               int64_t count) {
    const int64_t row = a_.cell.stride_h * l_.Wx * a_.cell.Cin;
    if (a_.cell.x_algorithm != CpuAlgorithm::sparse)
      return sweep(
          true, [&](const RowBlock& b) { return b.patch + top * row; }, row,
          a_.cell.stride_w * a_.cell.Cin, b0 + top, rows, cb, blocks, count);
    const Span span(Part::products);
    for (const RowBlock* b = blocks; b < blocks + count; ++b)
      sparse_.convolve(b->lists[top / strip_], weight(cb), b->gates);
  }

  // Reads the sums that torch has formed, and adds the bias.
  void read_sums(int64_t b0, int64_t b1, int64_t cb, const RowBlock& b) {
    const Span span(Part::copies);
    const int64_t left = a_.cell.C - cb * VL, row = l_.Wr * kGates;
    for (int gate = 0; gate < 4; ++gate) {
      View sums = a_.gate_sums;
      sums.data = static_cast<T*>(sums.data) + (gate * a_.cell.C + cb * VL) * sums.stride[2];
      load_rows<S>(sums, 0, b.r.n, b0, b1 - b0, left < VL ? left : VL, b.gates + gate * VL,
                   Pixels{l_.Wo, row, kGates}, VL);
    }
    if (!a_.bias) return;
    for (int64_t h = 0; h < b1 - b0; ++h)
      for (T *g = b.gates + h * row, *end = g + l_.Wo * kGates; g < end; g += kGates)
        for (int k = 0; k < kGates; k += VL)
          S::store(g + k, S::load(g + k) + S::load(bias_ + cb * kGates + k));
  }

  void direct(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      if (a_.cell.pointwise()) {
        for (int64_t k = 0; k < together; ++k) read_sums(b0, b1, cb, s.blocks[k]);
      } else {
        sweep(
            false, [&](const RowBlock& b) { return states_.mem_row(t, b.r, b0); }, l_.Wm * l_.Cp,
            l_.Cp, b0, b1 - b0, cb, s.blocks, together);
        sweep_x(b0, 0, b1 - b0, cb, s.blocks, together);
      }
      for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
        for (int64_t h = b0; h < b1; ++h)
          update(t, b->r, h, cb, b->gates + (h - b0) * l_.Wr * kGates);
    }
  }

  // Does the recurrent half by Winograd, and the input half too where x_algorithm says so. One
  // strip of rows at a time has its gates put together and used.
  void tiled(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    const Cell& c = a_.cell;
    const TileBlock<T> of_mem = tiles(b1 - b0, l_.Cp, together),
                       of_x = tiles(b1 - b0, x_channels(), together);
    const bool x_too = c.x_algorithm == CpuAlgorithm::winograd;
    const bool any = !equal_.sought() || find_equal(t, together, b0, b1, s) > 0;
    for (int64_t k = 0; any && k < together; ++k) {
      const RowBlock& b = s.blocks[k];
      inputs_.run(of_mem, states_.mem_row(t, b.r, b0), l_.Wm * l_.Cp, l_.Cp,
                  s.mem_values + k * of_mem.image_values());
      if (x_too)
        inputs_.run(of_x, b.patch, l_.Wx * c.Cin, c.Cin, s.x_values + k * of_x.image_values());
    }
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      const int64_t block = cb * l_.tile_weights() * kGates;
      if (any)
        multiply<S, 4>(of_mem, s.mem_values, static_cast<const T*>(a_.weight_mem) + block * c.C,
                       c.C, false, s.products);
      if (any && x_too)
        multiply<S, 4>(of_x, s.x_values, static_cast<const T*>(a_.weight_x) + block * c.Cin, c.Cin,
                       true, s.products);
      for (int64_t h0 = b0; h0 < b1; h0 += strip_) {
        const int64_t h1 = h0 + strip_ < b1 ? h0 + strip_ : b1;
        for (int64_t k = 0; k < together; ++k) {
          if (any) add_strip(of_mem, k, b0, h0, h1, cb, s);
          if (equal_.sought()) sum_equal(t, s.blocks[k], b0, h0, h1, cb);
        }
        if (!x_too) sweep_x(b0, h0 - b0, h1 - h0, cb, s.blocks, together);
        for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
          for (int64_t h = h0; h < h1; ++h)
            update(t, b->r, h, cb, b->gates + (h - h0) * l_.Wr * kGates);
      }
    }
  }

  // Writes the bias and the outputs of the tiles to the gates of state rows [h0, h1) of one image.
  // The tiles begin at row b0.
  void add_strip(const TileBlock<T>& b, int64_t image, int64_t b0, int64_t h0, int64_t h1,
                 int64_t cb, const ForwardScratch& s) {
    const Span span(Part::transforms);
    constexpr int lanes = GateVector::lanes;
    const Plane from{b.form.w.inputs() * b.products_stride, b.products_stride, lanes};
    const Plane to{b.dilation_h * l_.Wr * kGates, b.dilation_w * kGates, lanes};
    const int64_t r0 = image * b.rows + (h0 - b0) / l_.form.h.tile;
    const int64_t rows = l_.tiles(l_.form.h, a_.cell.dilation_h, h1 - h0);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t column = 0; column < b.columns; ++column) {
        T* out = s.blocks[image].gates + (b.row(k) * l_.Wr + b.column(column)) * kGates;
        outputs_.run(s.products + ((r0 + k) * b.columns + column) * kGates, from, out, to,
                     kGates / lanes, bias_ + cb * kGates, Plane{0, 0, lanes});
      }
  }

  // Finds the pixels of each block whose sums are formed directly, and counts the others.
  int64_t find_equal(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    const Span span(Part::transforms);
    int64_t left = 0;
    for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
      left += equal_.find(states_.mem_row(t, b->r, b0), b1 - b0, s.equal, b->sums);
    return left;
  }

  // Forms those sums for state rows [h0, h1) of one block, of x too if its half is Winograd's.
  void sum_equal(int64_t t, const RowBlock& b, int64_t b0, int64_t h0, int64_t h1, int64_t cb) {
    const Span span(Part::products);
    const Sums* sums = equal_.row(b.sums, h0 - b0);
    equal_.write_mem(sums, h1 - h0, mem_runs_, states_.mem_row(t, b.r, h0), weight(cb),
                     bias_ + cb * kGates, b.gates);
    if (a_.cell.x_algorithm == CpuAlgorithm::winograd)
      equal_.add_x(sums, h1 - h0, x_runs_, b.patch + (h0 - b0) * l_.Wx * a_.cell.Cin, weight(cb),
                   b.gates);
  }

  // Does the LSTM update, reset and quantisation of one row and channel block. Each of two loops
  // has one chain of exp and division per pixel, so that more pixels are in flight.
  void update(int64_t t, const Rows& r, int64_t h, int64_t cb, T* gates) {
    const Span span(Part::pointwise);
    const Cell& c = a_.cell;
    const R threshold = S::load(threshold_ + cb * VL);
    const bool resets = c.reset != Reset::none;
    const T* syn_in = states_.syn_before(t, r, h) + cb * VL;
    T* syn_out = states_.syn_after(t, r, h) + cb * VL;
    const T* mem_in = states_.mem_inner(t, r, h) + cb * VL;
    T* mem_out = states_.mem_inner(t + 1, r, h) + cb * VL;
    const int64_t pixel = l_.Cb * saved_.size();
    T* saved = a_.saved_gates
                   ? static_cast<T*>(a_.saved_gates) +
                         ((t * c.N + r.n) * l_.pixels + h * l_.Wo) * pixel + cb * saved_.size()
                   : nullptr;
    for (int64_t w = 0; w < l_.Wo; ++w) {
      T* g = gates + w * kGates;
      const Gates<R> act = Neuron<M>::activate(
          {S::load(g), S::load(g + VL), S::load(g + 2 * VL), S::load(g + 3 * VL)});
      S::store(g, Neuron<M>::next_syn(act, S::load(syn_in + w * l_.Cp)));
      S::store(g + 2 * VL, act.o);
      if (saved) saved_.put(saved + w * pixel, act);
    }
    for (int64_t w = 0; w < l_.Wo; ++w) {
      const T* g = gates + w * kGates;
      R syn = S::load(g);
      const R o = S::load(g + 2 * VL);
      const Mask reset = resets ? Neuron<M>::fires(S::load(mem_in + w * l_.Cp), threshold) : Mask{};
      R mem = Neuron<M>::next_mem(o, M::tanh(syn));
      mem = Neuron<M>::after_reset(c.reset, mem, reset, threshold);
      S::store(syn_out + w * l_.Cp, quantised<M>(syn, a_));
      S::store(mem_out + w * l_.Cp, quantised<M>(mem, a_));
      if (saved) saved_.put_output(saved + w * pixel, o, reset);
    }
  }

  void write_states(int64_t t, const Rows& r, int64_t begin, int64_t end) {
    const Span span(Part::copies);
    const auto put = [&](const View& v, const T* src, int64_t row) {
      store_rows<S>(src, Pixels{l_.Wo, row, l_.Cp}, end - begin, a_.cell.C, v, t, r.n, begin,
                    [](R state, int64_t) { return state; });
    };
    const T* mem = states_.mem_inner(t + 1, r, begin);
    if (a_.spk_is_mem()) put(a_.spk, mem, l_.Wm * l_.Cp);
    if (!a_.record && t != r.steps - 1) return;
    put(a_.syn, states_.syn_after(t, r, begin), l_.Wo * l_.Cp);
    put(a_.mem, mem, l_.Wm * l_.Cp);
  }

  // Returns row h of the pooled image: channels-last pixels, which lie `stride` apart. In training
  // it keeps the places of the maxima.
  const T* pooled_row(int64_t t, const Rows& r, int64_t h, const ForwardScratch& s,
                      int64_t& stride) {
    const Cell& c = a_.cell;
    const T* mem = states_.mem_inner(t + 1, r, h * c.pool_h);
    stride = l_.Cp;
    if (c.pool == Pool::none) return mem;  // quantised already
    const int64_t row = l_.Wm * l_.Cp, first = places_.row(t, r.n, h);
    for (int64_t w = 0; w < l_.Wp; ++w)
      for (int64_t ch = 0; ch < l_.Cp; ch += VL) {
        const T* window = mem + w * c.pool_w * l_.Cp + ch;
        const int64_t k = w * l_.Cp + ch;
        R v;
        if (c.pool == Pool::max) {
          v = PoolWindow<M>::max(c, window, row, l_.Cp);
          if (places_.present())
            places_.put(first + k, PoolWindow<M>::place(c, window, row, l_.Cp, v));
        } else {
          v = PoolWindow<M>::mean(c, window, row, l_.Cp);
        }
        S::store(s.pooled + k, quantised<M>(v, a_));
      }
    return s.pooled;
  }

  T graded() const { return *static_cast<const T*>(a_.graded_factor); }

  // Writes the spikes of rows [begin, end) of the pooled image.
  void fire(int64_t t, const Rows& r, int64_t begin, int64_t end, const ForwardScratch& s) {
    const Span span(Part::pointwise);
    const R spike = S::splat(graded()), silent = S::splat(T(0) * graded());
    const auto spikes = [&](R mem, int64_t ch) {
      return S::where(Neuron<M>::fires(mem, S::load(threshold_ + ch)), spike, silent);
    };
    const int64_t rows = a_.cell.pool == Pool::none ? end - begin : 1;
    for (int64_t h = begin; h < end; h += rows) {
      int64_t stride;
      const T* row = pooled_row(t, r, h, s, stride);
      store_rows<S>(row, Pixels{l_.Wp, l_.Wm * l_.Cp, stride}, rows, a_.cell.C, a_.spk, t, r.n, h,
                    spikes);
    }
  }

  // Inhibition lets only the neuron of a sample with the highest (pooled) membrane potential spike.
  // Of those that count as the highest the one with the lowest index in (C, Hp, Wp) wins.
  void fire_winner(int64_t t, const Rows& r, const ForwardScratch& s) {
    const Span span(Part::pointwise);
    const Cell& c = a_.cell;
    const View& v = a_.spk;
    const auto each = [&](auto&& look) {
      for (int64_t h = 0; h < l_.Hp; ++h) {
        int64_t stride;
        const T* row = pooled_row(t, r, h, s, stride);
        for (int64_t ch = 0; ch < c.C; ++ch)
          for (int64_t w = 0; w < l_.Wp; ++w)
            look(row[w * stride + ch], (ch * l_.Hp + h) * l_.Wp + w);
        store_row<S>(row, Row{stride}, l_.Wp, c.C, row_of<T>(v, t, r.n, h), v.stride[2],
                     v.stride[4], [&](R, int64_t) { return S::splat(T(0) * graded()); });
      }
    };
    T highest = -INFINITY, best = 0;
    each([&](T mem, int64_t) { highest = mem > highest || mem != mem ? mem : highest; });
    const T unit = M::last_place(S::splat(highest))[0];
    int64_t winner = -1;
    each([&](T mem, int64_t index) {
      if ((winner < 0 || index < winner) && is_largest(mem, highest, unit))
        best = mem, winner = index;
    });
    if (a_.winner) a_.winner[t * c.N + r.n] = winner;
    if (winner < 0) return;
    const int64_t ch = winner / (l_.Hp * l_.Wp), h = winner / l_.Wp % l_.Hp, w = winner % l_.Wp;
    if (best - threshold_[ch] > T(0))
      row_of<T>(v, t, r.n, h)[ch * v.stride[2] + w * v.stride[4]] = graded();
  }

  const ForwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StateRows<T, VL> states_;
  int64_t block_, strip_;  // rows worked on at a time; rows whose gates are in the buffer at a time
  SavedGates<M> saved_;
  Places<M> places_;
  SparseInput<T, VL> sparse_;
  EqualPixels<T, VL> equal_;
  InputTransform<S> inputs_;
  PlaneTransform<GateVector> outputs_;
  RunList x_runs_, mem_runs_;
  Phases::Counter* counters_ = nullptr;
  T *bias_ = nullptr, *threshold_ = nullptr;
  ForwardScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
