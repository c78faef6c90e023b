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
      device_(device.number) {
  forward_ = other ? std::make_unique<const ForwardSteps>(*other->forward_)
                   : std::make_unique<const ForwardSteps>(cell, device, matrix, BlockChoice());
  const bool any_blocks = only.shape < 0 && only.h == 0 && only.w == 0;
  auto forward = backward || any_blocks
                     ? std::make_unique<const ForwardSteps>(*forward_)
                     : std::make_unique<const ForwardSteps>(cell, device, matrix, only);
  const Cell& c = forward->s.c;
  reason_against = cuda::reason_against(c, 0);
  const Multiply multiply = forward->step.multiply;
  if (wanted == Algorithm::automatic) {
    const Tiling& tiling = forward->step.tiling;
    const double computed =
        double(tiling.by_rows.value) * tiling.by_cols.value * forward->step.pixels();
    algorithm =
        rules::algorithm(c, device, matrix, multiply == Multiply::fma, multiply == Multiply::tf32x3,
                         double(c.Ho() * c.Wo()) / computed, backward);
  }
  name = kMultiplyNames[int(multiply)];
  const int64_t neurons = c.C * c.Ho() * c.Wo();
  int64_t launched = 0;  // blocks of the largest launch
  if (algorithm == Algorithm::cudnn) {
    cell.T = 1;
    steps_ = std::make_unique<const CudnnSteps>(cell, matrix, backward);
    name = "cudnn";
  } else if (backward) {
    auto steps = std::make_unique<const BackwardSteps>(cell, device, matrix, multiply, only);
    shape = steps->to_mem.shape;
    launched = std::max(steps->to_x.tiling.blocks(), c.N * ceil_div(neurons, kSpreadThreads));
    steps_ = std::move(steps);
  } else {
    shape = forward->step.shape;
    launched = c.N * ceil_div(neurons, kFireThreads);
    steps_ = std::move(forward);
  }
  launched = std::max(launched, steps_->tiling().blocks());
  packed_bytes = steps_->packed.bytes;
  workspace = steps_->workspace;
  if (only.shape >= 0 && shape >= 0)
    name = name + "-" + (backward ? kDataShapes : kForwardShapes)[shape].name;
  if (reason_against.empty()) reason_against = cuda::reason_against(cell, launched);
}

std::pair<int, int> Pass::tile() const { return {steps_->tiling().h, steps_->tiling().w}; }

Pass::Pass(Pass&&) noexcept = default;
Pass& Pass::operator=(Pass&&) noexcept = default;
Pass::~Pass() = default;

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
