// Instantiates snntorch.Leaky for one instruction set, for each dtype of x.
#include "leaky.h"

#include "entry.h"

SNNLSTM_BEGIN_ISA

template <class F>
static void with_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f(Leaky<double, double>{});
    case DType::float16:
      return f(Leaky<float, Float16>{});
    case DType::bfloat16:
      return f(Leaky<float, BFloat16>{});
    default:
      return f(Leaky<float, float>{});
  }
}

void leaky_forward(const LeakyForwardArgs& a) {
  with_types(a.dtype, [&](auto kernels) { decltype(kernels)::forward(a); });
}

void leaky_backward(const LeakyBackwardArgs& a) {
  with_types(a.dtype, [&](auto kernels) { decltype(kernels)::backward(a); });
}

SNNLSTM_END_ISA
