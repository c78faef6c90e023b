// Computes exp, sigmoid or tanh as the kernels of one instruction set do.
#include "../cpu/kernels/entry.h"
#include "../cpu/kernels/math.h"

SNNLSTM_BEGIN_ISA

template <class T>
static bool evaluate_as(const char* name, const void* in, void* out, int64_t count) {
  using M = Math<T, kWideBytes / sizeof(T)>;
  using R = typename M::R;
  const char* const names[] = {"exp", "sigmoid", "tanh"};
  R (*const functions[])(R) = {M::exp, M::sigmoid, M::tanh};
  for (int which = 0; which < 3; ++which) {
    if (std::strcmp(name, names[which]) != 0) continue;
    for (int64_t k = 0; k < count; k += M::lanes) {
      const size_t bytes = size_t(count - k < M::lanes ? count - k : M::lanes) * sizeof(T);
      R values{};
      std::memcpy(&values, static_cast<const T*>(in) + k, bytes);
      values = functions[which](values);
      std::memcpy(static_cast<T*>(out) + k, &values, bytes);
    }
    return true;
  }
  return false;
}

bool evaluate(const char* name, DType dtype, const void* in, void* out, int64_t count) {
  return dtype == DType::float64 ? evaluate_as<double>(name, in, out, count)
                                 : evaluate_as<float>(name, in, out, count);
}

SNNLSTM_END_ISA
