// What differs between operating systems: threads, and how to give a core away.
#pragma once

#include <cstdint>

namespace snnlstm {

// Calls body(data, thread) on `threads` threads of torch's pool, each with its number in the team;
// returns when all calls have returned. The pool may give fewer threads, and there is always one.
void run_team(int threads, void (*body)(void* data, int thread), void* data);

// The same for a body(thread) of any type. Static, so that the linker merges no two instruction
// sets' copies.
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

// Path of the OpenMP runtime in use, such as ".../torch/lib/libgomp.so.1"; "" where there is none
// and every team has one thread. Looked up at the first call, after which it stays: import torch
// before.
const char* openmp_library();

// Lets another thread have this core, where one waits for it.
void yield_core();

#if SNNLSTM_TESTING
// The times of the tasks of calls, for benchmarks/scaling.py. While `task_log` is set each team has
// one thread, and each task adds an entry.
struct TaskLog {
  struct Entry {
    int64_t phase;        // the tasks of one phase may run at the same time
    int64_t threads;      // of the team that the call would have
    int64_t nanoseconds;  // of the thread's processor time
  };
  Entry* entries;
  int64_t capacity, count, phase, threads;

  // Calls f(task), and adds its time.
  template <class F>
  void time(F&& f, int64_t task) {
    const int64_t begin = now();
    f(task);
    if (count < capacity) entries[count] = {phase, threads, now() - begin};
    ++count;
  }
  static int64_t now();
};
extern TaskLog* task_log;
#endif

}  // namespace snnlstm
