// The backward pass of a sequence, last step first. One phase a step, in which these run side by side:
//   rows     the recurrent data gradient of step t, and behind it, while the rows lie in cache, the
//            pointwise backward of step t - 1 (neuron_backward.h)
//   inputs   the data gradient of x, where it is wanted
//   weights  step t's part of the weight gradient; each task owns its part of the result, so the sum
//            does not depend on who computes what when
// Memory beside the results: two time steps of d gates, mem and x, whatever T is.
#pragma once

#include "data_grad.h"
#include "neuron_backward.h"
#include "pack.h"
#include "schedule.h"
#include "weight_grad.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Backward {
  using S = Simd<T, VL>;
  static constexpr int kGates = 4 * VL;
  static constexpr int64_t kPiece = 48;  // rows of K in a weight gradient task

 public:
  explicit Backward(const BackwardArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args.threads),
        to_mem_(l_, l_.Cb, l_.Wo, 1, 1),
        to_x_(l_, l_.x_blocks, args.cell.W, args.cell.stride_h, args.cell.stride_w),
        neuron_(a_, l_, tasks_) {
    const Cell& c = a_.cell;
    x_runs_.window(c, c.Cin, l_.Wx * c.Cin, c.Cin, 0, kPiece);
    mem_runs_.window(c, c.C, l_.Wm * l_.Cp, l_.Cp, l_.Kx, kPiece);
    x_rows_ = l_.block_rows();
    x_blocks_ = (c.H + x_rows_ - 1) / x_rows_;
    const int64_t slices = l_.Cb * (x_runs_.count() + mem_runs_.count());
    splits_ = 16 / slices < 1 ? 1 : 16 / slices;
    if (splits_ > c.N) splits_ = c.N < 1 ? 1 : c.N;
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
    const int64_t T_ = c.T, slices = l_.Cb * (x_runs_.count() + mem_runs_.count());
    const int64_t weight_tasks = a_.grad_weight ? splits_ * slices : 0;
    const int64_t x_tasks = a_.grad_x.data ? c.N * x_blocks_ : 0;
    const Phases phases(counters_, T_ + 3);
    neuron_.pack_vectors();
    parallel(a_.threads, 3 * double(c.N) * l_.pixels * l_.K() * 4 * c.C, [&](int thread) {
      phases.run(0, tasks_.count + splits_, [&](int64_t task) {
        if (task < tasks_.count)
          neuron_.clear(task);
        else
          std::memset(partial_ + (task - tasks_.count) * l_.packed_forward(), 0,
                      l_.packed_forward() * sizeof(T));
      });
      phases.run(1, tasks_.count, [&](int64_t task) {
        neuron_.start(task, thread);
        neuron_.rows(T_ - 1, task, thread);
      });
      for (int64_t t = T_ - 1; t >= 0; --t)
        phases.run(T_ + 1 - t, tasks_.count + x_tasks + weight_tasks, [&](int64_t task) {
          if (task < tasks_.count) return rows(t, task, thread);
          task -= tasks_.count;
          if (task < x_tasks) return inputs(t, task, thread);
          task -= x_tasks;
          weights(t, task / slices, task % slices);
        });
      phases.run(T_ + 2, l_.Cb, [&](int64_t cb) {
        if (a_.grad_weight)
          Packing<T, VL>::weight_gradient(l_, partial_, splits_, cb, static_cast<T*>(a_.grad_weight));
        neuron_.reduce(cb);
      });
    });
  }

 private:
  void carve(Arena& arena) {
    counters_ = arena.take<Phases::Counter>(a_.cell.T + 3);
    partial_ = arena.take<T>(splits_ * l_.packed_forward());
    neuron_.carve(arena);
    x_scratch_ = arena.take<T>(a_.threads * x_rows_ * to_x_.row_size());
  }

  void rows(int64_t t, int64_t task, int thread) {
    if (t == 0 && !a_.grad_mem0.data) return;
    const int64_t n = tasks_.image(task), begin = tasks_.begin(task), end = tasks_.end(task);
    T* mem_grad = neuron_.mem_grad(thread);
    const T* weight = static_cast<const T*>(a_.weight) + l_.x_blocks * l_.Kg * VL;
    const int64_t block = l_.block_rows();
    for (int64_t h = begin; h < end; h += block)
      to_mem_.rows(neuron_.d_gates(t, n), weight, h, h + block < end ? h + block : end,
                   mem_grad + (h - begin) * l_.Wo * l_.Cp);
    if (t > 0) return neuron_.rows(t - 1, task, thread);
    for (int64_t h = begin; h < end; ++h)
      neuron_.write_row(a_.grad_mem0, n, h, mem_grad + (h - begin) * l_.Wo * l_.Cp);
  }

  void inputs(int64_t t, int64_t task, int thread) {
    const Cell& c = a_.cell;
    const View& v = a_.grad_x;
    const int64_t n = task / x_blocks_, begin = task % x_blocks_ * x_rows_;
    const int64_t end = begin + x_rows_ < c.H ? begin + x_rows_ : c.H;
    T* rows = x_scratch_ + thread * x_rows_ * to_x_.row_size();
    to_x_.rows(neuron_.d_gates(t, n), static_cast<const T*>(a_.weight), begin, end, rows);
    for (int64_t h = begin; h < end; ++h)
      store_row<S>(rows + (h - begin) * to_x_.row_size(), l_.x_blocks * VL, c.W, c.Cin,
                   static_cast<T*>(v.data) + t * v.stride[0] + n * v.stride[1] + h * v.stride[3],
                   v.stride[2], v.stride[4], [](typename S::R g, int64_t) { return g; });
  }

  // Samples of one split, channel block and run of K.
  void weights(int64_t t, int64_t split, int64_t slice) {
    const Cell& c = a_.cell;
    const int64_t cb = slice % l_.Cb, index = slice / l_.Cb;
    const bool of_x = index < x_runs_.count();
    const Run run = of_x ? x_runs_.data()[index] : mem_runs_.data()[index - x_runs_.count()];
    T* out = partial_ + split * l_.packed_forward() + (cb * l_.K() + run.w) * kGates;
    const int64_t d_pixel = 4 * l_.Cp, d_row = l_.Wm * d_pixel;
    int64_t chunk = 128 / l_.Wo;
    if (chunk < 1) chunk = 1;
    for (int64_t n = c.N * split / splits_; n < c.N * (split + 1) / splits_; ++n)
      for (int64_t h = 0; h < l_.Ho; h += chunk) {
        PixelRows<T> p;
        p.d_gates = neuron_.d_gates(t, n) + (h + l_.ph) * d_row + l_.pw * d_pixel + cb * kGates;
        p.d_row = d_row;
        p.d_pixel = d_pixel;
        p.rows = h + chunk < l_.Ho ? chunk : l_.Ho - h;
        p.pixels = l_.Wo;
        if (of_x) {
          p.in = neuron_.x(t, n) + h * c.stride_h * l_.Wx * c.Cin;
          p.in_row = c.stride_h * l_.Wx * c.Cin;
          p.in_pixel = c.stride_w * c.Cin;
        } else {
          p.in = neuron_.mem_before(t, n) + h * l_.Wm * l_.Cp;
          p.in_row = l_.Wm * l_.Cp;
          p.in_pixel = l_.Cp;
        }
        weight_grad_run<S>(p, run.in, run.len, out);
      }
  }

  const BackwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  DataGrad<T, VL> to_mem_, to_x_;
  NeuronBackward<T, VL> neuron_;
  RunList x_runs_, mem_runs_;
  int64_t x_rows_, x_blocks_, splits_;
  Phases::Counter* counters_ = nullptr;
  T *partial_ = nullptr, *x_scratch_ = nullptr;
};

SNNLSTM_END_ISA
