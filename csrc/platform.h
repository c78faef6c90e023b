// Hides how operating systems differ in threads and in the OpenMP runtime.
#pragma once

namespace snnlstm {

// Calls body(data, thread) on `threads` of torch's threads, each with its number in the team.
// Returns when all calls have returned. OpenMP may provide fewer threads, but at least one.
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
// there is none and every team has one thread. The first call decides for good, so import torch
// before it.
const char* openmp_library();

// Gives this core to another thread, if one waits for it.
void yield_core();

}  // namespace snnlstm
