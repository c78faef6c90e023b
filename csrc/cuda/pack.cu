// Launches the kernels that bring the weight and the quantiser's levels into the form that the
// others read.
#include "launchers.h"
#include "pack.cuh"

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

void pack_weight(const Cell& cell, const PackedPart (&parts)[2], const void* weight, void* packed,
                 void* stream) {
  Jobs<MmaPacking> jobs;
  int count = 0;
  for (const PackedPart& part : parts) {
    if (part.mma())
      jobs.job[count++] = packing_of(cell, part, weight, packed);
    else
      pack_on_fma(cell, part, weight, packed, stream);
  }
  if (count > 0) pack_for_mma(jobs, count, stream);
}

void Plan::store_levels(const double* values, void* levels, void* stream) const {
  with_real(cell.dtype, [&](auto real) {
    using R = decltype(real);
    for (int from = 0; from < cell.num_levels; from += StoreLevels::kMost) {
      StoreLevels p;
      p.count = std::min(cell.num_levels - from, StoreLevels::kMost);
      std::copy(values + from, values + from + p.count, p.value);
      p.levels = static_cast<R*>(levels) + from;
      const Launch how{"store levels", 1, StoreLevels::kMost, 0, stream};
      launch(how, &store_levels_kernel<R>, p);
    }
  });
}

}  // namespace snnlstm::cuda
