// Finds torch's threads, so that the process has only one set of them.
//
// torch brings its own OpenMP runtime (GCC's, LLVM's or Intel's), whose name depends on the wheel:
// libgomp.so.1 (2.13, x86-64), libgomp-a34b3233.so.1 (2.4, x86-64),
// torch.libs/libgomp-804f19d4.so.1.0.0 with a matching SONAME, loaded locally (2.4, Arm),
// libomp.dylib (macOS), libiomp5md.dll (Windows); conda builds have libiomp5 or libomp. A link to
// any of them would load a second copy into some processes, whose threads would compete with
// torch's for the cores. So this file links nothing and uses no pragma. It looks up the functions
// that a compiler would call in the library that torch uses, and calls them itself.
#include "platform.h"

#include <string>
#include <thread>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

namespace snnlstm {
namespace {

// ---- libraries of the process -------------------------------------------------------------------

#if defined(_WIN32)

void* address_in(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

// Returns the OpenMP library that torch has loaded, or null.
void* find_openmp(std::string& path) {
  for (const char* name : {"libiomp5md.dll", "libomp140.x86_64.dll", "libomp.dll"}) {
    const HMODULE library = GetModuleHandleA(name);
    if (!library) continue;
    char text[MAX_PATH];
    const DWORD length = GetModuleFileNameA(library, text, MAX_PATH);
    path = length > 0 && length < MAX_PATH ? std::string(text, length) : name;
    return library;
  }
  return nullptr;
}

#else

void* address_in(void* library, const char* name) { return dlsym(library, name); }

// Returns torch's library if torch has been imported, else null. This never loads it.
void* find_torch() {
#if defined(__APPLE__)
  const std::string wanted = "/libtorch_cpu.dylib";
  for (uint32_t k = 0; k < _dyld_image_count(); ++k) {
    const std::string path = _dyld_get_image_name(k);
    if (path.size() > wanted.size() && path.substr(path.size() - wanted.size()) == wanted)
      return dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  }
  return nullptr;
#else
  return dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // by SONAME
#endif
}

// Returns the library that runs torch's parallel regions. If torch is absent or built otherwise, it
// is the one that the process has loaded or, if there is none, the system's.
void* find_openmp(std::string& path) {
  const auto parallel_in = [](void* place) {
    void* const gomp = dlsym(place, "GOMP_parallel");
    return gomp ? gomp : dlsym(place, "__kmpc_fork_call");
  };
  void* parallel = nullptr;
  if (void* torch = find_torch()) parallel = parallel_in(torch);
  if (!parallel) parallel = parallel_in(RTLD_DEFAULT);
#if defined(__linux__)
  if (!parallel)
    if (void* system = dlopen("libgomp.so.1", RTLD_LAZY)) parallel = dlsym(system, "GOMP_parallel");
#endif
  Dl_info info;
  if (!parallel || !dladdr(parallel, &info) || !info.dli_fname) return nullptr;
  path = info.dli_fname;
  return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

#endif

// ---- the runtime --------------------------------------------------------------------------------

// The place in the source at which a region begins, for LLVM's and Intel's runtimes (ident_t in
// openmp/runtime/src/kmp.h).
struct SourcePlace {
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
};

struct Team {
  void (*body)(void* data, int thread);
  void* data;
};

struct Runtime {
  std::string path;
  int (*max_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  // GCC's runtime (libgomp/parallel.c).
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  // LLVM's and Intel's, which also have GCC's functions except on Windows (kmp_csupport.cpp).
  void (*fork_call)(SourcePlace*, int32_t count, void (*)(int32_t*, int32_t*, Team*),
                    ...) = nullptr;
  int32_t (*global_thread_num)(SourcePlace*) = nullptr;
  void (*push_num_threads)(SourcePlace*, int32_t global_thread, int32_t threads) = nullptr;

  Runtime() {
    std::string library_path;
    void* const library = find_openmp(library_path);
    if (!library) return;
    const auto set = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(address_in(library, name));
    };
    set(max_threads, "omp_get_max_threads"), set(thread_num, "omp_get_thread_num");
    set(parallel, "GOMP_parallel"), set(fork_call, "__kmpc_fork_call");
    set(global_thread_num, "__kmpc_global_thread_num");
    set(push_num_threads, "__kmpc_push_num_threads");
    if (has_fork_call() || (parallel && thread_num)) path = library_path;
  }
  bool has_fork_call() const { return fork_call && global_thread_num && push_num_threads; }
  bool serves() const { return !path.empty(); }
};

const Runtime& runtime() {
  static const Runtime instance;  // never closed: its threads may outlive every caller
  return instance;
}

}  // namespace

const char* openmp_library() { return runtime().path.c_str(); }

int most_threads() {
  const Runtime& r = runtime();
  return r.serves() && r.max_threads ? r.max_threads() : 1;
}

void run_team(int threads, void (*body)(void* data, int thread), void* data) {
  const Runtime& r = runtime();
  if (threads <= 1 || !r.serves()) return body(data, 0);
  Team team{body, data};
  if (r.has_fork_call()) {
    static SourcePlace place{0, 2, 0, 0, ";snnlstm;run_team;0;0;;"};  // 2: KMP_IDENT_KMPC
    r.push_num_threads(&place, r.global_thread_num(&place), threads);
    const auto member = [](int32_t*, int32_t* thread, Team* team) {
      team->body(team->data, *thread);
    };
    r.fork_call(&place, 1, member, &team);
    return;
  }
  const auto member = [](void* team) {
    static int (*const number)() = runtime().thread_num;
    static_cast<Team*>(team)->body(static_cast<Team*>(team)->data, number());
  };
  r.parallel(member, &team, unsigned(threads), 0);
}

void yield_core() { std::this_thread::yield(); }

}  // namespace snnlstm
