// One OpenMP runtime in the process: torch's.
//
// torch brings its own libgomp. Its name depends on the wheel: libgomp.so.1 (2.13, x86-64),
// libgomp-a34b3233.so.1 (2.4, x86-64), torch.libs/libgomp-804f19d4.so.1.0.0 with the SONAME changed
// alike and loaded locally (2.4, Arm); conda builds have libiomp5 or libomp in its place. A link to
// libgomp.so.1 would bring a second copy into some of these processes, with a second pool of
// threads that fight torch's over the cores. So nothing is linked: GCC turns `#pragma omp` into
// calls of the functions below, which pass them on to the very library that gives libtorch_cpu.so
// its GOMP_parallel (libiomp5 and libomp have it too). They are hidden: no other library sees them.
//
// These are the functions that parallel regions need (work is handed out with atomics, not with
// `omp for`). Code that needs another makes a module that fails to load with "undefined symbol:
// GOMP_..."; tests/packaging/test_packaging.py looks for these. Add it below.
#include "openmp.h"

#include <dlfcn.h>

namespace {

struct Runtime {
  void* handle = nullptr;  // null: none, everything runs on the calling thread
  const char* path = "";

  Runtime() {
    void* parallel = nullptr;
    // By SONAME: found where torch has been imported, never loaded by this.
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
      parallel = dlsym(torch, "GOMP_parallel");
    }
    // A torch that is built otherwise, or none: what the process has, or else the system.
    if (!parallel) parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (!parallel) {
      if (void* system = dlopen("libgomp.so.1", RTLD_LAZY)) {
        parallel = dlsym(system, "GOMP_parallel");
      }
    }
    Dl_info info;
    if (parallel && dladdr(parallel, &info) && info.dli_fname) {
      handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
      if (handle) path = info.dli_fname;
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

int omp_get_max_threads() {
  SNNLSTM_PASS_ON(omp_get_max_threads);
  return 1;
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  SNNLSTM_PASS_ON(GOMP_parallel, body, data, threads, flags);
  body(data);
}

}  // extern "C"
