// Instantiates convolutions for one instruction set.
#include "conv2d.h"

#include "entry.h"
#include "lanes.h"

SNNLSTM_BEGIN_ISA

void convolve(const ConvolutionArgs& args) {
  with_lanes_of<float>(args.cell, [&](auto lanes) {
    using L = decltype(lanes);
    if (args.grad_weight) return typename L::template Of<ConvolutionBackward>(args).run();
    typename L::template Of<Convolution>(args).run();
  });
}

int64_t convolution_workspace(const Cell& cell, int threads, bool backward) {
  return with_lanes_of<float>(cell, [&](auto lanes) {
    using L = decltype(lanes);
    return backward ? L::template Of<ConvolutionBackward>::workspace(cell, threads)
                    : L::template Of<Convolution>::workspace(cell, threads);
  });
}

SNNLSTM_END_ISA
