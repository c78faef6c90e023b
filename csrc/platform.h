// What differs between operating systems: threads, the OpenMP runtime, and clocks.
#pragma once

#include <cstdint>
#include <vector>

namespace snnlstm {

// Calls body(data, thread) on `threads` threads of torch's pool, each with its number in the team;
// returns when all calls have returned. The pool may give fewer threads, and there is always one.
void run_team(int threads, void (*body)(void* data, int thread), void* data);

// Does the same for a body(thread) of any type. The functions are static, so that the linker does
// not merge the copies of two instruction sets.
template <class F>
static void call_body(void* data, int thread) {
  (*static_cast<const F*>(data))(thread);
}
template <class F>
static void run_team(int threads, const F& body) {
  run_team(threads, &call_body<F>, const_cast<F*>(&body));
}

// The number of threads that torch.set_num_threads has set for the calling thread.
int most_threads();

// Returns the path of the OpenMP runtime in use, such as ".../torch/lib/libgomp.so.1", or "" if
// there is none and every team has one thread. The first call looks it up for good: import torch
// before.
const char* openmp_library();

// Gives this core to another thread, if one waits for it.
void yield_core();

#if SNNLSTM_TESTING
// The times of the tasks of calls, for benchmarks/scaling.py. While `task_log` is set each team has
// one thread, and each task adds an entry.
struct TaskLog {
  struct Entry {
    int64_t phase;        // tasks of one phase may run at the same time
    int64_t threads;      // of the team that the call would have
    int64_t nanoseconds;  // of the thread's processor time
  };
  std::vector<Entry> entries;
  int64_t phase = 0, threads = 1;

  void add(int64_t nanoseconds);
  static int64_t now();
};
extern TaskLog* task_log;
#endif

// Begins a phase in the log, if there is one, whose team would have so many threads, or as many as
// before. Returns how many threads the team gets.
static inline int begin_phase(int threads = 0) {
#if SNNLSTM_TESTING
  if (task_log) {
    ++task_log->phase;
    if (threads > 0) task_log->threads = threads;
    return 1;
  }
#endif
  return threads;
}

// Calls f(task), and adds its time to the log, if there is one.
template <class F>
__attribute__((always_inline)) static inline void run_task(const F& f, int64_t task) {
#if SNNLSTM_TESTING
  if (task_log) {
    const int64_t begin = TaskLog::now();
    f(task);
    return task_log->add(TaskLog::now() - begin);
  }
#endif
  f(task);
}

}  // namespace snnlstm
