// This instruction set's entry points, for ../dispatch.cpp, and the small ones among them.
#include "../api.h"
#include "entry.h"
#include "lanes.h"
#include "math.h"
#include "pack.h"

SNNLSTM_BEGIN_ISA

static cpu::Sizes sizes(const Cell& cell, int threads) {
  return with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    const Layout<typename L::Scalar, L::count> l(cell);
    const int64_t item = sizeof(typename L::Scalar);
    cpu::Sizes s;
    s.packed_forward = l.packed_forward() * item;
    s.packed_backward = l.packed_backward() * item;
    s.forward_workspace = forward_workspace(cell, threads);
    s.backward_workspace = backward_workspace(cell, threads);
    return s;
  });
}

static int64_t padded_channels(const Cell& cell) {
  return with_lanes(cell, [&](auto lanes) {
    constexpr int VL = decltype(lanes)::count;
    return (cell.C + VL - 1) / VL * VL;
  });
}

static void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed) {
  with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    using T = typename L::Scalar;
    const Layout<T, L::count> l(cell);
    if (backward)
      Packing<T, L::count>::backward(l, static_cast<const T*>(weight), static_cast<T*>(packed));
    else
      Packing<T, L::count>::forward(l, static_cast<const T*>(weight), static_cast<T*>(packed));
  });
}

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

static bool evaluate(const char* name, DType dtype, const void* in, void* out, int64_t count) {
  return dtype == DType::float64 ? evaluate_as<double>(name, in, out, count)
                                 : evaluate_as<float>(name, in, out, count);
}

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {sizes, padded_channels, pack_weight, forward, backward, evaluate};

SNNLSTM_END_ISA
