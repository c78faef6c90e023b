// What Python sees of the core. No logic: names, numbers and addresses, and the GIL released.
//
// A tensor of the caller's comes as a tuple (address, and strides of time, batch, channel, row and
// column, in elements), or None. Other memory comes as its address, or 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "build_info.h"
#include "cpu/api.h"
#include "openmp.h"
#include "pages.h"

namespace py = pybind11;
using namespace snnlstm;

namespace {

using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

View view(const py::object& from) {
  View v;
  if (from.is_none()) return v;
  const auto fields = from.cast<py::tuple>();
  if (fields.size() != 6) throw py::value_error("a tensor is (address, 5 strides)");
  v.data = at(fields[0].cast<Address>());
  for (int k = 0; k < 5; ++k) v.stride[k] = fields[k + 1].cast<int64_t>();
  return v;
}

// The part of `count` values that is not zero, from a sample spread over all of them.
template <class T>
double density(const T* x, int64_t count) {
  const int64_t step = count / 16384 | 1;  // odd, against the period of channels and columns
  int64_t seen = 0, nonzero = 0;
  for (int64_t k = 0; k < count; k += step, ++seen) nonzero += x[k] != T(0);
  return seen ? double(nonzero) / double(seen) : 1;
}

Cell make_cell(int dtype, int64_t T, int64_t N, int64_t Cin, int64_t C, int64_t H, int64_t W,
               std::pair<int, int> kernel, std::pair<int, int> stride, std::pair<int, int> dilation,
               int pool, std::pair<int, int> pool_size, int reset, int surrogate, double p0,
               double p1, bool inhibition, int num_levels) {
  Cell c;
  c.dtype = DType(dtype);
  c.T = T, c.N = N, c.Cin = Cin, c.C = C, c.H = H, c.W = W;
  std::tie(c.kernel_h, c.kernel_w) = kernel;
  std::tie(c.stride_h, c.stride_w) = stride;
  std::tie(c.dilation_h, c.dilation_w) = dilation;
  c.pool = Pool(pool);
  std::tie(c.pool_h, c.pool_w) = pool_size;
  c.reset = Reset(reset);
  c.surrogate = Surrogate(surrogate);
  c.surrogate_p0 = p0, c.surrogate_p1 = p1;
  c.inhibition = inhibition;
  c.num_levels = num_levels;
  return c;
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

  py::class_<Cell>(m, "Cell")
      .def(py::init(&make_cell), py::kw_only(), py::arg("dtype"), py::arg("T"), py::arg("N"),
           py::arg("Cin"), py::arg("C"), py::arg("H"), py::arg("W"), py::arg("kernel"),
           py::arg("stride"), py::arg("dilation"), py::arg("pool"), py::arg("pool_size"),
           py::arg("reset"), py::arg("surrogate"), py::arg("p0"), py::arg("p1"),
           py::arg("inhibition"), py::arg("num_levels"))
      .def_readonly("tile", &Cell::tile)
      .def_property_readonly("x_way", [](const Cell& cell) { return int(cell.x_way); });

  // CPU
  m.def("isa_names", &cpu::isa_names);
  m.def("isa_name", &cpu::isa_name);
  m.def("set_isa", &cpu::set_isa);
  m.def("cpu_choose", [](const Cell& cell, int algorithm, double density, bool tame) {
    return cpu::choose(cell, cpu::Algorithm(algorithm), density, tame);
  });
  m.def("cpu_forward_workspace", &cpu::forward_workspace);
  m.def("cpu_backward_workspace", &cpu::backward_workspace);
  m.def("cpu_padded_channels", [](int dtype, int64_t C) {
    Cell cell;
    cell.dtype = DType(dtype), cell.C = C;
    return cpu::padded_channels(cell);
  });
  m.def("cpu_packed_bytes",
        [](const Cell& cell, int form) { return cpu::packed_bytes(cell, cpu::Form(form)); });
  m.def("cpu_pack_weight", [](const Cell& cell, int form, Address weight, Address packed) {
    py::gil_scoped_release release;
    cpu::pack_weight(cell, cpu::Form(form), at(weight), at(packed));
  });
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_evaluate",
        [](const std::string& function, int dtype, Address in, Address out, int64_t count) {
          cpu::evaluate(function, DType(dtype), at(in), at(out), count);
        });
}
