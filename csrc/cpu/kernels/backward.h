// The backward pass of a sequence, last step first. Each step is one phase, in which these tasks
// run side by side:
//   rows     the recurrent data gradient of step t and then, while the rows lie in cache, the
//            neurons of step t - 1 (neuron_backward.h)
//   inputs   the data gradient of x, if it is wanted (with Winograd the rows tasks compute it too)
//   weights  step t's part of the weight gradient (weight_gradient.h)
// The workspace holds two time steps of d gates, mem and x, for any T.
#pragma once

#include "data_grad.h"
#include "neuron_backward.h"
#include "weight_gradient.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class Backward {
  using S = Simd<T, VL>;

  struct BackwardScratch {
    T* x_rows;  // rows of the gradient of x
    TileBuffers<T> tiles;
  };

 public:
  explicit Backward(const BackwardArgs& args)
      : a_(args),
        l_(args.cell),
        tasks_(l_, args, args.threads, false),
        to_mem_(l_, l_.Cb, l_.Wo, 1, 1),
        to_x_(l_, l_.x.blocks, args.cell.W, args.cell.stride_h, args.cell.stride_w),
        neuron_(a_, l_, tasks_),
        weights_(l_, args.threads, args.threads) {
    const Cell& c = a_.cell;
    if constexpr (kHasWinograd<T, VL>) inputs_ = InputTransform<S>(l_.winograd);
    x_rows_ = l_.block_rows();
    x_blocks_ = (c.H + x_rows_ - 1) / x_rows_;
    Workspace workspace(args.workspace);
    allocate(workspace);
  }

  // `weight` says whether the call computes the weight's gradient.
  static int64_t workspace(const Cell& cell, int threads, bool weight) {
    BackwardArgs args;
    args.cell = cell;
    if (weight) args.grad_weight = &args;  // the constructor only asks whether the pointer is null
    args.threads = threads;
    Backward b(args);
    Workspace workspace(nullptr);
    b.allocate(workspace);
    return workspace.bytes();
  }

  void run() {
    const Phases phases(counters_, most_phases());
    neuron_.pack_vectors();
    const int convolutions = 1 + (a_.grad_weight != nullptr) + (a_.grad_x.data != nullptr);
    parallel(a_.threads, convolutions * l_.step_work(), [&](int thread) { steps(phases, thread); });
  }

 private:
  int64_t most_phases() const { return 2 * a_.cell.T + 3; }

  // Counts the tasks of x's data gradient: blocks of rows of one image or of a group of images.
  int64_t x_tasks(const RowTasks& tasks) const {
    if (!a_.grad_x.data || l_.tiled_x()) return 0;
    return (tasks_.most_together > 1 ? tasks.groups() : tasks.images()) * x_blocks_;
  }

  void steps(const Phases& phases, int thread) {
    const bool wants_weight = a_.grad_weight != nullptr;
    WeightSums<T, VL>& sums = weights_.sums();
    const int64_t T_ = a_.cell.T;
    const int64_t weight_tasks = wants_weight ? weights_.tasks() : 0;
    phases.run(0, tasks_.count + (wants_weight ? sums.chunks() : 0), [&](int64_t task) {
      if (task < tasks_.count)
        neuron_.clear(task);
      else
        sums.clear(task - tasks_.count);
    });
    const auto start = [&](int64_t t, int64_t task) {  // t is the last step of the task's sample
      neuron_.start(task, thread);
      neuron_.rows(t, task, thread, 0);
    };
    RowTasks tasks = tasks_.at(T_ - 1);
    phases.run(1, tasks.count, [&](int64_t task) { start(T_ - 1, task); });
    int64_t phase = 2;
    for (int64_t t = T_ - 1; t >= 0; --t) {
      const RowTasks next = t > 0 ? tasks_.at(t - 1) : tasks;
      const int64_t groups = tasks.groups(), x_count = x_tasks(tasks);
      const int64_t groups_first = tasks.most_together > 1 && l_.exceeds_any_l2() ? groups : 0;
      const int64_t all = groups + weight_tasks + x_count;
      const int64_t with_next = all + next.count - tasks.count;
      // The largest tasks come first, so that no thread begins a large task when the others are
      // done.
      phases.run(phase++, with_next + padded(tasks), [&](int64_t task) {
        if (task >= with_next)
          return clear_image<T>(a_.grad_x, t, tasks_.sample(tasks.images() + task - with_next),
                                a_.cell.Cin * a_.cell.H * a_.cell.W);
        if (task >= all) return start(t - 1, tasks.count + task - all);
        if (task < groups_first) return rows(t, tasks, task, thread);
        task -= groups_first;
        if (task < weight_tasks)
          return weights_.add(neuron_.images(t), tasks.images(), task, thread,
                              scratch_[thread].tiles);
        task -= weight_tasks;
        if (task < x_count) return inputs(t, tasks, task, thread);
        rows(t, tasks, task - x_count, thread);
      });
      tasks = next;
      if (wants_weight && sums.due(t))
        phases.run(phase++, sums.chunks(), [&](int64_t task) { sums.fold(task, t); });
    }
    // The last phase writes the gradients that are sums over all samples.
    phases.run(phase, l_.Cb + (wants_weight ? sums.write_tasks() : 0), [&](int64_t task) {
      if (task < l_.Cb) return neuron_.reduce(task);
      sums.write(task - l_.Cb, thread, static_cast<T*>(a_.grad_weight));
    });
  }

  void allocate(Workspace& workspace) {
    counters_ = workspace.take<Phases::Counter>(most_phases());
    if (a_.grad_weight) weights_.allocate(workspace);
    neuron_.allocate(workspace);
    scratch_ = workspace.take<BackwardScratch>(a_.threads);
    const int64_t rows = tasks_.most_together * (l_.tiled_x() ? l_.block_rows() : x_rows_);
    TileSizes sizes(l_, l_.winograd, 4 * l_.Cp, tasks_.most_together);
    if (a_.grad_weight) sizes.cover(weights_.tile_sizes());
    for (int k = 0; k < a_.threads; ++k) {
      BackwardScratch s;
      s.x_rows = workspace.take<T>(rows * to_x_.row_size());
      s.tiles = sizes.template allocate<T>(workspace);
      if (scratch_) scratch_[k] = s;
    }
  }

  // Does the tasks of a group, which are the same rows of each of its images.
  void rows(int64_t t, const RowTasks& tasks, int64_t group, int thread) {
    const bool mem_wanted = t > 0 || a_.grad_mem0.data;
    const bool x_wanted = a_.grad_x.data && l_.tiled_x();
    if (!mem_wanted && !x_wanted) return;
    const int64_t first = tasks.first(group), together = tasks.together(group);
    const int64_t begin = tasks_.begin(first);
    const int64_t end = tasks_.end(first);
    const int64_t block = l_.block_rows();
    for (int64_t h = begin; h < end; h += block) {
      const int64_t stop = h + block < end ? h + block : end;
      const int64_t n = tasks_.image(first);
      T* out = mem_wanted ? neuron_.mem_grad(thread, 0) + (h - begin) * l_.Wo * l_.Cp : nullptr;
      if (!a_.cell.tiled())
        to_mem_.rows(
            together, [&](int64_t k) { return neuron_.d_gates(t, n + k); },
            static_cast<const T*>(a_.weight) + l_.x.blocks * l_.Kg * VL, h, stop, out);
      else if constexpr (kHasWinograd<T, VL>)
        tiled(t, n, together, h, stop, x_wanted, out, thread);
    }
    for (int64_t k = 0; k < together; ++k) {
      if (t > 0)
        neuron_.rows(t - 1, first + k, thread, k);
      else if (mem_wanted)
        neuron_.write_rows(a_.grad_mem0, first + k, neuron_.mem_grad(thread, k));
    }
  }

  // Computes data gradients by Winograd, for state rows [begin, end) of `together` images from n
  // on: mem's in mem_grad, unless that is null, and x's if it is wanted.
  void tiled(int64_t t, int64_t n, int64_t together, int64_t begin, int64_t end, bool x_wanted,
             T* mem_grad, int thread) {
    const BackwardScratch& s = scratch_[thread];
    const TileBlock<T> b =
        tile_block(l_, l_.winograd, end - begin, 4 * l_.Cp, together, tasks_.most_together);
    const int64_t pixel = 4 * l_.Cp;
    const int64_t row = l_.gate_row();
    for (int64_t k = 0; k < together; ++k)
      inputs_.run(b, neuron_.d_gates(t, n + k) + begin * row, row, pixel,
                  s.tiles.values + k * b.image_values());
    if (mem_grad)
      to_mem_.tiles(b, s.tiles.values, static_cast<const T*>(a_.weight_mem), s.tiles.products,
                    begin, end, mem_grad);
    if (!x_wanted) return;
    to_x_.tiles(b, s.tiles.values, static_cast<const T*>(a_.weight_x), s.tiles.products, begin, end,
                s.x_rows);
    write_x(t, n, together, begin, end, s.x_rows);
  }

  // Counts the samples that are padded at a step, whose gradient of x is zero.
  int64_t padded(const RowTasks& tasks) const {
    return a_.grad_x.data ? a_.cell.N - tasks.images() : 0;
  }

  void inputs(int64_t t, const RowTasks& tasks, int64_t task, int thread) {
    const int64_t index = task / x_blocks_, begin = task % x_blocks_ * x_rows_;
    const int64_t end = begin + x_rows_ < a_.cell.H ? begin + x_rows_ : a_.cell.H;
    const bool several = tasks_.most_together > 1;  // a group of tasks is then a group of images
    const int64_t n = several ? tasks.first(index) : index;
    const int64_t together = several ? tasks.together(index) : 1;
    T* rows = scratch_[thread].x_rows;
    to_x_.rows(
        together, [&](int64_t k) { return neuron_.d_gates(t, n + k); },
        static_cast<const T*>(a_.weight), begin, end, rows);
    write_x(t, n, together, begin, end, rows);
  }

  void write_x(int64_t t, int64_t n, int64_t together, int64_t begin, int64_t end, const T* rows) {
    const Pixels from{a_.cell.W, to_x_.row_size(), l_.x.blocks * VL};
    for (int64_t k = 0; k < together; ++k, rows += (end - begin) * from.row)
      store_rows<S>(rows, from, end - begin, a_.cell.Cin, a_.grad_x, t, tasks_.sample(n + k), begin,
                    [](typename S::R g, int64_t) { return g; });
  }

  const BackwardArgs& a_;
  Layout<T, VL> l_;
  RowTasks tasks_;
  DataGrad<T, VL> to_mem_, to_x_;
  NeuronBackward<T, VL> neuron_;
  WeightGradient<T, VL> weights_;
  InputTransform<S> inputs_;
  int64_t x_rows_, x_blocks_;
  Phases::Counter* counters_ = nullptr;
  BackwardScratch* scratch_ = nullptr;
};

SNNLSTM_END_ISA
