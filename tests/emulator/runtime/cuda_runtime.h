// The part of CUDA's runtime that csrc/cuda/launch.cuh calls, without a GPU. It behaves as the real
// runtime is documented to: a launch above the kernel's limit, which is the one that was set last,
// fails; a failed call leaves an error behind, until cudaGetLastError() is called.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_of = 1, unsigned y_of = 1, unsigned z_of = 1) : x(x_of), y(y_of), z(z_of) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorStreamCaptureUnsupported = 900 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace fake {
inline std::mutex mutex;
inline thread_local int device = 0;
inline thread_local cudaError_t last = cudaSuccess;
inline std::map<std::pair<const void*, int>, int> limits;
inline int attribute_calls = 0, choices = 0, launches = 0, optin = 200 * 1024;
inline bool refuses_attributes = false, capturing = false;

inline cudaError_t fail() { return last = cudaErrorInvalidValue; }
}  // namespace fake

inline cudaError_t cudaGetLastError() { return std::exchange(fake::last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = fake::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return fake::fail();
  return ++fake::choices, fake::device = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = fake::optin, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  if (fake::refuses_attributes) return fake::fail();
  ++fake::attribute_calls;
  fake::limits[{kernel, fake::device}] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatus(fake::capturing), cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel,
                                       void** arguments) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  const auto found = fake::limits.find({kernel, fake::device});
  if (how->dynamicSmemBytes > size_t(found == fake::limits.end() ? 48 * 1024 : found->second))
    return fake::fail();
  if (fake::last != cudaSuccess) return fake::last;  // as a check of the last error would say
  fake::launches += *static_cast<int*>(arguments[0]);
  return cudaSuccess;
}
