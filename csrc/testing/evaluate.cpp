// exp, sigmoid and tanh alone, as the kernels of one instruction set compute them.
#include "../cpu/kernels/math.h"

SNNLSTM_BEGIN_ISA

template <class T, class F>
static void map(const void* in, void* out, int64_t count, F&& f) {
  constexpr int VL = kWideBytes / sizeof(T);
  using S = Simd<T, VL>;
  for (int64_t k = 0; k < count; k += VL) {
    const int n = count - k < VL ? int(count - k) : VL;
    S::store_first(static_cast<T*>(out) + k, f(S::load_first(static_cast<const T*>(in) + k, n)), n);
  }
}

template <class T>
static bool evaluate_as(const char* name, const void* in, void* out, int64_t count) {
  using M = Math<T, kWideBytes / sizeof(T)>;
  using R = typename M::R;
  if (std::strcmp(name, "exp") == 0)
    map<T>(in, out, count, [](R x) { return M::exp(x); });
  else if (std::strcmp(name, "sigmoid") == 0)
    map<T>(in, out, count, [](R x) { return M::sigmoid(x); });
  else if (std::strcmp(name, "tanh") == 0)
    map<T>(in, out, count, [](R x) { return M::tanh(x); });
  else
    return false;
  return true;
}

bool evaluate(const char* name, DType dtype, const void* in, void* out, int64_t count) {
  return dtype == DType::float64 ? evaluate_as<double>(name, in, out, count)
                                 : evaluate_as<float>(name, in, out, count);
}

SNNLSTM_END_ISA
