// Only a build for tests has cpu_evaluate() and, on machines without AVX-512, the instruction set
// `wide`, which is slow but tests AVX-512's tiles with AVX2's instructions.
#pragma once

#include "../bindings.h"
#include "../cpu/api.h"

namespace snnlstm::bindings {

// Sets out[k] to function(in[k]), as the kernels of the instruction set in use compute it.
inline void evaluate(const std::string& function, int dtype, Address in, Address out,
                     int64_t count) {
  const DType type = numbered<DType>("dtype", dtype, 2);
  counted("count", count);
  if (count > 0) needs(at(in), "in"), needs(at(out), "out");
  if (!cpu::kernels().evaluate(function.c_str(), type, at(in), at(out), count))
    throw py::value_error("function must be exp, sigmoid or tanh, got '" + function + "'");
}

inline void bind_testing(py::module_& m) { m.def("cpu_evaluate", &evaluate); }

}  // namespace snnlstm::bindings
