// Instantiates batch norm for one instruction set.
#include "batch_norm.h"

#include "entry.h"

SNNLSTM_BEGIN_ISA

// Calls f with the kernels for a call.
template <class F>
static auto with_norm(const BatchNormArgs& a, F&& f) {
  return a.dtype == DType::float64 ? f(BatchNorm<double>(a, a.workspace))
                                   : f(BatchNorm<float>(a, a.workspace));
}

int64_t batch_norm_workspace(const BatchNormArgs& a) {
  return with_norm(a, [](const auto& norm) { return norm.bytes(); });
}
void batch_norm_forward(const BatchNormForwardArgs& a) {
  with_norm(a, [&](const auto& norm) { norm.forward(a); });
}
void batch_norm_backward(const BatchNormBackwardArgs& a) {
  with_norm(a, [&](const auto& norm) { norm.backward(a); });
}

SNNLSTM_END_ISA
