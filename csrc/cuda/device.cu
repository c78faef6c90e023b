// What the current device is and can do.
#include "api.h"
#include "primitives.cuh"

namespace snnlstm::cuda {

#if defined(__CUDACC__)

Target current_target(void* stream) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
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
