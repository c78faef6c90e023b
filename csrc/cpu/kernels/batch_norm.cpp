// Instantiates batch norm for one instruction set.
#include "batch_norm.h"

#include "entry.h"

SNNLSTM_BEGIN_ISA

int64_t batch_norm_workspace(const BatchNormArgs& a) {
  return a.dtype == DType::float64 ? BatchNorm<double>(a, nullptr).bytes()
                                   : BatchNorm<float>(a, nullptr).bytes();
}

void batch_norm_forward(const BatchNormForwardArgs& a) {
  a.dtype == DType::float64 ? BatchNorm<double>::forward(a) : BatchNorm<float>::forward(a);
}

void batch_norm_backward(const BatchNormBackwardArgs& a) {
  a.dtype == DType::float64 ? BatchNorm<double>::backward(a) : BatchNorm<float>::backward(a);
}

SNNLSTM_END_ISA
