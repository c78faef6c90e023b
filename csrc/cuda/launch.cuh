// Launches a kernel, on the device or in the emulation, and checks the launch.
#pragma once

#include <cstddef>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#else
#include "simt.h"
#endif

namespace snnlstm::cuda {

// Describes a launch: Launch{"step forward", grid, block, sizeof(Shared), stream}. The name appears
// in errors and in the emulation's counters.
struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes = 0;
  void* stream = nullptr;
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

#if defined(__CUDACC__)

// Throws the error and clears it, because CUDA would report it again after a later, good call.
inline void check(cudaError_t status, const char* what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + file + ":" + std::to_string(line));
}

// Makes a device the current one. torch chooses a call's device through its own runtime, which does
// not tell the runtime that is linked here. The device stays chosen, because nothing else uses this
// runtime, and cudaSetDevice() would make a context on the device before, which takes memory there.
struct OnDevice {
  explicit OnDevice(int device, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    int before = 0;
    check(cudaGetDevice(&before), "asking for the current CUDA device", file, line);
    if (before != device) check(cudaSetDevice(device), "choosing a CUDA device", file, line);
  }
};

inline std::string describe(const Launch& how) {
  auto dims = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return std::string("kernel '") + how.name + "', grid " + dims(how.grid) + ", block " +
         dims(how.block) + ", " + std::to_string(how.shared_bytes) + " bytes of shared memory";
}

// Runs once for each kernel and device. It refuses to load the kernel while a graph captures the
// stream. It allows the kernel as much shared memory as the current device gives one block, because
// other threads could lower a limit that followed the size of each launch.
inline cudaError_t prepare(const void* kernel, cudaStream_t stream) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  int device = 0, most = 0;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({kernel, device}) > 0) return cudaSuccess;
  status = cudaStreamIsCapturing(stream, &capture);
  if (capture != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status == cudaSuccess) prepared.insert({kernel, device});
  return status;
}

#else

struct OnDevice {
  explicit OnDevice(int) {}
};

#endif

// Runs kernel(args...) on the current device, in how.stream. An empty grid runs nothing. Throws
// std::runtime_error with what was launched, where, and why that failed. launch() neither allocates
// nor synchronises, so a CUDA graph can capture it.
template <class... Params, class... Args>
void launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
#if defined(__CUDACC__)
  const auto function = reinterpret_cast<const void*>(kernel);
  const auto stream = static_cast<cudaStream_t>(how.stream);
  cudaError_t status = prepare(function, stream);
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = stream;
    std::tuple<Params...> values(static_cast<Params>(args)...);
    std::apply(
        [&](auto&... value) {
          void* addresses[] = {&value...};
          status = cudaLaunchKernelExC(&config, function, addresses);
        },
        values);
  }
  if (status == cudaSuccess) return;
  const std::string what =
      describe(how) +
      (status == cudaErrorStreamCaptureUnsupported
           ? ", in a graph's capture; run the call once before the capture, forward "
             "and backward, since the first launch of a kernel loads its code"
           : ", or a kernel that was launched before it");
  check(status, what.c_str(), how.file, how.line);
#else
  auto thread = [&] { kernel(static_cast<Params>(args)...); };
  ::simt::run(::simt::Geometry{how.name, how.grid, how.block, how.shared_bytes, how.file, how.line},
              thread);
#endif
}

}  // namespace snnlstm::cuda
