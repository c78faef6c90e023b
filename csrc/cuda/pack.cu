#include "launch.h"
#include "plan.h"

namespace snnlstm::cuda {

void launch_pack_fma(DType dtype, const WeightMap& map, void* packed, Stream stream) {
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    const int channels = map.depth_channels();
    const int64_t depth = round_up(int64_t(map.taps) * channels, fma::kDepth);
    const Launch how{"pack weight (fma)",
                     dim3(unsigned(depth / fma::kDepth),
                          unsigned(ceil_div(map.columns(), fma::kColumns))),
                     dim3(fma::kThreads), 0, stream};
    launch(how, &pack_fma<S>, map, static_cast<RealOf<S>*>(packed), depth, channels);
  });
}

}  // namespace snnlstm::cuda
