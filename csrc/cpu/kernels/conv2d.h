// A convolution in float32 by the kernels of the cell. Four neighbouring vectors of output channels
// take the place of the cell's gates.
#pragma once

#include "input_half.h"
#include "row_tasks.h"
#include "threads.h"
#include "weight_gradient.h"

SNNLSTM_BEGIN_ISA

// y from x: over lists of nonzeros, or by Winograd.
template <class T, int VL>
class Convolution {
  using S = Simd<T, VL>;
  using Block = InputBlock<T, VL>;
  static constexpr int kOutputs = 4 * VL;

  struct Scratch {
    Block* blocks;
    TileBuffers<T> tiles;
  };

 public:
  explicit Convolution(const ConvolutionArgs& args)
      : a_(args), l_(args.cell), tasks_(l_, args, args.threads, true), x_(l_, args.x) {
    Workspace workspace(args.workspace);
    allocate(workspace);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    ConvolutionArgs args;
    args.cell = cell;
    args.threads = threads;
    Convolution f(args);
    Workspace workspace(nullptr);
    f.allocate(workspace);
    return workspace.bytes();
  }

  void run() {
    const T* bias = static_cast<const T*>(a_.bias);
    for (int64_t ch = 0; ch < l_.Cb * kOutputs; ++ch)
      bias_[ch] = bias && ch < a_.cell.Cout ? bias[ch] : T(0);
    const Phases phases(counters_, 1);
    parallel(a_.threads, l_.step_work(), [&](int thread) {
      phases.run(0, tasks_.groups(), [&](int64_t group) { rows(group, scratch_[thread]); });
    });
  }

 private:
  void allocate(Workspace& workspace) {
    counters_ = workspace.take<Phases::Counter>(1);
    bias_ = workspace.take<T>(l_.Cb * kOutputs);
    scratch_ = workspace.take<Scratch>(a_.threads);
    const TileSizes sizes(l_, l_.winograd, l_.x.blocks * VL, tasks_.most_together);
    for (int k = 0; k < a_.threads; ++k) {
      const Scratch s{workspace.take<Block>(tasks_.most_together),
                      sizes.template allocate<T>(workspace)};
      for (int64_t slot = 0; slot < tasks_.most_together; ++slot) {
        Block b;
        x_.allocate(workspace, b);
        if (s.blocks) s.blocks[slot] = b;
      }
      if (scratch_) scratch_[k] = s;
    }
  }

  // Does the tasks of a group, which are the same rows of each of its images.
  void rows(int64_t group, const Scratch& s) const {
    const int64_t first = tasks_.first(group), together = tasks_.together(group);
    const int64_t end = tasks_.end(first), n = tasks_.image(first);
    for (int64_t b0 = tasks_.begin(first); b0 < end; b0 += x_.block()) {
      const int64_t b1 = std::min(b0 + x_.block(), end);
      for (int64_t k = 0; k < together; ++k) x_.read(0, n + k, b0, b1, s.blocks[k]);
      if (!a_.cell.tiled())
        over_lists(n, together, b0, b1, s);
      else if constexpr (kHasWinograd<T, VL>)
        by_tiles(n, together, b0, b1, s);
    }
  }

  void over_lists(int64_t n, int64_t together, int64_t b0, int64_t b1, const Scratch& s) const {
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      const T* weight = static_cast<const T*>(a_.weight) + cb * l_.x.K * kOutputs;
      for (const Block* b = s.blocks; b < s.blocks + together; ++b)
        for (int64_t k = 0; k < (b1 - b0) * l_.Wr; ++k)
          std::memcpy(b->gates + k * kOutputs, bias_ + cb * kOutputs, kOutputs * sizeof(T));
      x_.add(b0, 0, b1 - b0, weight, s.blocks, together);
      for (int64_t k = 0; k < together; ++k) store(n + k, b0, b1, cb, s.blocks[k].gates);
    }
  }

  void by_tiles(int64_t n, int64_t together, int64_t b0, int64_t b1, const Scratch& s) const {
    const TileBlock<T> tiles = x_.tiles(b1 - b0, together, tasks_.most_together);
    const int64_t Cin = a_.cell.Cin;
    for (int64_t k = 0; k < together; ++k)
      x_.transform(tiles, s.blocks[k], s.tiles.values + k * tiles.image_values());
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      const T* weight = static_cast<const T*>(a_.weight) + cb * l_.tile_weights() * kOutputs * Cin;
      multiply<S, 4, 32>(tiles, s.tiles.values, weight, Cin, false, s.tiles.products);
      for (int64_t h0 = b0; h0 < b1; h0 += x_.strip()) {
        const int64_t h1 = std::min(h0 + x_.strip(), b1);
        for (int64_t k = 0; k < together; ++k) {
          x_.assemble(tiles, k, b0, h0, h1, bias_ + cb * kOutputs, s.tiles.products,
                      s.blocks[k].gates);
          store(n + k, h0, h1, cb, s.blocks[k].gates);
        }
      }
    }
  }

  // Stores rows [h0, h1) of one channel block.
  void store(int64_t n, int64_t h0, int64_t h1, int64_t cb, const T* sums) const {
    const View& y = a_.y;
    if (y.stride[2] != 1) {
      for (int64_t gate = 0; gate < 4 && l_.lanes(cb, gate) > 0; ++gate) {
        View part = y;
        part.data = static_cast<T*>(y.data) + l_.output(cb, gate) * y.stride[2];
        store_rows<S>(sums + gate * VL, Pixels{l_.Wo, l_.Wr * kOutputs, kOutputs}, h1 - h0,
                      l_.lanes(cb, gate), part, 0, n, h0,
                      [](typename S::R r, int64_t) { return r; });
      }
      return;
    }
    const int64_t lanes = std::min<int64_t>(a_.cell.Cout - cb * kOutputs, kOutputs);
    for (int64_t h = h0; h < h1; ++h, sums += l_.Wr * kOutputs) {
      T* to = static_cast<T*>(y.data) + n * y.stride[1] + h * y.stride[3] + cb * kOutputs;
      const T* from = sums;
      for (int64_t w = 0; w < l_.Wo; ++w, to += y.stride[4], from += kOutputs)
        if (lanes == kOutputs)  // whose size the compiler knows
          std::memcpy(to, from, kOutputs * sizeof(T));
        else
          std::memcpy(to, from, lanes * sizeof(T));
    }
  }

  const ConvolutionArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  InputHalf<T, VL> x_;
  Phases::Counter* counters_ = nullptr;
  T* bias_ = nullptr;
  Scratch* scratch_ = nullptr;
};

// The gradients of weight and bias, summed over the steps as in a cell's backward pass.
template <class T, int VL>
class ConvolutionBackward {
  using S = Simd<T, VL>;
  static constexpr int kOutputs = 4 * VL;
  // The work is cut as for this many threads, so that the sums do not depend on their number.
  static constexpr int kCut = 4;

 public:
  explicit ConvolutionBackward(const ConvolutionArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args, kCut, false),
        images_(l_),
        weights_(l_, args.threads, kCut) {
    Workspace workspace(args.workspace);
    allocate(workspace);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    ConvolutionArgs args;
    args.cell = cell;
    args.threads = threads;
    ConvolutionBackward b(args);
    Workspace workspace(nullptr);
    b.allocate(workspace);
    return workspace.bytes();
  }

  void run() {
    const Phases phases(counters_, most_phases());
    parallel(a_.threads, l_.step_work(), [&](int thread) { steps(phases, thread); });
  }

 private:
  int64_t most_phases() const { return 2 * a_.cell.T + 3; }

  void allocate(Workspace& workspace) {
    counters_ = workspace.take<Phases::Counter>(most_phases());
    weights_.allocate(workspace);
    images_.allocate(workspace, true);
    bias_sums_ = workspace.take<T>(tasks_.count * 4 * l_.Cp);
    tiles_ = workspace.take<TileBuffers<T>>(a_.threads);
    const TileSizes sizes = weights_.tile_sizes();
    for (int k = 0; k < a_.threads; ++k) {
      const TileBuffers<T> tiles = sizes.template allocate<T>(workspace);
      if (tiles_) tiles_[k] = tiles;
    }
  }

  // While the gradient of a step is summed, the images of the step before it are read.
  void steps(const Phases& phases, int thread) {
    WeightSums<T, VL>& sums = weights_.sums();
    const int64_t last = a_.cell.T - 1, count = tasks_.count, weight_tasks = weights_.tasks();
    phases.run(0, count + sums.chunks(), [&](int64_t task) {
      if (task >= count) return sums.clear(task - count);
      std::memset(bias_sums_ + task * 4 * l_.Cp, 0, 4 * l_.Cp * sizeof(T));
      if (tasks_.begin(task) == 0) images_.clear_borders(tasks_.image(task));
    });
    phases.run(1, count, [&](int64_t task) { read(last, task); });
    int64_t phase = 2;
    for (int64_t t = last; t >= 0; --t) {
      phases.run(phase++, weight_tasks + (t > 0 ? count : 0), [&](int64_t task) {
        if (task >= weight_tasks) return read(t - 1, task - weight_tasks);
        weights_.add(images_.images(t), a_.cell.N, task, thread, tiles_[thread]);
      });
      if (sums.due(t))
        phases.run(phase++, sums.chunks(), [&](int64_t task) { sums.fold(task, t); });
    }
    phases.run(phase, l_.Cb + sums.write_tasks(), [&](int64_t task) {
      if (task < l_.Cb) return write_bias(task);
      sums.write(task - l_.Cb, thread, static_cast<T*>(a_.grad_weight));
    });
  }

  // Reads a task's rows of x and of y's gradient, and adds the latter to the bias's sums.
  void read(int64_t t, int64_t task) {
    const int64_t n = tasks_.image(task), begin = tasks_.begin(task), end = tasks_.end(task);
    const int64_t pixel = 4 * l_.Cp;
    images_.read_x(a_.x, t, n, n, begin, end);
    load_rows<S>(a_.y, t, n, begin, end - begin, a_.cell.Cout, images_.d_gates_row(t, n, begin),
                 Pixels{l_.Wo, l_.gate_row(), pixel}, pixel);
    T* const sums = bias_sums_ + task * pixel;
    for (int64_t ch = 0; ch < pixel; ch += kOutputs) {
      typename S::R all[4] = {};
      for (int64_t h = begin; h < end; ++h) {
        const T* in = images_.d_gates_row(t, n, h) + ch;
        typename S::R row[4] = {};
        for (int64_t w = 0; w < l_.Wo; ++w, in += pixel)
          for (int k = 0; k < 4; ++k) row[k] += S::load(in + k * VL);
        for (int k = 0; k < 4; ++k) all[k] += row[k];
      }
      for (int k = 0; k < 4; ++k)
        S::store(sums + ch + k * VL, S::load(sums + ch + k * VL) + all[k]);
    }
    images_.finite(sums, pixel);
  }

  void write_bias(int64_t cb) const {
    T* const to = static_cast<T*>(a_.grad_bias);
    if (!to) return;
    for (int64_t ch = cb * kOutputs; ch < std::min(a_.cell.Cout, (cb + 1) * kOutputs); ++ch) {
      T sum = 0;
      for (int64_t task = 0; task < tasks_.count; ++task) sum += bias_sums_[task * 4 * l_.Cp + ch];
      to[ch] = sum;
    }
  }

  const ConvolutionArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StepBuffers<T, VL> images_;
  WeightGradient<T, VL> weights_;
  Phases::Counter* counters_ = nullptr;
  T* bias_sums_ = nullptr;
  TileBuffers<T>* tiles_ = nullptr;
};

SNNLSTM_END_ISA
