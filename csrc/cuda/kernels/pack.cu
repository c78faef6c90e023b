// Launches the kernels that convert the weight and the quantiser's levels to what the other kernels
// read.
#include "../launchers.h"
#include "../steps.h"
#include "pack.cuh"

namespace snnlstm::cuda {

void Pass::pack(const void* weight, void* packed, void* stream) const {
  const OnDevice on(device_);
  Jobs<Packing> fma, mma;
  int64_t fma_blocks = 0, mma_blocks = 0;
  Multiply multiply = Multiply::fma;
  const Shape& s = steps_->s;
  for (const PackedPart* part : {&steps_->packed.x, &steps_->packed.mem}) {
    if (part->blocks == 0) continue;  // cudnn has no packed weight
    const int64_t blocks = part->blocks * part->chunks * (part->mma() ? part->pairs() : 1);
    Packing& job = (part->mma() ? mma : fma).job[part == &steps_->packed.x ? 0 : 1];
    job = {*part,        static_cast<char*>(packed) + part->start,
           weight,       s.c.dtype,
           int(s.c.C),   int(s.Cp),
           int(s.c.Cin), int(s.taps),
           steps_->taps, blocks};
    (part->mma() ? mma_blocks : fma_blocks) += blocks;
    if (part->mma()) multiply = part->multiply;
  }
  with_real(s.c.dtype, [&](auto real) {
    const Launch how{"pack weight (fma)", fma_blocks, kThreads, 0, stream};
    launch(how, &pack_fma<decltype(real)>, fma);
  });
  with_element(multiply, [&](auto element) {
    const Launch how{"pack weight (mma)", mma_blocks, kThreads, 0, stream};
    launch(how, &pack_mma<decltype(element)>, mma);
  });
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
