// The gradient of the weight over many calls of one step each. It reads the d gates where the
// calls' backward passes left them. While one step is summed, mem and x of the next are read.
#pragma once

#include "weight_gradient.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class StepGradients {
  using S = Simd<T, VL>;

 public:
  explicit StepGradients(const WeightGradArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args.threads, false),
        images_(l_),
        weights_(l_, args.threads) {
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
    const int64_t weight_tasks = weights_.tasks();
    const Phases phases(counters_, most_phases());
    parallel(a_.threads, double(c.N) * l_.pixels * l_.K() * 4 * c.C, [&](int thread) {
      phases.run(0, tasks_.count + weights_.clear_tasks(), [&](int64_t task) {
        if (task >= tasks_.count) return weights_.clear(task - tasks_.count);
        if (tasks_.begin(task) == 0) images_.clear_borders(tasks_.image(task));
      });
      phases.run(1, tasks_.count, [&](int64_t task) { read(c.T - 1, task); });
      int64_t phase = 2;
      for (int64_t t = c.T - 1; t >= 0; --t) {
        phases.run(phase++, weight_tasks + (t > 0 ? tasks_.count : 0), [&](int64_t task) {
          if (task >= weight_tasks) return read(t - 1, task - weight_tasks);
          weights_.add(images(t), task, thread, tiles_[thread]);
        });
        if (weights_.due(t))
          phases.run(phase++, weights_.fold_tasks(), [&](int64_t task) { weights_.fold(task, t); });
      }
      phases.run(phase, weights_.write_tasks(),
                 [&](int64_t task) { weights_.write(task, a_.grad_weight); });
    });
  }

 private:
  int64_t most_phases() const { return 2 * l_.c.T + 3; }

  void carve(Arena& arena) {
    counters_ = arena.take<Phases::Counter>(most_phases());
    weights_.carve(arena);
    images_.carve(arena, l_.c.N, false, true);
    tiles_ = arena.take<TileBuffers<T>>(a_.threads);
    for (int k = 0; k < a_.threads; ++k) {
      const auto buffers = weights_.tile_sizes().template carve<T>(arena);
      if (tiles_) tiles_[k] = buffers;
    }
  }

  // Brings a task's rows of x and mem of step t into the images.
  void read(int64_t t, int64_t task) {
    const StepOfGradient& step = a_.steps[t];
    const int64_t n = tasks_.image(task), begin = tasks_.begin(task), end = tasks_.end(task);
    images_.read_x(step.x, t, n, begin, end);
    const Span span(Part::copies);
    images_.read_rows(step.mem, 0, n, begin, end, images_.mem_row(t, n, begin), l_.Wm * l_.Cp);
  }

  StepImages<T> images(int64_t t) const {
    StepImages<T> step = images_.images(t);
    step.d_gates = static_cast<const T*>(a_.steps[t].d_gates);
    step.d_row = l_.Wo * 4 * l_.Cp, step.d_image = l_.gates_image();
    return step;
  }

  const WeightGradArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  StepBuffers<T, VL> images_;
  WeightGradient<T, VL> weights_;
  Phases::Counter* counters_ = nullptr;
  TileBuffers<T>* tiles_ = nullptr;
};

SNNLSTM_END_ISA
