// The gradients of weight and bias over many calls of one step each, from the d gates that the
// backward pass of each call left. While one step is summed, the images of the next are read.
#pragma once

#include "weight_gradient.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class StepGradients {
  using S = Simd<T, VL>;

 public:
  explicit StepGradients(const WeightGradArgs& args)
      : a_(args), l_(args.cell), tasks_(l_, args.threads), images_(l_), weights_(l_, args.threads) {
    Arena arena(args.workspace);
    carve(arena);
  }

  static int64_t workspace(const Cell& cell, int threads) {
    WeightGradArgs args;
    args.cell = cell;
    args.threads = threads;
    StepGradients g(args);
    Arena arena(nullptr);
    g.carve(arena);
    return arena.bytes();
  }

  void run() {
    const Cell& c = l_.c;
    const int64_t weight_tasks = a_.grad_weight ? weights_.tasks() : 0;
    const Phases phases(counters_, most_phases());
    parallel(a_.threads, double(c.N) * l_.pixels * l_.K() * 4 * c.C, [&](int thread) {
      phases.run(0, tasks_.count + weights_.clear_tasks(), [&](int64_t task) {
        if (task >= tasks_.count) return weights_.clear(task - tasks_.count);
        std::memset(bias_sums_ + task * 4 * l_.Cp, 0, 4 * l_.Cp * sizeof(T));
        if (tasks_.begin(task) == 0) images_.clear_borders(tasks_.image(task));
      });
      phases.run(1, tasks_.count, [&](int64_t task) { read(c.T - 1, task); });
      int64_t phase = 2;
      for (int64_t t = c.T - 1; t >= 0; --t) {
        phases.run(phase++, weight_tasks + (t > 0 ? tasks_.count : 0), [&](int64_t task) {
          if (task >= weight_tasks) return read(t - 1, task - weight_tasks);
          weights_.add(images_.images(t), task, thread, tiles_[thread]);
        });
        if (weight_tasks > 0 && weights_.due(t))
          phases.run(phase++, weights_.fold_tasks(), [&](int64_t task) { weights_.fold(task, t); });
      }
      phases.run(phase, 1 + (weight_tasks > 0 ? weights_.write_tasks() : 0), [&](int64_t task) {
        if (task > 0) return weights_.write(task - 1, a_.grad_weight);
        if (a_.grad_bias) write_bias_gradient(l_, bias_sums_, tasks_.count, a_.grad_bias);
      });
    });
  }

 private:
  int64_t most_phases() const { return 2 * l_.c.T + 3; }

  void carve(Arena& arena) {
    counters_ = arena.take<Phases::Counter>(most_phases());
    weights_.carve(arena);
    images_.carve(arena, true);
    bias_sums_ = arena.take<T>(tasks_.count * 4 * l_.Cp);
    tiles_ = arena.take<TileBuffers<T>>(a_.threads);
    for (int k = 0; k < a_.threads; ++k) {
      const auto buffers = weights_.tile_sizes().template carve<T>(arena);
      if (tiles_) tiles_[k] = buffers;
    }
  }

  // Brings a task's rows of step t into the images.
  void read(int64_t t, int64_t task) {
    const StepOfGradient& step = a_.steps[t];
    const int64_t n = tasks_.image(task), begin = tasks_.begin(task), end = tasks_.end(task);
    const int64_t row = l_.Wo * 4 * l_.Cp;
    images_.read_x(step.x, t, n, begin, end);
    for (int64_t h = begin; h < end; ++h) {
      images_.read_row(step.mem, n, h, images_.mem_row(t, n, h));
      const T* from = static_cast<const T*>(step.d_gates) + (n * l_.Ho + h) * row;
      copy_and_sum(from, images_.d_gates_row(t, n, h), bias_sums_ + task * 4 * l_.Cp);
    }
  }

  // A row of d gates, and its sum over the pixels.
  void copy_and_sum(const T* from, T* to, T* sums) const {
    constexpr int kGates = 4 * VL;
    for (int64_t first = 0; first < 4 * l_.Cp; first += kGates) {
      typename S::R sum[4] = {};
      for (int64_t w = 0; w < l_.Wo; ++w)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const int64_t place = w * 4 * l_.Cp + first + v * VL;
          const auto d = S::load(from + place);
          S::store(to + place, d);
          sum[v] += d;
        }
      for (int v = 0; v < 4; ++v) {
        T* out = sums + first + v * VL;
        S::store(out, S::load(out) + sum[v]);
      }
    }
  }

  const WeightGradArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StepBuffers<T, VL> images_;
  WeightGradient<T, VL> weights_;
  Phases::Counter* counters_ = nullptr;
  T* bias_sums_ = nullptr;
  TileBuffers<T>* tiles_ = nullptr;
};

SNNLSTM_END_ISA
