#include "choice.h"
#include "launchers.h"
#include "passes.h"
#include "plan.h"

namespace snnlstm::cuda {

DType gate_type(DType states, Matrix matrix) {
  if (states != DType::float32) return states;
  return matrix == Matrix::float16    ? DType::float16
         : matrix == Matrix::bfloat16 ? DType::bfloat16
                                      : states;
}

int64_t padded_channels(int64_t C) {
  Cell cell;
  cell.C = C;
  return Shape(cell).Cp;
}

double cudnn_seconds(const Cell& cell, const Device& device, Matrix matrix, bool backward) {
  const Cudnn cudnn(cell, device, matrix);
  const int64_t inputs = cell.Cin + cell.C;
  return backward ? cudnn.data(inputs) + cudnn.weight(inputs) : cudnn.forward();
}

Matrix full_precision(const Device& device) {
  return tensor_cores_beat_fma(device) ? Matrix::tf32x3 : Matrix::exact;
}

// Returns what is estimated to be fastest. steps: the forward pass's. found: becomes that
// algorithm's backward pass, if it has one.
static Algorithm fastest(const Cell& cell, const Device& device, Matrix matrix,
                         const ForwardPass& steps, bool backward,
                         std::unique_ptr<const BackwardPass>& found) {
  const double behind_torch = pointwise_seconds(cell, device, matrix, backward);
  if (!backward)
    return behind_torch < forward_seconds(cell, device, steps) ? Algorithm::pointwise
                                                               : Algorithm::fused;
  Algorithm best = Algorithm::pointwise;
  double least = behind_torch;
  for (const Algorithm algorithm : {Algorithm::hybrid, Algorithm::fused}) {
    auto pass = std::make_unique<const BackwardPass>(cell, device, matrix, steps.step.multiply,
                                                     algorithm, -1);
    const double time = backward_seconds(cell, device, matrix, *pass);
    if (time <= least) best = algorithm, least = time, found = std::move(pass);
  }
  return best;
}

Plan::Plan(const Cell& of, const Device& device, Matrix numbers, Algorithm wanted, bool of_backward,
           int only_shape)
    : cell(of), matrix(numbers), algorithm(wanted), backward(of_backward) {
  reason_against = cuda::reason_against(cell, 0);
  const ForwardPass steps(cell, device, matrix, backward ? -1 : only_shape);
  if (wanted == Algorithm::automatic)
    algorithm = fastest(cell, device, matrix, steps, backward, backward_);
  int64_t launched = 0;
  const BlockShape* shapes = backward ? kDataShapes : kForwardShapes;
  if (algorithm == Algorithm::pointwise) {
    cell.T = 1;
    pointwise_ = std::make_unique<PointwisePass>(of, matrix);
    launched = pointwise_->tiling.blocks();
    workspace = backward ? pointwise_->workspace : 0;
    name = "pointwise";
  } else {
    if (backward) {
      if (!backward_)
        backward_ = std::make_unique<BackwardPass>(cell, device, matrix, steps.step.multiply,
                                                   algorithm, only_shape);
      shape = backward_->to_mem.shape;
      launched = backward_blocks(cell, backward_->to_mem, backward_->to_x);
      packed_bytes = backward_->packed.bytes(), workspace = backward_->workspace;
    } else {
      forward_ = std::make_unique<ForwardPass>(steps);
      shape = steps.step.shape;
      launched = forward_blocks(cell, steps.step);
      packed_bytes = steps.packed.bytes(), workspace = steps.workspace;
    }
    name = name_of(steps.step.multiply);
    if (algorithm == Algorithm::hybrid) name = "hybrid-" + name;
    if (only_shape >= 0 && shape >= 0) name += "-" + shapes[shape].name();
  }
  if (reason_against.empty()) reason_against = cuda::reason_against(cell, launched);
  seconds = seconds_on(device);
}

std::pair<int, int> Plan::tile() const {
  const Tiling& of = forward_    ? forward_->step.tiling
                     : backward_ ? backward_->to_mem.tiling
                                 : pointwise_->tiling;
  return {of.h, of.w};
}

double Plan::seconds_on(const Device& device) const {
  if (forward_) return forward_seconds(cell, device, *forward_);
  if (backward_) return backward_seconds(cell, device, matrix, *backward_);
  return pointwise_seconds(pointwise_->s.c, device, matrix, backward);
}

Plan::Plan(Plan&&) noexcept = default;
Plan::~Plan() = default;

std::vector<Plan> Plan::candidates(const Cell& cell, const Device& device, Matrix matrix,
                                   bool backward) {
  std::vector<Plan> found;
  const auto plan = [&](Algorithm algorithm, int shape = -1) {
    return Plan(cell, device, matrix, algorithm, backward, shape);
  };
  const int first = plan(Algorithm::fused).shape;
  found.push_back(plan(Algorithm::fused, first));
  const int rows = int(backward ? std::size(kDataShapes) : std::size(kForwardShapes));
  for (int row = 0; first >= 0 && row < rows; ++row) {
    if (row == first) continue;
    Plan other = plan(Algorithm::fused, row);
    if (other.shape == row) found.push_back(std::move(other));
  }
  if (backward) found.push_back(plan(Algorithm::hybrid, first));
  found.push_back(plan(Algorithm::pointwise));
  return found;
}

void Plan::pack(const void* weight, void* packed, void* stream) const {
  if (forward_)
    pack_weight(cell, {forward_->packed.x, forward_->packed.mem}, weight, packed, stream);
  if (backward_)
    pack_weight(cell, {backward_->packed.to_x, backward_->packed.to_mem}, weight, packed, stream);
}

void Plan::run(const ForwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  pointwise_ ? pointwise_->run(args, stream) : forward_->run(args, stream);
}

void Plan::run(const BackwardArgs& args, void* stream) const {
  if (!reason_against.empty()) throw std::runtime_error(reason_against);
  pointwise_ ? pointwise_->run(args, stream) : backward_->run(args, stream);
}

#if defined(__CUDACC__)

Device current_device() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  check(status, "asking for the current CUDA device");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking what the CUDA device can do");
    return value;
  };
  Device found;
  found.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                             attribute(cudaDevAttrComputeCapabilityMinor);
  found.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // In kHz, with two transfers a cycle, and in bits.
  found.clock = 1e3 * attribute(cudaDevAttrClockRate);
  found.bandwidth =
      2e3 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
  return found;
}

#endif

}  // namespace snnlstm::cuda
