// One OpenMP runtime in the process: torch's.
//
// torch brings its own libgomp. Its name depends on the wheel (libgomp.so.1, libgomp-a34b3233.so.1,
// with the SONAME changed alike; conda builds have libiomp5 or libomp in its place), so linking to
// libgomp.so.1 may bring a second copy with a second pool of threads, which fight over the cores.
// So nothing is linked: GCC turns `#pragma omp` into calls of the functions below, which pass them
// on to the very library that gives libtorch_cpu.so its GOMP_parallel. libiomp5 and libomp export
// the same functions. They are hidden: no other library sees them.
//
// A kernel that needs a function which is missing here fails to load with "undefined symbol:
// GOMP_..."; tests/test_packaging.py looks for these. Add it below.
#include "openmp.h"

#include <dlfcn.h>

namespace {

struct Runtime {
  void* handle = nullptr;  // null: none, everything runs on the calling thread
  const char* path = "";

  Runtime() {
    // By SONAME, already loaded or not at all. _GNU_SOURCE's RTLD_NOLOAD never loads.
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* parallel = torch ? dlsym(torch, "GOMP_parallel") : nullptr;
    Dl_info info;
    if (parallel && dladdr(parallel, &info) && info.dli_fname) {
      handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
      path = info.dli_fname;
    }
    // No torch, or one without OpenMP: whatever the system has.
    if (!handle) {
      handle = dlopen("libgomp.so.1", RTLD_LAZY);
      parallel = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
      path = parallel && dladdr(parallel, &info) && info.dli_fname ? info.dli_fname : "";
    }
  }
};

const Runtime& runtime() {
  static const Runtime instance;  // never closed: its threads may outlive every caller
  return instance;
}

// The runtime's function of that name; null where there is none. F is taken from the declaration.
template <class F>
F* find(F*, const char* name) {
  void* handle = runtime().handle;
  return handle ? reinterpret_cast<F*>(dlsym(handle, name)) : nullptr;
}

// What is left of a work-shared loop when one thread runs it all.
struct SerialLoop {
  long start = 0, end = 0, step = 1;
};
thread_local SerialLoop serial_loop;

bool take_all(long* first, long* last) {
  SerialLoop& loop = serial_loop;
  const bool some = loop.step > 0 ? loop.start < loop.end : loop.start > loop.end;
  *first = loop.start;
  *last = loop.end;
  loop.start = loop.end;
  return some;
}

}  // namespace

namespace snnlstm {
const char* openmp_library() { return runtime().path; }
}  // namespace snnlstm

// Each looks its target up once. `real` has the type of the function that it stands in.
#define SNNLSTM_PASS_ON(name, ...)              \
  static auto* const real = find(&name, #name); \
  if (real) return real(__VA_ARGS__)

extern "C" {

int omp_get_thread_num() {
  SNNLSTM_PASS_ON(omp_get_thread_num);
  return 0;
}

int omp_get_num_threads() {
  SNNLSTM_PASS_ON(omp_get_num_threads);
  return 1;
}

int omp_get_max_threads() {
  SNNLSTM_PASS_ON(omp_get_max_threads);
  return 1;
}

int omp_in_parallel() {
  SNNLSTM_PASS_ON(omp_in_parallel);
  return 0;
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  SNNLSTM_PASS_ON(GOMP_parallel, body, data, threads, flags);
  body(data);
}

void GOMP_barrier() { SNNLSTM_PASS_ON(GOMP_barrier); }
void GOMP_critical_start() { SNNLSTM_PASS_ON(GOMP_critical_start); }
void GOMP_critical_end() { SNNLSTM_PASS_ON(GOMP_critical_end); }
void GOMP_atomic_start() { SNNLSTM_PASS_ON(GOMP_atomic_start); }
void GOMP_atomic_end() { SNNLSTM_PASS_ON(GOMP_atomic_end); }

bool GOMP_single_start() {
  SNNLSTM_PASS_ON(GOMP_single_start);
  return true;
}

// schedule(dynamic) and schedule(guided): GCC calls the "nonmonotonic" ones unless told otherwise.
#define SNNLSTM_LOOP(kind)                                                                      \
  bool GOMP_loop_##kind##_start(long start, long end, long step, long chunk, long* first,       \
                                long* last) {                                                   \
    SNNLSTM_PASS_ON(GOMP_loop_##kind##_start, start, end, step, chunk, first, last);            \
    serial_loop = {start, end, step};                                                           \
    return take_all(first, last);                                                               \
  }                                                                                             \
  bool GOMP_loop_##kind##_next(long* first, long* last) {                                       \
    SNNLSTM_PASS_ON(GOMP_loop_##kind##_next, first, last);                                      \
    return take_all(first, last);                                                               \
  }                                                                                             \
  void GOMP_parallel_loop_##kind(void (*body)(void*), void* data, unsigned threads, long start, \
                                 long end, long step, long chunk, unsigned flags) {             \
    SNNLSTM_PASS_ON(GOMP_parallel_loop_##kind, body, data, threads, start, end, step, chunk,    \
                    flags);                                                                     \
    serial_loop = {start, end, step};                                                           \
    body(data);                                                                                 \
  }

SNNLSTM_LOOP(dynamic)
SNNLSTM_LOOP(guided)
SNNLSTM_LOOP(nonmonotonic_dynamic)
SNNLSTM_LOOP(nonmonotonic_guided)

void GOMP_loop_end() { SNNLSTM_PASS_ON(GOMP_loop_end); }
void GOMP_loop_end_nowait() { SNNLSTM_PASS_ON(GOMP_loop_end_nowait); }

}  // extern "C"
