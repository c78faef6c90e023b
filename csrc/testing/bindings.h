// What only a build for tests has: cpu_evaluate(), time_tasks(), and on machines without AVX-512
// the instruction set `wide`. `wide` is slow, but tests AVX-512's tiles in AVX2's instructions.
#pragma once

#include "../bindings.h"
#include "../cpu/api.h"
#include "../platform.h"

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

// Calls `function`, and returns (phase, threads, nanoseconds) of each task of its calls.
inline py::list time_tasks(const py::function& function) {
  TaskLog log;
  task_log = &log;
  try {
    function();
  } catch (...) {
    task_log = nullptr;
    throw;
  }
  task_log = nullptr;
  py::list found;
  for (const TaskLog::Entry& entry : log.entries)
    found.append(py::make_tuple(entry.phase, entry.threads, entry.nanoseconds));
  return found;
}

inline void bind_testing(py::module_& m) {
  m.def("cpu_evaluate", &evaluate);
  m.def("time_tasks", &time_tasks);
}

}  // namespace snnlstm::bindings
