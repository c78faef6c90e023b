// How the threads of a call share its work. No thread of a team allocates memory, because an
// exception there would end the process. A call has one team of threads, and a step is a phase of
// that team. A phase hands out its tasks one by one, so that a thread whose core is busy elsewhere
// takes fewer. The next phase starts when the tasks are done, and does not wait for every thread.
#pragma once

#include "../../platform.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

class Phases {
 public:
  struct alignas(64) Counter {
    int64_t next, done;
  };

  Phases(Counter* counters, int64_t phases) : counters_(counters) {
    std::memset(static_cast<void*>(counters), 0, sizeof(Counter) * phases);
  }

  // Calls f(task) for every task of the phase, and returns when all threads' tasks are done.
  template <class F>
  void run(int64_t phase, int64_t tasks, F&& f) const {
    Counter& c = counters_[phase];
    for (;;) {
      const int64_t task = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) break;
      f(task);
      __atomic_fetch_add(&c.done, 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&c.done, __ATOMIC_ACQUIRE) < tasks; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 4096) yield_core();
    }
  }

 private:
  Counter* counters_;
};

// Calls body(thread number) on as many threads as have some 10 us of work in each step.
template <class F>
void parallel(int threads, double multiply_adds_per_step, F&& body) {
  const double worth = multiply_adds_per_step / 2e5;
  if (worth < threads) threads = worth < 1 ? 1 : int(worth);
  if (threads <= 1) return body(0);
  run_team(threads, body);
}

// Calls f(k, thread number) for every k below count. Each call has about `operations` operations.
template <class F>
void parallel_for(int threads, int64_t count, int64_t operations, F&& f) {
  int64_t next = 0;
  parallel(threads, double(count) * double(operations), [&](int thread) {
    for (int64_t k; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(k, thread);
  });
}

SNNLSTM_END_ISA
