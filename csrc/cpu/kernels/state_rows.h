// The states in the forward pass, channels-last: syn, and two images of mem with borders, which
// alternately hold mem before and after a step. A sequence has memory for the states of all
// samples. In a call of one step each task copies its rows, and the rows around them that the
// kernel reads, into memory of its thread, and writes its results from there. `slot` counts the
// tasks that a thread works on together.
#pragma once

#include "row_tasks.h"
#include "transpose.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class StateRows {
  using S = Simd<T, VL>;

 public:
  // The states of sample n, which has `steps` steps, from the state row `first` on. syn is the one
  // before the first step, if training saves the others.
  struct Rows {
    int64_t n, steps, first;
    T *mem[2], *syn;
  };

  StateRows(const ForwardArgs& a, const Layout<T, VL>& l, const RowTasks& tasks)
      : a_(a), l_(l), tasks_(tasks) {}

  void allocate(Workspace& workspace) {
    const int64_t count = one_step() ? a_.threads * tasks_.most_together : a_.cell.N;
    for (T*& mem : mem_) mem = workspace.take<T>(count * mem_size());
    syn_ = workspace.take<T>(count * syn_size());
  }

  // Reads a task's rows of the states before the first step.
  void read(int64_t task, int thread, int64_t slot) {
    const Rows r = of(task, thread, slot);
    const int64_t begin = tasks_.begin(task), end = tasks_.end(task);
    if (one_step()) {
      import_mem(r, begin, begin + seen_rows(end - begin));
    } else {
      const int64_t first = begin == 0 ? 0 : begin + l_.ph;
      const int64_t last = end == l_.Ho ? l_.mem.rows : end + l_.ph;
      import_mem(r, first, last);
      for (int64_t h = first; h < last; ++h) clear_border(mem_row(1, r, h), inside(h));
    }
    import_rows(a_.syn0, r.n, begin, end, first_syn(r, begin), l_.Wo * l_.Cp);
  }

  // Returns the places of a task's rows.
  Rows of(int64_t task, int thread, int64_t slot) const {
    const int64_t image = tasks_.image(task);
    const int64_t place = one_step() ? thread * tasks_.most_together + slot : image;
    const int64_t mem = place * mem_size(), syn = place * syn_size();
    return {tasks_.sample(image),
            tasks_.steps(task),
            one_step() ? tasks_.begin(task) : 0,
            {mem_[0] + mem, mem_[1] + mem},
            syn_ + syn};
  }
  // Returns row h, counted with the border, of mem after step t - 1.
  T* mem_row(int64_t t, const Rows& r, int64_t h) const {
    return r.mem[t & 1] + (h - r.first) * l_.mem.row();
  }
  T* mem_inner(int64_t t, const Rows& r, int64_t h) const {
    return mem_row(t, r, h + l_.ph) + l_.pw * l_.Cp;
  }
  const T* syn_before(int64_t t, const Rows& r, int64_t h) const {
    return a_.saved_syn && t > 0 ? saved_syn(t - 1, r.n, h) : first_syn(r, h);
  }
  T* syn_after(int64_t t, const Rows& r, int64_t h) const {
    return a_.saved_syn ? saved_syn(t, r.n, h) : first_syn(r, h);
  }

 private:
  bool one_step() const { return a_.cell.T == 1; }

  // These count the values of a sample, or of a task's rows, in whole cache lines, so that no two
  // threads write to one line.
  int64_t mem_size() const {
    return one_step() ? lines(seen_rows(tasks_.most_rows()) * l_.mem.row()) : l_.mem.image();
  }
  int64_t syn_size() const {
    return one_step() ? lines(tasks_.most_rows() * l_.Wo * l_.Cp) : l_.state_image();
  }
  static int64_t lines(int64_t count) {
    return Layout<T, VL>::round_up(count, 64 / int64_t(sizeof(T)));
  }

  // Returns how many rows of mem, border included, the kernel reads for `rows` state rows.
  int64_t seen_rows(int64_t rows) const {
    const Cell& c = a_.cell;
    return l_.whole(l_.winograd.h, c.dilation_h, rows) +
           ((c.tiled() ? l_.winograd.h.taps() : c.kernel_h) - 1) * c.dilation_h;
  }

  T* first_syn(const Rows& r, int64_t h) const { return r.syn + (h - r.first) * l_.Wo * l_.Cp; }
  T* saved_syn(int64_t t, int64_t n, int64_t h) const {
    return static_cast<T*>(a_.saved_syn) + l_.state_row(t * a_.cell.N + n, h);
  }

  // Says whether row h of mem, counted with the border, belongs to the image.
  bool inside(int64_t h) const { return h >= l_.ph && h < l_.ph + l_.Ho; }

  // Reads rows [first, last) of the first mem, counted with the border.
  void import_mem(const Rows& r, int64_t first, int64_t last) {
    for (int64_t h = first; h < last; ++h) clear_border(mem_row(0, r, h), inside(h));
    const int64_t begin = first < l_.ph ? 0 : first - l_.ph;
    const int64_t end = last < l_.ph + l_.Ho ? last - l_.ph : l_.Ho;
    if (begin < end) import_rows(a_.mem0, r.n, begin, end, mem_inner(0, r, begin), l_.mem.row());
  }

  // Writes zeros on both sides of a row of mem, or, outside the image, into the whole row.
  void clear_border(T* row, bool image) const {
    const int64_t all = l_.mem.row();
    const int64_t left = image ? l_.pw * l_.Cp : all;
    std::memset(row, 0, left * sizeof(T));
    if (!image) return;
    const int64_t right = left + l_.Wo * l_.Cp;
    std::memset(row + right, 0, (all - right) * sizeof(T));
  }

  // Reads rows [begin, end) of a state into rows that lie `row` apart.
  void import_rows(const View& v, int64_t n, int64_t begin, int64_t end, T* dst, int64_t row) {
    load_rows<S>(v, 0, n, begin, end - begin, a_.cell.C, dst, Pixels{l_.Wo, row, l_.Cp}, l_.Cp);
  }

  const ForwardArgs& a_;
  const Layout<T, VL>& l_;
  const RowTasks& tasks_;
  T* mem_[2] = {nullptr, nullptr};
  T* syn_ = nullptr;
};

SNNLSTM_END_ISA
