// Launches the kernels that convert the weight and the quantiser's levels to what the other kernels
// read.
#include "../launchers.h"
#include "../steps.h"
#include "pack.cuh"

namespace snnlstm::cuda {

namespace {

WeightMap map_of(const Steps& pass, const void* weight, Use use) {
  const Shape& s = pass.s;
  return {weight, s.c.dtype, int(s.c.C), int(s.Cp), int(s.c.Cin), int(s.taps), pass.taps, use};
}

FmaPacking fma_packing_of(const Steps& pass, const PackedPart& part, const void* weight,
                          void* packed) {
  FmaPacking p;
  p.map = map_of(pass, weight, part.use);
  p.packed = static_cast<char*>(packed) + part.start;
  p.columns = part.columns;
  p.chunks = int(part.pitch / (fma::kDepthUnit * part.columns * bytes_of(pass.real)));
  p.blocks = int(part.blocks) * p.chunks;
  return p;
}

MmaPacking mma_packing_of(const Steps& pass, const PackedPart& part, const void* weight,
                          void* packed) {
  MmaPacking p;
  p.map = map_of(pass, weight, part.use);
  p.part = part;
  p.pairs = int(part.blocks * part.warps_n * (part.tiles / 2));
  p.packed = reinterpret_cast<uint32_t*>(static_cast<char*>(packed) + part.start);
  return p;
}

}  // namespace

void pack_weight(const void* weight, std::initializer_list<PackedFor> all, void* stream) {
  Packings<MmaPacking> on_mma;
  Packings<FmaPacking> on_fma;
  unsigned mma_count = 0, fma_count = 0;
  int64_t mma_blocks = 0, fma_blocks = 0;  // of the largest segment
  for (const auto& [pass, packed] : all) {
    for (const PackedPart& part : {pass->packed.x, pass->packed.mem}) {
      if (part.blocks == 0) continue;  // cudnn has no packed weight
      if (part.mma()) {
        MmaPacking& job = on_mma.job[mma_count++] = mma_packing_of(*pass, part, weight, packed);
        mma_blocks = std::max(mma_blocks, part.depth.chunks * job.pairs);
      } else {
        FmaPacking& job = on_fma.job[fma_count++] = fma_packing_of(*pass, part, weight, packed);
        fma_blocks = std::max<int64_t>(fma_blocks, job.blocks);
      }
    }
  }
  with_real(all.begin()->pass->type, [&](auto real) {
    const Launch how{"pack weight (fma)", dim3(fma_blocks, fma_count), fma::kThreads, 0, stream};
    launch(how, &pack_fma<decltype(real)>, on_fma);
  });
  const Launch how{"pack weight (mma)", dim3(mma_blocks, mma_count), kPackThreads, 0, stream};
  launch(how, &pack_mma<kPackThreads>, on_mma);
}

void Pass::store_levels(const double* values, void* levels, void* stream) const {
  const OnDevice on(device_);
  with_real(cell.dtype, [&](auto real) {
    using R = decltype(real);
    for (int from = 0; from < cell.num_levels; from += StoreLevels::kMost) {
      StoreLevels p;
      p.count = std::min(cell.num_levels - from, StoreLevels::kMost);
      std::copy(values + from, values + from + p.count, p.value);
      p.levels = static_cast<R*>(levels) + (fault(Fault::lost_levels) ? 0 : from);
      const Launch how{"store levels", 1, StoreLevels::kMost, 0, stream};
      launch(how, &store_levels_kernel<R>, p);
    }
  });
}

}  // namespace snnlstm::cuda
