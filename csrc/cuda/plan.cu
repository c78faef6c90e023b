#include "launchers.h"
#include "passes.h"
#include "plan.h"

namespace snnlstm::cuda {

Plan::Plan(const Cell& given, const Device& device, Matrix numbers, Algorithm wanted,
           bool is_backward, const BlockChoice& only)
    : cell(given), matrix(numbers), algorithm(wanted), backward(is_backward) {
  device_ = device.number;
  auto steps = std::make_unique<ForwardPass>(cell, device, matrix, backward ? BlockChoice() : only);
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
    pass_ = std::make_unique<CudnnPass>(cell, matrix, backward);
    name = "cudnn";
  } else if (backward) {
    auto its = std::make_unique<BackwardPass>(cell, device, matrix, multiply, only);
    shape = its->to_mem.shape;
    launched = std::max(its->to_x.tiling.blocks(), c.N * ceil_div(neurons, kSpreadThreads));
    pass_ = std::move(its);
  } else {
    shape = steps->step.shape;
    launched = c.N * ceil_div(neurons, kFireThreads);
    pass_ = std::move(steps);
  }
  launched = std::max(launched, pass_->tiling().blocks());
  packed_bytes = pass_->packed.bytes, workspace = pass_->workspace;
  if (only.shape >= 0 && shape >= 0)
    name = name + "-" + (backward ? kDataShapes : kForwardShapes)[shape].name;
  if (reason_against.empty()) reason_against = cuda::reason_against(cell, launched);
}

std::pair<int, int> Plan::tile() const { return {pass_->tiling().h, pass_->tiling().w}; }

Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;
Plan::~Plan() = default;

std::vector<Plan> Plan::candidates(const Cell& cell, const Device& device, Matrix matrix,
                                   bool backward) {
  std::vector<Plan> found;
  const auto plan = [&](Algorithm algorithm, int shape = -1) {
    return Plan(cell, device, matrix, algorithm, backward, {shape});
  };
  const int first = plan(Algorithm::fused).shape;
  found.push_back(plan(Algorithm::fused, first));
  const int rows = int(backward ? std::size(kDataShapes) : std::size(kForwardShapes));
  for (int row = 0; first >= 0 && row < rows; ++row) {
    if (row == first) continue;
    Plan other = plan(Algorithm::fused, row);
    if (other.shape == row) found.push_back(std::move(other));
  }
  found.push_back(plan(Algorithm::cudnn));
  const Algorithm chosen = plan(Algorithm::automatic).algorithm;
  const auto its = std::find_if(found.begin(), found.end(),
                                [&](const Plan& p) { return p.algorithm == chosen; });
  std::rotate(found.begin(), its, its + 1);
  return found;
}

void Plan::pack(const void* weight, void* packed, void* stream, const Plan* other,
                void* other_packed) const {
  const OnDevice on(device_);
  if (other)
    pack_weight(weight, {{pass_.get(), packed}, {other->pass_.get(), other_packed}}, stream);
  else
    pack_weight(weight, {{pass_.get(), packed}}, stream);
}

void Plan::run(const ForwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  const OnDevice on(device_);
  pass_->forward(as_run(args, pass_->s.c), stream);
}

void Plan::run(const BackwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  const OnDevice on(device_);
  pass_->backward(as_run(args, pass_->s.c), stream);
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
