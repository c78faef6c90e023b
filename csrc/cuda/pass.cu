#include "launchers.h"
#include "pass.h"
#include "steps.h"

namespace snnlstm::cuda {

namespace {

// Without tensor cores for float32, cuDNN's Winograd and its splits of long sums should win on a T4.
// No GPU has measured it yet.
Algorithm chosen(const Cell& c, const Device& device, Matrix matrix) {
  const double depth = double(c.kernel_h) * c.kernel_w * double(c.Cin + c.C);
  const bool full = c.dtype == DType::float32 && gate_type(c.dtype, matrix) == DType::float32;
  return device.compute_capability == 75 && full && depth >= 800 ? Algorithm::cudnn
                                                                 : Algorithm::fused;
}

}  // namespace

Pass::Pass(const Cell& sequence, const Device& device, Matrix numbers, Algorithm wanted,
           bool is_backward)
    : cell(sequence),
      matrix(numbers),
      algorithm(wanted),
      backward(is_backward),
      device_(device.number) {
  if (wanted == Algorithm::automatic) algorithm = chosen(within_image(cell), device, matrix);
  if (algorithm == Algorithm::cudnn) {
    cell.T = 1;
    steps_ = std::make_unique<const CudnnSteps>(cell, matrix, backward);
  } else if (backward) {
    steps_ = std::make_unique<const BackwardSteps>(cell, device, matrix);
  } else {
    steps_ = std::make_unique<const ForwardSteps>(cell, device, matrix);
  }
  packed_bytes = steps_->packed.bytes;
  workspace = steps_->workspace;
  name = algorithm == Algorithm::cudnn ? "cudnn" : kMultiplyNames[int(steps_->multiply)];
  reason_against =
      cuda::reason_against(cell, steps_->blocks, steps_->shared_bytes, device.shared_bytes);
}

Pass::Pass(Pass&&) noexcept = default;
Pass::~Pass() = default;

void Pass::run(const ForwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  const OnDevice on(device_);
  steps_->forward(as_run(args, steps_->s.c), stream);
}

void Pass::run(const BackwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  const OnDevice on(device_);
  steps_->backward(as_run(args, steps_->s.c), stream);
}

#if defined(__CUDACC__)

Device device_of(int number) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, number), "asking what the CUDA device can do");
    return value;
  };
  Device device;
  device.number = number;
  device.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

#endif

}  // namespace snnlstm::cuda
