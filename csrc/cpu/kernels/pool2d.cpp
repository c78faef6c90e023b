// Instantiates max_pool2d and avg_pool2d for one instruction set.
#include "pool2d.h"

#include "entry.h"

SNNLSTM_BEGIN_ISA

void pool_forward(const PoolForwardArgs& a) {
  a.dtype == DType::float64 ? Pool2d<double>::forward(a) : Pool2d<float>::forward(a);
}

void pool_backward(const PoolBackwardArgs& a) {
  a.dtype == DType::float64 ? Pool2d<double>::backward(a) : Pool2d<float>::backward(a);
}

SNNLSTM_END_ISA
