// What a build for tests has besides: cpu_evaluate(), time_tasks(), and on machines without AVX-512
// the instruction set `wide`, which is AVX-512's tiles in AVX2's instructions: slow, but it lets
// the tiles be tested.
#pragma once

#include <memory>

#include "../bindings.h"
#include "../cpu/api.h"
#include "../platform.h"

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
  if (isa == "avx2") of_isa = &avx2::evaluate;
  if (isa == "avx512") of_isa = &avx512::evaluate;
#if SNNLSTM_HAS_WIDE
  if (isa == "wide") of_isa = &wide::evaluate;
#endif
#endif
  counted("count", count);
  if (count > 0) needs(at(in), "in"), needs(at(out), "out");
  if (!of_isa(function.c_str(), numbered<DType>("dtype", dtype, 2), at(in), at(out), count))
    throw py::value_error("function must be exp, sigmoid or tanh, got '" + function + "'");
}

// Calls `function`, and returns (phase, threads, nanoseconds) of each task of its calls.
inline py::list time_tasks(const py::function& function) {
  constexpr int64_t kMost = 1 << 20;
  const std::unique_ptr<TaskLog::Entry[]> entries(new TaskLog::Entry[kMost]);  // not cleared
  TaskLog log{entries.get(), kMost, 0, 0, 1};
  task_log = &log;
  try {
    function();
  } catch (...) {
    task_log = nullptr;
    throw;
  }
  task_log = nullptr;
  if (log.count > log.capacity) throw py::value_error("function must have fewer than 2^20 tasks");
  py::list found;
  for (int64_t k = 0; k < log.count; ++k)
    found.append(py::make_tuple(entries[size_t(k)].phase, entries[size_t(k)].threads,
                                entries[size_t(k)].nanoseconds));
  return found;
}

inline void bind_testing(py::module_& m) {
  m.def("cpu_evaluate", &evaluate);
  m.def("time_tasks", &time_tasks);
}

}  // namespace bindings
}  // namespace snnlstm
