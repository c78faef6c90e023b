// What Python sees of the core. No logic: names, numbers and addresses, and the GIL released.
#include "bindings_cpu.h"
#include "build_info.h"
#include "openmp.h"
#include "pages.h"

#if SNNLSTM_WITH_CUDA
#include "bindings_cuda.h"
#endif
#if SNNLSTM_TESTING
#include "testing/bindings.h"
#endif

using namespace snnlstm;
using namespace snnlstm::bindings;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of snnlstm; use snnlstm.native.";
  m.def("build_info", [] {
    py::dict facts;
    for (const BuildFact& fact : kBuildInfo) facts[fact.name] = fact.value;
    return facts;
  });
  m.def("openmp_library", &openmp_library);
  m.def("prefer_huge_pages", [](Address memory, size_t bytes) {
    if (!memory || bytes > ~memory) throw py::value_error("memory must be given");
    prefer_huge_pages(at(memory), bytes);
  });

  bind_cell(m);
  bind_cpu(m);
#if SNNLSTM_WITH_CUDA
  bind_cuda(m);
#endif
#if SNNLSTM_TESTING
  bind_testing(m);
#endif
}
