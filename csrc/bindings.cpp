// What Python sees of the core. No logic: names, numbers and addresses, and the GIL released.
#include "bindings.h"

#include <array>
#include <cstring>

#include "build_info.h"
#include "cpu/api.h"
#include "openmp.h"
#include "pages.h"

#if SNNLSTM_WITH_CUDA
#include "bindings_cuda.h"
#endif

using namespace snnlstm;
using namespace snnlstm::bindings;

namespace {

// The part of `count` values that is not zero, from a sample spread over all of them.
template <class T>
double density(const T* x, int64_t count) {
  const int64_t step = count / 16384 | 1;  // odd, against the period of channels and columns
  int64_t seen = 0, nonzero = 0;
  for (int64_t k = 0; k < count; k += step, ++seen) nonzero += x[k] != T(0);
  return seen ? double(nonzero) / double(seen) : 1;
}

void cpu_forward(const Cell& cell, int threads, bool record, py::object x, py::object syn0,
                 py::object mem0, std::array<Address, 3> weights, Address bias, Address threshold,
                 int64_t threshold_stride, double graded, Address levels, py::object spk,
                 py::object syn, py::object mem, Address saved_gates, Address saved_syn,
                 Address winner, Address workspace) {
  ForwardArgs a;
  a.cell = cell, a.threads = threads, a.record = record;
  a.x = view(x), a.syn0 = view(syn0), a.mem0 = view(mem0);
  a.weight = at(weights[0]), a.weight_mem = at(weights[1]), a.weight_x = at(weights[2]);
  a.bias = at(bias), a.levels = at(levels);
  a.threshold = at(threshold), a.threshold_stride = threshold_stride, a.graded = graded;
  a.spk = view(spk), a.syn = view(syn), a.mem = view(mem);
  a.saved_gates = at(saved_gates), a.saved_syn = at(saved_syn);
  a.winner = static_cast<int64_t*>(at(winner)), a.workspace = at(workspace);
  py::gil_scoped_release release;
  cpu::forward(a);
}

void cpu_backward(const Cell& cell, int threads, bool record, py::object x, py::object syn0,
                  py::object mem0, std::array<Address, 3> weights, Address threshold,
                  int64_t threshold_stride, double graded, Address levels, Address saved_gates,
                  Address saved_syn, Address winner, py::object noise, py::object grad_spk,
                  py::object grad_syn, py::object grad_mem, py::object grad_x, py::object grad_syn0,
                  py::object grad_mem0, Address grad_weight, Address grad_bias,
                  Address grad_threshold, Address workspace) {
  BackwardArgs a;
  a.cell = cell, a.threads = threads, a.record = record;
  a.x = view(x), a.syn0 = view(syn0), a.mem0 = view(mem0);
  a.weight = at(weights[0]), a.weight_mem = at(weights[1]), a.weight_x = at(weights[2]);
  a.levels = at(levels);
  a.threshold = at(threshold), a.threshold_stride = threshold_stride, a.graded = graded;
  a.saved_gates = at(saved_gates), a.saved_syn = at(saved_syn);
  a.winner = static_cast<const int64_t*>(at(winner)), a.noise = view(noise);
  a.grad_spk = view(grad_spk), a.grad_syn = view(grad_syn), a.grad_mem = view(grad_mem);
  a.grad_x = view(grad_x), a.grad_syn0 = view(grad_syn0), a.grad_mem0 = view(grad_mem0);
  a.grad_weight = at(grad_weight), a.grad_bias = at(grad_bias);
  a.grad_threshold = at(grad_threshold), a.workspace = at(workspace);
  py::gil_scoped_release release;
  cpu::backward(a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of snnlstm; use snnlstm.native.";
  m.def("build_info", [] {
    py::dict facts;
    for (const BuildFact& fact : kBuildInfo) facts[fact.name] = fact.value;
    return facts;
  });
  m.def("openmp_library", &openmp_library);
  m.def("prefer_huge_pages",
        [](Address memory, size_t bytes) { prefer_huge_pages(at(memory), bytes); });
  m.def("same_bytes", [](Address a, Address b, size_t count) {
    py::gil_scoped_release release;
    return std::memcmp(at(a), at(b), count) == 0;
  });

  m.def("density", [](Address x, int dtype, int64_t count) {
    return DType(dtype) == DType::float64 ? density(static_cast<const double*>(at(x)), count)
                                          : density(static_cast<const float*>(at(x)), count);
  });

  bind_cell(m);

  // CPU
  m.def("isa_names", &cpu::isa_names);
  m.def("isa_name", &cpu::isa_name);
  m.def("set_isa", &cpu::set_isa);
  m.def("cpu_choose",
        [](const Cell& cell, int algorithm, double density, int most_inputs, bool backward) {
          return cpu::choose(cell, cpu::Algorithm(algorithm), density, most_inputs, backward);
        });
  m.def("cpu_forward_workspace", &cpu::forward_workspace);
  m.def("cpu_backward_workspace", &cpu::backward_workspace, py::arg("cell"), py::arg("threads"),
        py::arg("weight") = true);
  m.def("cpu_padded_channels", [](int dtype, int64_t C) {
    Cell cell;
    cell.dtype = DType(dtype), cell.C = C;
    return cpu::padded_channels(cell);
  });
  m.def("cpu_packed_bytes",
        [](const Cell& cell, int form) { return cpu::packed_bytes(cell, cpu::Form(form)); });
  m.def("cpu_reads", [](const Cell& cell, int form, bool grad_x) {
    return cpu::reads(cell, cpu::Form(form), grad_x);
  });
  m.def("cpu_pack_weight",
        [](const Cell& cell, int form, int threads, Address weight, Address packed) {
          py::gil_scoped_release release;
          cpu::pack_weight(cell, cpu::Form(form), threads, at(weight), at(packed));
        });
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_evaluate",
        [](const std::string& function, int dtype, Address in, Address out, int64_t count) {
          cpu::evaluate(function, DType(dtype), at(in), at(out), count);
        });

#if SNNLSTM_WITH_CUDA
  bind_cuda(m);
#endif
}
