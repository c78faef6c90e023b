// The forward pass of a sequence. For each step and block of rows it convolves the gates, and
// updates the neurons (neuron_forward.h) while the gates still lie in L1. A thread takes several
// small images together. state_rows.h holds the states.
#pragma once

#include "equal_pixels.h"
#include "input_half.h"
#include "neuron_forward.h"
#include "threads.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Forward {
  using S = Simd<T, VL>;
  static constexpr int kGates = 4 * VL;
  using Rows = typename StateRows<T, VL>::Rows;

 public:
  explicit Forward(const ForwardArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args, args.threads, true),
        states_(args, l_, tasks_),
        x_(l_, args.x),
        neuron_(args, l_, states_),
        equal_(l_, x_.block(), x_.strip()) {
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
    x_.list_taps();
    mem_runs_ = l_.mem.runs(c, chunk_length<T>(kGates));
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
  // The rows of one image that a thread works on, and their buffers.
  struct RowBlock : InputBlock<T, VL> {
    Rows r;
    Sums* sums;  // Winograd: how every pixel is summed
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
    const TileBlock<T> mem_tiles = tiles(x_.block(), 1);
    const TileBlock<T> x_tiles = x_.tiles(x_.block(), 1, tasks_.most_together);
    for (int k = 0; k < a_.threads; ++k) {
      const ForwardScratch s{
          workspace.take<RowBlock>(tasks_.most_together),
          workspace.take<T>(points * mem_tiles.values_stride),
          workspace.take<T>(c.x_algorithm == CpuAlgorithm::winograd ? points * x_tiles.values_stride
                                                                    : 0),
          workspace.take<T>(points * mem_tiles.products_stride), equal_.allocate(workspace)};
      for (int64_t slot = 0; slot < tasks_.most_together; ++slot) {
        RowBlock b{};
        x_.allocate(workspace, b);
        b.sums = workspace.take<Sums>(equal_.decisions());
        if (s.blocks) s.blocks[slot] = b;
      }
      if (scratch_) scratch_[k] = s;
    }
  }

  // Describes the tiles of mem of `rows` rows of each of `together` images.
  TileBlock<T> tiles(int64_t rows, int64_t together) const {
    return tile_block(l_, l_.winograd, rows, l_.Cp, together, tasks_.most_together);
  }
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
    for (int64_t b0 = begin; b0 < end; b0 += x_.block()) {
      const int64_t b1 = b0 + x_.block() < end ? b0 + x_.block() : end;
      for (int64_t k = 0; k < together; ++k) x_.read(t, s.blocks[k].r.n, b0, b1, s.blocks[k]);
      if (!a_.cell.tiled())
        direct(t, together, b0, b1, s);
      else if constexpr (kHasWinograd<T, VL>)
        tiled(t, together, b0, b1, s);
    }
    for (int64_t k = 0; k < together; ++k) neuron_.finish(t, s.blocks[k].r, begin, end, thread);
  }

  void direct(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      sweep(
          l_, l_.mem, mem_runs_, [&](const RowBlock& b) { return states_.mem_row(t, b.r, b0); }, b0,
          b1 - b0, weight(cb), bias_ + cb * kGates, s.blocks, together);
      x_.add(b0, 0, b1 - b0, weight(cb), s.blocks, together);
      for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
        for (int64_t h = b0; h < b1; ++h)
          neuron_.update(t, b->r, h, cb, b->gates + (h - b0) * l_.Wr * kGates);
    }
  }

  // Computes the recurrent half by Winograd, and the input half, too, if x_algorithm is Winograd.
  // The gates are assembled and used one strip of rows at a time.
  void tiled(int64_t t, int64_t together, int64_t b0, int64_t b1, const ForwardScratch& s) {
    const Cell& c = a_.cell;
    const TileBlock<T> mem_tiles = tiles(b1 - b0, together);
    const TileBlock<T> x_tiles = x_.tiles(b1 - b0, together, tasks_.most_together);
    const bool x_too = c.x_algorithm == CpuAlgorithm::winograd;
    bool any = !equal_.sought();  // says whether any pixel's sums are Winograd's
    for (const RowBlock* b = s.blocks; equal_.sought() && b < s.blocks + together; ++b)
      any |= equal_.find(states_.mem_row(t, b->r, b0), b1 - b0, s.equal, b->sums) > 0;
    for (int64_t k = 0; any && k < together; ++k) {
      const RowBlock& b = s.blocks[k];
      x_.inputs().run(mem_tiles, states_.mem_row(t, b.r, b0), l_.mem.row(), l_.Cp,
                      s.mem_values + k * mem_tiles.image_values());
      if (x_too) x_.transform(x_tiles, b, s.x_values + k * x_tiles.image_values());
    }
    for (int64_t cb = 0; cb < l_.Cb; ++cb) {
      const int64_t block = cb * l_.tile_weights() * kGates;
      if (any)
        multiply<S, 4>(mem_tiles, s.mem_values, static_cast<const T*>(a_.weight_mem) + block * c.C,
                       c.C, false, s.products);
      if (any && x_too)
        multiply<S, 4>(x_tiles, s.x_values, static_cast<const T*>(a_.weight_x) + block * c.Cin,
                       c.Cin, true, s.products);
      for (int64_t h0 = b0; h0 < b1; h0 += x_.strip()) {
        const int64_t h1 = h0 + x_.strip() < b1 ? h0 + x_.strip() : b1;
        for (int64_t k = 0; k < together; ++k) {
          if (any)
            x_.assemble(mem_tiles, k, b0, h0, h1, bias_ + cb * kGates, s.products,
                        s.blocks[k].gates);
          if (equal_.sought()) sum_equal(t, s.blocks[k], b0, h0, h1, cb);
        }
        if (!x_too) x_.add(b0, h0 - b0, h1 - h0, weight(cb), s.blocks, together);
        for (const RowBlock* b = s.blocks; b < s.blocks + together; ++b)
          for (int64_t h = h0; h < h1; ++h)
            neuron_.update(t, b->r, h, cb, b->gates + (h - h0) * l_.Wr * kGates);
      }
    }
  }

  // Computes direct sums of the pixels that may have an equal, for state rows [h0, h1) of one
  // block, with x's sums if Winograd computes x's half.
  void sum_equal(int64_t t, const RowBlock& b, int64_t b0, int64_t h0, int64_t h1, int64_t cb) {
    const Sums* sums = equal_.row(b.sums, h0 - b0);
    equal_.write_mem(sums, h1 - h0, mem_runs_, states_.mem_row(t, b.r, h0), weight(cb),
                     bias_ + cb * kGates, b.gates);
    if (a_.cell.x_algorithm == CpuAlgorithm::winograd)
      equal_.add_x(sums, h1 - h0, x_.runs(), x_.patch(b, h0 - b0), weight(cb), b.gates);
  }

  const ForwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StateRows<T, VL> states_;
  InputHalf<T, VL> x_;
  NeuronForward<T, VL> neuron_;
  EqualPixels<T, VL> equal_;
  RunList mem_runs_;
  Phases::Counter* counters_ = nullptr;
  T* bias_ = nullptr;
  ForwardScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
