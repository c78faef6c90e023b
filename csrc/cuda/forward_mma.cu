#include "launch.h"

namespace snnlstm::cuda {

void launch_forward_mma(const ForwardPlan& plan, DType dtype, const ForwardMma& p, Stream stream) {
  with_operand(plan.multiply, dtype, [&](auto op, auto type) {
    using Op = typename decltype(op)::type;
    using S = typename decltype(type)::type;
    const Launch how{"forward step (mma)", dim3(unsigned(p.tiling.blocks())),
                     dim3(unsigned(plan.threads())),
                     size_t(p.vectors) + 5 * plan.channels() * sizeof(float), stream};
    if (plan.tiles == 8)
      launch(how, &forward_mma<Op, S, 2>, p);
    else
      launch(how, &forward_mma<Op, S, 1>, p);
  });
}

}  // namespace snnlstm::cuda
