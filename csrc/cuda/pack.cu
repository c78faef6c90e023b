// Packs weights, tells the sizes of the memory that the caller brings, and answers what is chosen.
#include "estimate.h"
#include "launch.h"
#include "packed.h"
#include "resident_plan.h"

namespace snnlstm::cuda {

namespace {

WeightMap map_of(const Cell& c, const void* weight, Use use) {
  const Shape s(c);
  return {weight, c.dtype, int(c.C), int(s.Cp), int(c.Cin), int(s.taps), use};
}

void pack_on_fma(const Cell& c, const PackedPart& part, const void* weight, void* packed,
                 void* stream) {
  const WeightMap map = map_of(c, weight, part.use);
  with_real(c.dtype, [&](auto real) {
    using R = decltype(real);
    const int64_t depth = part.pitch / int64_t(fma::kColumns * sizeof(R));
    const Launch how{"pack weight (fma)", part.blocks * (depth / fma::kDepth), fma::kThreads, 0,
                     stream};
    launch(how, &pack_fma<R>, map, static_cast<R*>(packed) + part.start / int64_t(sizeof(R)), depth,
           map.depth_channels());
  });
}

MmaPacking packing_of(const Cell& c, const PackedPart& part, const void* weight, void* packed) {
  MmaPacking p;
  p.map = map_of(c, weight, part.use);
  p.part = part;
  p.pairs = int(part.blocks * part.warps_n * (part.tiles / 2));
  p.packed = reinterpret_cast<uint32_t*>(static_cast<char*>(packed) + part.start);
  return p;
}

void pack_for_mma(Jobs<MmaPacking> p, int jobs, void* stream) {
  int64_t blocks = 0;
  size_t bytes = sizeof(float);  // the kernel names its shared memory even if nothing fits there
  for (int k = 0; k < jobs; ++k) {
    MmaPacking& job = p.job[k];
    blocks = std::max(blocks, job.part.depth.chunks * job.pairs);
    const bool forward = job.map.forward();
    const int length =
        (forward ? job.part.depth.patches ? job.map.Cin : job.per_chunk() : 16) * job.map.taps;
    const size_t of_job = size_t(forward ? 16 : job.per_chunk()) * (length | 1) * sizeof(float);
    if (of_job > 48 * 1024) continue;
    job.row_pitch = length | 1;
    bytes = std::max(bytes, of_job);
  }
  const Launch how{"pack weight (mma)", dim3(blocks, jobs), kPackThreads, bytes, stream};
  launch(how, &pack_mma<kPackThreads>, p);
}

}  // namespace

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

Sizes sizes(const Cell& cell, const Target& target) {
  Sizes z;
  z.packed_forward = PackedForward(cell, plan_forward(cell, target)).bytes();
  z.packed_backward = PackedBackward(cell, plan_backward(cell, target)).bytes();
  z.forward_workspace = forward_workspace(cell, target);
  z.backward_workspace = backward_workspace(cell, target, true);
  z.data_workspace = backward_workspace(cell, target, false);
  return z;
}

void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed,
                 const Target& target) {
  Jobs<MmaPacking> jobs;
  int count = 0;
  const auto pack = [&](const PackedPart& part) {
    if (part.mma())
      jobs.job[count++] = packing_of(cell, part, weight, packed);
    else
      pack_on_fma(cell, part, weight, packed, target.stream);
  };
  if (backward) {
    const PackedBackward parts(cell, plan_backward(cell, target));
    pack(parts.to_x), pack(parts.to_mem);
  } else {
    const PackedForward parts(cell, plan_forward(cell, target));
    pack(parts.x), pack(parts.mem);
  }
  if (count > 0) pack_for_mma(jobs, count, target.stream);
}

std::string reason_against(const Cell& cell, const Target& target) {
  const std::string reason = reason_against(cell, 0);
  if (!reason.empty()) return reason;
  return reason_against(cell, std::max(forward_blocks(cell, plan_forward(cell, target)),
                                       backward_blocks(cell, plan_backward(cell, target))));
}

void store_levels(const Cell& cell, const double* values, void* levels, const Target& target) {
  with_real(cell.dtype, [&](auto real) {
    using R = decltype(real);
    for (int from = 0; from < cell.num_levels; from += StoreLevels::kMost) {
      StoreLevels p;
      p.count = std::min(cell.num_levels - from, StoreLevels::kMost);
      std::copy(values + from, values + from + p.count, p.value);
      p.levels = static_cast<R*>(levels) + from;
      const Launch how{"store levels", 1, StoreLevels::kMost, 0, target.stream};
      launch(how, &store_levels_kernel<R>, p);
    }
  });
}

Matrix full_precision(const Target& target) {
  return tensor_cores_beat_fma(target) ? Matrix::tf32x3 : Matrix::exact;
}

Algorithm choose_algorithm(const Cell& cell, const Target& target) {
  if (target.algorithm == Algorithm::pointwise) return target.algorithm;
  if (runs_resident(cell, target)) return Algorithm::resident;
  return target.algorithm == Algorithm::automatic ? estimate(cell, target)
         : plan_forward(cell, target).mma()       ? Algorithm::mma
                                                  : Algorithm::fma;
}

namespace {

// Returns the ways with a launch for every step, for all blocks in `shapes` for which
// plan_of(target) has tensor cores. The estimate's choice comes first.
template <size_t count, class F>
std::vector<Way> fused_ways(const BlockShape (&shapes)[count], Target target, int Target::* shape,
                            F&& plan_of) {
  target.algorithm = Algorithm::fused;
  const auto chosen = plan_of(target);
  const std::string name = name_of(chosen.multiply);
  std::vector<Way> found;
  if (!chosen.mma()) return {{name, target}};
  const auto is_chosen = [&](const BlockShape& s) {
    return s.m == chosen.warps_m && s.n == chosen.warps_n &&
           s.m * s.n * s.k * 32 == chosen.threads();
  };
  for (const bool first : {true, false})
    for (size_t k = 0; k < count; ++k) {
      target.*shape = int(k);
      if (is_chosen(shapes[k]) == first && plan_of(target).mma())
        found.push_back({name + "-" + shapes[k].name(), target});
    }
  return found;
}

}  // namespace

std::vector<Way> ways(const Cell& cell, const Target& target, bool backward) {
  std::vector<Way> found =
      backward ? fused_ways(kDataShapes, target, &Target::data_shape,
                            [&](const Target& t) { return plan_backward(cell, t).to_mem; })
               : fused_ways(kForwardShapes, target, &Target::forward_shape,
                            [&](const Target& t) { return plan_forward(cell, t); });
  Target resident = target;
  resident.algorithm = Algorithm::resident;
  const bool can_be =
      backward ? runs_resident_backward(
                     cell, resident,
                     plan_resident_backward(cell, resident, plan_backward(cell, resident).to_mem))
               : runs_resident(cell, resident);
  if (can_be)
    found.push_back(
        {std::string("resident-") + name_of(plan_forward(cell, resident).multiply), resident});
  return found;
}

std::string algorithm_name(const Cell& cell, const Target& target) {
  const char* name = name_of(plan_forward(cell, target).multiply);
  return runs_resident(cell, target) ? std::string("resident-") + name : name;
}

#if defined(__CUDACC__)

Target current_target() {
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
  return target;
}

#endif

}  // namespace snnlstm::cuda
