// Launching a kernel: checked, on the device or in the emulation. Included by primitives.cuh.
#pragma once

#include "primitives.cuh"

namespace snnlstm::cuda {

#if defined(__CUDACC__)
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

// How to launch: Launch{"step forward", grid, block, sizeof(Shared), stream}. The name appears in
// errors and in the emulation's counters.
struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + file + ":" + std::to_string(line));
}

inline std::string describe(const Launch& how) {
  auto dims = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return std::string("kernel '") + how.name + "', grid " + dims(how.grid) + ", block " +
         dims(how.block) + ", " + std::to_string(how.shared_bytes) + " bytes of shared memory";
}

#endif

// Runs kernel(args...) on the current device, in how.stream; an empty grid runs nothing. Throws
// std::runtime_error saying what was launched, where, and why it could not be. Neither allocates
// nor synchronises, so it can be captured in a CUDA graph.
template <class... Params, class... Args>
void launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
#if defined(__CUDACC__)
  if (how.shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
    if (status != cudaSuccess) check(status, describe(how).c_str(), how.file, how.line);
  }
  kernel<<<how.grid, how.block, how.shared_bytes, how.stream>>>(static_cast<Params>(args)...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) check(status, describe(how).c_str(), how.file, how.line);
#else
  auto thread = [&] { kernel(static_cast<Params>(args)...); };
  ::simt::run(::simt::Geometry{how.name, how.grid, how.block, how.shared_bytes, how.file, how.line},
              thread);
#endif
}

}  // namespace snnlstm::cuda
