// What the current device is and can do.
#include <string>

#include "api.h"
#include "primitives.cuh"

namespace snnlstm::cuda {

#if defined(__CUDACC__)

Target current_target(void* stream) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status == cudaErrorInsufficientDriver)
    throw std::runtime_error(
        "the NVIDIA driver is too old for the CUDA version " +
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
        " that snnlstm was built with: update it, or install a build for an older CUDA");
  check(status, "asking for the current CUDA device");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking what the CUDA device can do");
    return value;
  };
  Target target;
  target.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor);
  target.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  target.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  target.stream = stream;
  if (target.compute_capability < 75)
    throw std::runtime_error("CUDA device " + std::to_string(device) + " has compute capability " +
                             std::to_string(target.compute_capability / 10) + "." +
                             std::to_string(target.compute_capability % 10) +
                             "; snnlstm's kernels need 7.5 or newer");
  return target;
}

#else

Target current_target(void* stream) {
  Target target;
  target.stream = stream;
  return target;
}

#endif

}  // namespace snnlstm::cuda
