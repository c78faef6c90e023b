#include "launchers.h"
#include "pass.h"
#include "steps.h"

namespace snnlstm::cuda {

Pass::Pass(const Cell& given, const Device& device, Matrix numbers, Algorithm wanted,
           bool is_backward, const BlockChoice& only, const Pass* other)
    : cell(given), matrix(numbers), algorithm(wanted), backward(is_backward) {
  device_ = device.number;
  forward_ = other ? std::make_unique<const ForwardSteps>(*other->forward_)
                   : std::make_unique<const ForwardSteps>(cell, device, matrix, BlockChoice());
  const bool any_blocks = only.shape < 0 && only.h == 0 && only.w == 0;
  auto steps = backward || any_blocks
                   ? std::make_unique<const ForwardSteps>(*forward_)
                   : std::make_unique<const ForwardSteps>(cell, device, matrix, only);
  const Cell& c = steps->s.c;
  reason_against = cuda::reason_against(c, 0);
  const Multiply multiply = steps->step.multiply;
  if (wanted == Algorithm::automatic) {
    const Tiling& tiling = steps->step.tiling;
    const double computed =
        double(tiling.by_rows.value) * tiling.by_cols.value * steps->step.pixels();
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
    auto its = std::make_unique<const BackwardSteps>(cell, device, matrix, multiply, only);
    shape = its->to_mem.shape;
    launched = std::max(its->to_x.tiling.blocks(), c.N * ceil_div(neurons, kSpreadThreads));
    steps_ = std::move(its);
  } else {
    shape = steps->step.shape;
    launched = c.N * ceil_div(neurons, kFireThreads);
    steps_ = std::move(steps);
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
                                   bool backward) {
  std::vector<Pass> found;
  const auto pass = [&](Algorithm algorithm, int shape = -1) {
    const Pass* other = found.empty() ? nullptr : &found.front();
    return Pass(cell, device, matrix, algorithm, backward, {shape}, other);
  };
  const int first = pass(Algorithm::fused).shape;
  found.push_back(pass(Algorithm::fused, first));
  const int rows = int(backward ? std::size(kDataShapes) : std::size(kForwardShapes));
  for (int row = 0; first >= 0 && row < rows; ++row) {
    if (row == first) continue;
    Pass other = pass(Algorithm::fused, row);
    if (other.shape == row) found.push_back(std::move(other));
  }
  found.push_back(pass(Algorithm::cudnn));
  const Algorithm chosen = pass(Algorithm::automatic).algorithm;
  const auto its = std::find_if(found.begin(), found.end(),
                                [&](const Pass& p) { return p.algorithm == chosen; });
  std::rotate(found.begin(), its, its + 1);
  return found;
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
  Device found;
  found.number = number;
  found.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                             attribute(cudaDevAttrComputeCapabilityMinor);
  found.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return found;
}

#endif

}  // namespace snnlstm::cuda
