#include "launchers.h"
#include "pass.h"
#include "steps.h"

namespace snnlstm::cuda {

Pass::Pass(const Cell& sequence, const Device& device, Matrix numbers, Algorithm wanted,
           bool is_backward, const BlockChoice& only, const Pass* other)
    : cell(sequence),
      matrix(numbers),
      algorithm(wanted),
      backward(is_backward),
      device_(device.number),
      forward_(other ? std::make_unique<const ForwardSteps>(*other->forward_)
                     : std::make_unique<const ForwardSteps>(cell, device, matrix, BlockChoice())) {
  if (wanted == Algorithm::automatic) algorithm = choose(device);
  plan(device, only);
  describe(only);
}

Algorithm Pass::choose(const Device& device) const {
  const ForwardBlocks& step = forward_->step;
  const Cell& c = forward_->s.c;
  const double computed =
      double(step.tiling.by_rows.value) * step.tiling.by_cols.value * step.pixels();
  return rules::algorithm(c, device, matrix, step.multiply == Multiply::fma,
                          step.multiply == Multiply::tf32x3, double(c.Ho() * c.Wo()) / computed,
                          backward);
}

void Pass::plan(const Device& device, const BlockChoice& only) {
  if (algorithm == Algorithm::cudnn) {
    cell.T = 1;
    steps_ = std::make_unique<const CudnnSteps>(cell, matrix, backward);
  } else if (backward) {
    const Multiply multiply = forward_->step.multiply;
    steps_ = std::make_unique<const BackwardSteps>(cell, device, matrix, multiply, only);
  } else if (only.is_free()) {
    steps_ = std::make_unique<const ForwardSteps>(*forward_);
  } else {
    steps_ = std::make_unique<const ForwardSteps>(cell, device, matrix, only);
  }
}

void Pass::describe(const BlockChoice& only) {
  shape = steps_->shape;
  packed_bytes = steps_->packed.bytes;
  workspace = steps_->workspace;
  name = algorithm == Algorithm::cudnn ? "cudnn" : kMultiplyNames[int(steps_->multiply)];
  if (only.shape >= 0 && shape >= 0)
    name = name + "-" + (backward ? kDataShapes : kForwardShapes)[shape].name;
  reason_against = cuda::reason_against(cell, steps_->blocks);
}

Pass::Pass(Pass&&) noexcept = default;
Pass& Pass::operator=(Pass&&) noexcept = default;
Pass::~Pass() = default;

std::pair<int, int> Pass::tile() const { return {steps_->tiling().h, steps_->tiling().w}; }

std::vector<Pass> Pass::candidates(const Cell& cell, const Device& device, Matrix matrix,
                                   bool backward, const Pass* other) {
  const Pass by_rules(cell, device, matrix, Algorithm::fused, backward, {}, other);
  const auto pass = [&](Algorithm algorithm, int shape = -1) {
    return Pass(cell, device, matrix, algorithm, backward, {shape}, &by_rules);
  };
  const int first = by_rules.shape;
  std::vector<Pass> passes;
  passes.push_back(pass(Algorithm::fused, first));
  const int rows = int(backward ? std::size(kDataShapes) : std::size(kForwardShapes));
  for (int row = 0; first >= 0 && row < rows; ++row) {
    if (row == first) continue;
    Pass one = pass(Algorithm::fused, row);
    if (one.shape == row) passes.push_back(std::move(one));
  }
  passes.push_back(pass(Algorithm::cudnn));
  const Algorithm chosen = pass(Algorithm::automatic).algorithm;
  const auto best = std::find_if(passes.begin(), passes.end(),
                                 [&](const Pass& p) { return p.algorithm == chosen; });
  std::rotate(passes.begin(), best, best + 1);
  return passes;
}

void Pass::pack(const void* weight, void* packed, void* stream, const Pass* other,
                void* other_packed) const {
  const OnDevice on(device_);
  if (other)
    pack_weight(weight, {{steps_.get(), packed}, {other->steps_.get(), other_packed}}, stream);
  else
    pack_weight(weight, {{steps_.get(), packed}}, stream);
}

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
