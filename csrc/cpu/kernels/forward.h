// The forward pass of a sequence. For each step and block of rows it convolves the gates, and
// updates the neurons (neuron_forward.h) while the gates still lie in L1. A thread takes several
// small images together. state_rows.h holds the states.
#pragma once

#include "equal_pixels.h"
#include "neuron_forward.h"
#include "sparse.h"
#include "threads.h"
#include "tiles.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Forward {
  using S = Simd<T, VL>;
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
        neuron_(args, l_, states_),
        sparse_(l_, strip_),
        equal_(l_, block_, strip_) {
    if constexpr (kHasWinograd<T, VL>) {
      inputs_ = InputTransform<S>(l_.winograd);
      outputs_ =
          PlaneTransform<GateVector>::outputs(l_.winograd, l_.winograd.h.tile, l_.winograd.w.tile);
    }
    Workspace workspace(args.workspace);
    allocate(workspace);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    ForwardArgs args;
    args.cell = cell;
    args.threads = threads;
    Forward f(args);
    Workspace workspace(nullptr);
    f.allocate(workspace);
    return workspace.bytes();
  }

  void run() {
    const Cell& c = a_.cell;
    x_runs_.dense(c, c.Cin, l_.Wx * c.Cin, c.Cin, 0, kChunk);
    mem_runs_.dense(c, c.C, l_.Wm * l_.Cp, l_.Cp, l_.Kx, kChunk);
    pack_vectors();
    const Phases phases(counters_, c.T + 1);
    parallel(a_.threads, l_.step_work(), [&](int thread) {
      if (c.T > 1)
        phases.run(0, tasks_.count, [&](int64_t task) { states_.read(task, thread, 0); });
      for (int64_t t = 0; t < c.T; ++t) {
        const RowTasks tasks = tasks_.at(t);
        const int64_t groups = tasks.groups(), left = tasks.images();
        phases.run(t + 1, groups + (a_.spk.data ? c.N - left : 0), [&](int64_t task) {
          if (task < groups) return step(t, tasks, task, thread);
          clear_image<T>(a_.spk, t, tasks.sample(left + task - groups), c.C * l_.Hp * l_.Wp);
        });
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
    Sums* sums;                                      // Winograd: how every pixel is summed
  };

  struct ForwardScratch {
    RowBlock* blocks;
    T *mem_values, *x_values, *products;  // Winograd: tiles.h
    typename EqualPixels<T, VL>::Scratch equal;
  };

  void allocate(Workspace& workspace) {
    const Cell& c = a_.cell;
    counters_ = workspace.take<Phases::Counter>(c.T + 1);
    bias_ = workspace.take<T>(l_.Cb * kGates);
    neuron_.allocate(workspace);
    states_.allocate(workspace);
    scratch_ = workspace.take<ForwardScratch>(a_.threads);
    const int64_t points = c.tiled() ? l_.winograd.points() : 0;
    const TileBlock<T> mem_tiles = tiles(block_, l_.Cp, 1);
    const TileBlock<T> x_tiles = tiles(block_, x_channels(), 1);
    for (int k = 0; k < a_.threads; ++k) {
      const ForwardScratch s{
          workspace.take<RowBlock>(tasks_.most_together),
          workspace.take<T>(points * mem_tiles.values_stride),
          workspace.take<T>(c.x_algorithm == CpuAlgorithm::winograd ? points * x_tiles.values_stride
                                                                    : 0),
          workspace.take<T>(points * mem_tiles.products_stride), equal_.allocate(workspace)};
      for (int64_t slot = 0; slot < tasks_.most_together; ++slot) {
        const RowBlock b = allocate_block(workspace);
        if (s.blocks) s.blocks[slot] = b;
      }
      if (scratch_) scratch_[k] = s;
    }
  }

  RowBlock allocate_block(Workspace& workspace) const {
    const int64_t strips =
        a_.cell.x_algorithm == CpuAlgorithm::sparse ? (block_ + strip_ - 1) / strip_ : 0;
    const RowBlock b{{},
                     workspace.take<T>(patch_rows(block_) * l_.Wx * a_.cell.Cin + kReadAhead),
                     workspace.take<T>(strip_ * l_.Wr * kGates),
                     workspace.take<typename SparseInput<T, VL>::InputLists>(strips),
                     workspace.take<Sums>(equal_.decisions())};
    for (int64_t strip = 0; strip < strips; ++strip) {
      typename SparseInput<T, VL>::InputLists lists;
      sparse_.allocate(workspace, lists);
      if (b.lists) b.lists[strip] = lists;
    }
    return b;
  }

  // Describes the tiles of `rows` rows of each of `together` images.
  TileBlock<T> tiles(int64_t rows, int64_t channels, int64_t together) const {
    return tile_block(l_, l_.winograd, rows, channels, together, tasks_.most_together);
  }
  int64_t x_channels() const { return l_.x_blocks * VL; }
  // Returns a channel block's weight for direct sums.
  const T* weight(int64_t cb) const {
    return static_cast<const T*>(a_.weight) + cb * l_.packed_rows() * kGates;
  }

  void pack_vectors() {
    const Cell& c = a_.cell;
    const T* bias = static_cast<const T*>(a_.bias);
    for (int64_t ch = 0; ch < l_.Cp; ++ch)
      for (int gate = 0; gate < 4; ++gate)
        bias_[ch / VL * kGates + gate * VL + ch % VL] =
            bias && ch < c.C ? bias[gate * c.C + ch] : T(0);
    neuron_.pack_vectors();
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
      for (int64_t k = 0; k < together; ++k) {
        gather_x(t, s.blocks[k].r.n, b0, b1, s.blocks[k].patch);
        if (a_.cell.x_algorithm == CpuAlgorithm::sparse) list_x(b0, b1, s.blocks[k]);
      }
      if (!a_.cell.tiled())
        direct(t, together, b0, b1, s);
      else if constexpr (kHasWinograd<T, VL>)
        tiled(t, together, b0, b1, s);
    }
    for (int64_t k = 0; k < together; ++k) neuron_.finish(t, s.blocks[k].r, begin, end, thread);
  }

  // Returns how many input rows the kernel, or the tiles, of `rows` state rows read.
  int64_t patch_rows(int64_t rows) const {
    const Cell& c = a_.cell;
    if (!l_.tiled_x()) return (rows - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
    return l_.whole(l_.winograd.h, c.dilation_h, rows) + (l_.winograd.h.taps() - 1) * c.dilation_h;
  }

  // Copies the input rows that state rows [b0, b1) read, channels-last, with a zero border.
  void gather_x(int64_t t, int64_t n, int64_t b0, int64_t b1, T* patch) {
    const Cell& c = a_.cell;
    const int64_t first = b0 * c.stride_h - l_.ph;
    const int64_t rows = patch_rows(b1 - b0);
    const int64_t row = l_.Wx * c.Cin;
    const int64_t border = l_.pw * c.Cin;
    const int64_t right = (l_.pw + c.W) * c.Cin;
    const auto clamp = [](int64_t k, int64_t least, int64_t most) {
      return k < least ? least : k < most ? k : most;
    };
    const int64_t top = clamp(-first, 0, rows);
    const int64_t bottom = clamp(c.H - first, top, rows);
    std::memset(patch, 0, top * row * sizeof(T));
    std::memset(patch + bottom * row, 0, (rows - bottom) * row * sizeof(T));
    for (int64_t k = top; k < bottom; ++k) {
      std::memset(patch + k * row, 0, border * sizeof(T));
      std::memset(patch + k * row + right, 0, (row - right) * sizeof(T));
    }
    load_rows<S>(a_.x, t, n, first + top, bottom - top, c.Cin, patch + top * row + border,
                 Pixels{c.W, row, c.Cin}, c.Cin);
  }

  // Sums a half for `rows` rows of each block, from state row `first` on. The half of mem and the
  // bias overwrite the block's gates, the half of x is added. in(block) is the first row's input.
  template <class In>
  void sweep(bool is_x, In&& in, int64_t row, int64_t pixel, int64_t first, int64_t rows,
             int64_t cb, const RowBlock* blocks, int64_t count) {
    const RunList& list = is_x ? x_runs_ : mem_runs_;
    const T* w = weight(cb);
    list.chunks(kChunk, [&, add = is_x](const Run* chunk, int size) mutable {
      for (int64_t h = 0; h < rows; ++h) {
        const Run* runs = chunk;
        int number = size;
        list.limit(runs, number, l_.met(first + h, is_x));
        if (add && number == 0) continue;
        for (const RowBlock* b = blocks; b < blocks + count; ++b) {
          T* out = b->gates + h * l_.Wr * kGates;
          conv_row<S, 4>(in(*b) + h * row, pixel, runs, number, w,
                         add ? Start<T>{out, kGates} : Start<T>{bias_ + cb * kGates, 0}, out,
                         kGates, l_.Wo);
        }
      }
      add = true;
    });
  }

  void list_x(int64_t b0, int64_t b1, const RowBlock& b) {
    const int64_t row = a_.cell.stride_h * l_.Wx * a_.cell.Cin;
    for (int64_t h = b0; h < b1; h += strip_)
      sparse_.build(b.patch + (h - b0) * row, h + strip_ < b1 ? strip_ : b1 - h,
                    b.lists[(h - b0) / strip_]);
  }

  // Adds the input half of a strip of each block: `rows` state rows, from `top` rows below the
  // block's first row b0 on.
  void sweep_x(int64_t b0, int64_t top, int64_t rows, int64_t cb, const RowBlock* blocks,
               int64_t count) {
    const int64_t row = a_.cell.stride_h * l_.Wx * a_.cell.Cin;
    if (a_.cell.x_algorithm != CpuAlgorithm::sparse)
      return sweep(
          true, [&](const RowBlock& b) { return b.patch + top * row; }, row,
          a_.cell.stride_w * a_.cell.Cin, b0 + top, rows, cb, blocks, count);
    for (const RowBlock* b = blocks; b < blocks + count; ++b)
      sparse_.convolve(b->lists[top / strip_], weight(cb), b->gates);
  }

  void direct(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      sweep(
          false, [&](const RowBlock& b) { return states_.mem_row(t, b.r, b0); }, l_.Wm * l_.Cp,
          l_.Cp, b0, b1 - b0, cb, s.blocks, together);
      sweep_x(b0, 0, b1 - b0, cb, s.blocks, together);
      for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
        for (int64_t h = b0; h < b1; ++h)
          neuron_.update(t, b->r, h, cb, b->gates + (h - b0) * l_.Wr * kGates);
    }
  }

  // Computes the recurrent half by Winograd, and the input half, too, if x_algorithm is Winograd.
  // The gates are assembled and used one strip of rows at a time.
  void tiled(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    const Cell& c = a_.cell;
    const TileBlock<T> mem_tiles = tiles(b1 - b0, l_.Cp, together);
    const TileBlock<T> x_tiles = tiles(b1 - b0, x_channels(), together);
    const bool x_too = c.x_algorithm == CpuAlgorithm::winograd;
    bool any = !equal_.sought();  // says whether any pixel's sums are Winograd's
    for (const RowBlock* b = s.blocks; equal_.sought() && b < s.blocks + together; ++b)
      any |= equal_.find(states_.mem_row(t, b->r, b0), b1 - b0, s.equal, b->sums) > 0;
    for (int64_t k = 0; any && k < together; ++k) {
      const RowBlock& b = s.blocks[k];
      inputs_.run(mem_tiles, states_.mem_row(t, b.r, b0), l_.Wm * l_.Cp, l_.Cp,
                  s.mem_values + k * mem_tiles.image_values());
      if (x_too)
        inputs_.run(x_tiles, b.patch, l_.Wx * c.Cin, c.Cin,
                    s.x_values + k * x_tiles.image_values());
    }
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      const int64_t block = cb * l_.tile_weights() * kGates;
      if (any)
        multiply<S, 4>(mem_tiles, s.mem_values, static_cast<const T*>(a_.weight_mem) + block * c.C,
                       c.C, false, s.products);
      if (any && x_too)
        multiply<S, 4>(x_tiles, s.x_values, static_cast<const T*>(a_.weight_x) + block * c.Cin,
                       c.Cin, true, s.products);
      for (int64_t h0 = b0; h0 < b1; h0 += strip_) {
        const int64_t h1 = h0 + strip_ < b1 ? h0 + strip_ : b1;
        for (int64_t k = 0; k < together; ++k) {
          if (any) add_strip(mem_tiles, k, b0, h0, h1, cb, s);
          if (equal_.sought()) sum_equal(t, s.blocks[k], b0, h0, h1, cb);
        }
        if (!x_too) sweep_x(b0, h0 - b0, h1 - h0, cb, s.blocks, together);
        for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
          for (int64_t h = h0; h < h1; ++h)
            neuron_.update(t, b->r, h, cb, b->gates + (h - h0) * l_.Wr * kGates);
      }
    }
  }

  // Writes the bias and the outputs of the tiles to the gates of state rows [h0, h1) of one image.
  // The tiles begin at row b0.
  void add_strip(const TileBlock<T>& b, int64_t image, int64_t b0, int64_t h0, int64_t h1,
                 int64_t cb, const ForwardScratch& s) {
    constexpr int lanes = GateVector::lanes;
    const Plane from{b.winograd.w.inputs() * b.products_stride, b.products_stride, lanes};
    const Plane to{b.dilation_h * l_.Wr * kGates, b.dilation_w * kGates, lanes};
    const int64_t r0 = image * b.rows + (h0 - b0) / l_.winograd.h.tile;
    const int64_t rows = l_.tiles(l_.winograd.h, a_.cell.dilation_h, h1 - h0);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t column = 0; column < b.columns; ++column) {
        T* out = s.blocks[image].gates + (b.row(k) * l_.Wr + b.column(column)) * kGates;
        outputs_.run(s.products + ((r0 + k) * b.columns + column) * kGates, from, out, to,
                     kGates / lanes, bias_ + cb * kGates, Plane{0, 0, lanes});
      }
  }

  // Computes direct sums of the pixels that may have an equal, for state rows [h0, h1) of one
  // block, with x's sums if Winograd computes x's half.
  void sum_equal(int64_t t, const RowBlock& b, int64_t b0, int64_t h0, int64_t h1, int64_t cb) {
    const Sums* sums = equal_.row(b.sums, h0 - b0);
    equal_.write_mem(sums, h1 - h0, mem_runs_, states_.mem_row(t, b.r, h0), weight(cb),
                     bias_ + cb * kGates, b.gates);
    if (a_.cell.x_algorithm == CpuAlgorithm::winograd)
      equal_.add_x(sums, h1 - h0, x_runs_, b.patch + (h0 - b0) * l_.Wx * a_.cell.Cin, weight(cb),
                   b.gates);
  }

  const ForwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StateRows<T, VL> states_;
  int64_t block_, strip_;  // rows worked on at a time; rows whose gates are in the buffer at a time
  NeuronForward<T, VL> neuron_;
  SparseInput<T, VL> sparse_;
  EqualPixels<T, VL> equal_;
  InputTransform<S> inputs_;
  PlaneTransform<GateVector> outputs_;
  RunList x_runs_, mem_runs_;
  Phases::Counter* counters_ = nullptr;
  T* bias_ = nullptr;
  ForwardScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
