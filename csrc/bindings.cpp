// The core's Python module. It takes names, numbers and addresses, and releases the GIL.
#include "bindings_cpu.h"
#include "build_info.h"
#include "platform.h"

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
  bind_cell(m);
  bind_cpu(m);
#if SNNLSTM_WITH_CUDA
  bind_cuda(m);
  m.def("cuda_device", &cuda::device_of, py::arg("number"));
#endif
#if SNNLSTM_TESTING
  bind_testing(m);
#endif
}
