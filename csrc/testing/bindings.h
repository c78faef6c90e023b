// What a build for tests has besides: cpu_evaluate(), and the instruction set `wide`, which is
// AVX-512's tiles in AVX2's instructions: slow, but it lets the tiles be tested without AVX-512.
#pragma once

#include "../bindings.h"
#include "../cpu/api.h"

namespace snnlstm {

#define SNNLSTM_DECLARE(isa)                                      \
  namespace isa {                                                 \
  bool evaluate(const char*, DType, const void*, void*, int64_t); \
  }
SNNLSTM_DECLARE(baseline)
#if SNNLSTM_X86
SNNLSTM_DECLARE(avx2)
SNNLSTM_DECLARE(wide)
SNNLSTM_DECLARE(avx512)
#endif
#undef SNNLSTM_DECLARE

namespace bindings {

// out[k] = function(in[k]) as the kernels of the instruction set in use compute it.
inline void evaluate(const std::string& function, int dtype, Address in, Address out,
                     int64_t count) {
  auto* of_isa = &baseline::evaluate;
#if SNNLSTM_X86
  const std::string isa = cpu::isa_name();
  if (isa != "baseline")
    of_isa = isa == "avx2" ? &avx2::evaluate : isa == "wide" ? &wide::evaluate : &avx512::evaluate;
#endif
  counted("count", count);
  if (count > 0) needs(at(in), "in"), needs(at(out), "out");
  if (!of_isa(function.c_str(), numbered<DType>("dtype", dtype, 2), at(in), at(out), count))
    throw py::value_error("function must be exp, sigmoid or tanh, got '" + function + "'");
}

inline void bind_testing(py::module_& m) { m.def("cpu_evaluate", &evaluate); }

}  // namespace bindings
}  // namespace snnlstm
