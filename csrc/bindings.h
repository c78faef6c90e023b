// What the bindings of both halves share: a cell, and memory by its address.
//
// A tensor of the caller's comes as a tuple (address, and strides of time, batch, channel, row and
// column, in elements), or None. Other memory comes as its address, or 0.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "args.h"

namespace snnlstm::bindings {

namespace py = pybind11;

using Address = uintptr_t;

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

inline View view(const py::handle& from) {
  View v;
  if (from.is_none()) return v;
  const auto fields = from.cast<py::tuple>();
  if (fields.size() != 6) throw py::value_error("a tensor is (address, 5 strides)");
  v.data = at(fields[0].cast<Address>());
  for (int k = 0; k < 5; ++k) v.stride[k] = fields[k + 1].cast<int64_t>();
  return v;
}

inline Cell make_cell(int dtype, int64_t T, int64_t N, int64_t Cin, int64_t C, int64_t H, int64_t W,
                      std::pair<int, int> kernel, std::pair<int, int> stride,
                      std::pair<int, int> dilation, int pool, std::pair<int, int> pool_size,
                      int reset, int surrogate, double p0, double p1, bool inhibition,
                      int num_levels) {
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

inline void bind_cell(py::module_& m) {
  py::class_<Cell>(m, "Cell", py::module_local())
      .def(py::init(&make_cell), py::kw_only(), py::arg("dtype"), py::arg("T"), py::arg("N"),
           py::arg("Cin"), py::arg("C"), py::arg("H"), py::arg("W"), py::arg("kernel"),
           py::arg("stride"), py::arg("dilation"), py::arg("pool"), py::arg("pool_size"),
           py::arg("reset"), py::arg("surrogate"), py::arg("p0"), py::arg("p1"),
           py::arg("inhibition"), py::arg("num_levels"))
      .def_property_readonly("tile", [](const Cell& c) { return std::pair(c.tile_h, c.tile_w); })
      .def_property_readonly("kernel",
                             [](const Cell& c) { return std::pair(c.kernel_h, c.kernel_w); })
      .def_property_readonly("x_way", [](const Cell& cell) { return int(cell.x_way); });
}

}  // namespace snnlstm::bindings
