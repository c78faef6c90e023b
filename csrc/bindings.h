// What the bindings of both halves share: a cell, and the arguments of a call by name.
//
// A tensor of the caller's comes as a pair (address, strides of time, batch, channel, row and
// column, in elements), or None. Other memory comes as its address, or 0.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <unordered_map>

#include "args.h"

namespace snnlstm::bindings {

namespace py = pybind11;

using Address = uintptr_t;

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

inline Address address_of(const py::handle& number) {
  const Address address = PyLong_AsSize_t(number.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return address;
}

inline View view(const py::handle& from) {
  View v;
  if (from.is_none()) return v;
  PyObject* const pair = from.ptr();
  if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
    throw py::value_error("a tensor is (address, strides)");
  PyObject* const strides = PyTuple_GET_ITEM(pair, 1);
  if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != 5)
    throw py::value_error("a tensor has 5 strides");
  v.data = at(address_of(PyTuple_GET_ITEM(pair, 0)));
  for (int k = 0; k < 5; ++k) {
    v.stride[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, k));
    if (v.stride[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return v;
}

// Keyword arguments, of which each must be asked for.
class Keywords {
 public:
  explicit Keywords(const py::kwargs& given) : given_(given) {}

  View view(const char* name) {
    const py::handle found = find(name);
    return found ? bindings::view(found) : View();
  }
  void* address(const char* name) {
    const py::handle found = find(name);
    return found ? at(address_of(found)) : nullptr;
  }
  int64_t number(const char* name) {
    const py::handle found = find(name);
    return found ? found.cast<int64_t>() : 0;
  }
  // As the others, of what a call cannot do without.
  View needed_view(const char* name) { return needed(view(name), name); }
  void* needed_address(const char* name) { return needed(address(name), name); }

  void finish() const {
    if (seen_ != given_.size()) throw py::type_error("an argument that the kernels do not know");
  }

 private:
  py::handle find(const char* name) {
    const py::handle found = PyDict_GetItem(given_.ptr(), interned(name));
    if (found) ++seen_;
    return found;
  }
  // The name as Python has it, made once for each literal: its hash is most of the search.
  static PyObject* interned(const char* name) {
    static std::unordered_map<const char*, PyObject*> names;  // under the GIL
    PyObject*& found = names[name];
    if (!found) found = PyUnicode_InternFromString(name);
    return found;
  }
  static const void* data(const View& v) { return v.data; }
  static const void* data(const void* p) { return p; }
  template <class A>
  static A needed(A given, const char* name) {
    if (!data(given)) throw py::value_error(std::string(name) + " must be given");
    return given;
  }

  const py::kwargs& given_;
  size_t seen_ = 0;
};

// ---- arguments of a call, for both halves
// --------------------------------------------------------

template <class Args>
Args common_args(const Cell& cell, Keywords& k) {
  Args a;
  a.cell = cell;
  a.record = k.number("record") != 0;
  a.x = k.view("x"), a.syn0 = k.needed_view("syn0"), a.mem0 = k.view("mem0");
  a.weight = k.address("weight");
  a.weight_mem = k.address("weight_mem"), a.weight_x = k.address("weight_x");
  a.threshold = k.needed_address("threshold"), a.threshold_stride = k.number("threshold_stride");
  a.graded_factor = k.needed_address("graded"), a.levels = k.address("levels");
  if (cell.num_levels > 0 && !a.levels) throw py::value_error("levels must be given");
  a.saved_gates = k.address("saved_gates"), a.saved_syn = k.address("saved_syn");
  a.winner = static_cast<int64_t*>(k.address("winner"));
  a.workspace = k.address("workspace");
  return a;
}

inline ForwardArgs forward_args(const Cell& cell, const py::kwargs& given) {
  Keywords k(given);
  auto a = common_args<ForwardArgs>(cell, k);
  a.bias = k.address("bias");
  if (!a.mem0.data) throw py::value_error("mem0 must be given");
  a.spk = k.needed_view("spk"), a.syn = k.needed_view("syn"), a.mem = k.needed_view("mem");
  k.finish();
  return a;
}

inline BackwardArgs backward_args(const Cell& cell, const py::kwargs& given) {
  Keywords k(given);
  auto a = common_args<BackwardArgs>(cell, k);
  if (!a.saved_gates) throw py::value_error("saved_gates must be given");
  a.noise = k.view("noise");
  a.grad_spk = k.view("grad_spk"), a.grad_syn = k.view("grad_syn"), a.grad_mem = k.view("grad_mem");
  a.grad_x = k.view("grad_x");
  a.grad_syn0 = k.view("grad_syn0"), a.grad_mem0 = k.view("grad_mem0");
  a.grad_weight = k.address("grad_weight"), a.grad_bias = k.address("grad_bias");
  a.grad_threshold = k.address("grad_threshold");
  a.d_gates = k.address("d_gates"), a.mem_after = k.address("mem_after");
  k.finish();
  return a;
}

// ---- the cell
// ------------------------------------------------------------------------------------

template <class Enum>
Enum numbered(const char* name, int number, int count) {
  if (number < 0 || number >= count)
    throw py::value_error(std::string(name) + " must be less than " + std::to_string(count) +
                          ", got " + std::to_string(number));
  return Enum(number);
}

// Every size at least 1, but for the numbers of steps and images, which may be 0; and no tensor of
// the call beyond what 64 bits count.
inline void check_sizes(const Cell& c) {
  const int64_t sizes[] = {
      c.T + 1,      c.N + 1,      c.Cin,      c.C,        c.H,
      c.W,          c.kernel_h,   c.kernel_w, c.stride_h, c.stride_w,
      c.dilation_h, c.dilation_w, c.pool_h,   c.pool_w,   int64_t(c.num_levels) + 1};
  double bytes = 8 * 8;  // of a number, with room for padding
  for (const int64_t size : sizes)
    if (size < 1) throw py::value_error("a size of a cell must be positive");
  for (const int64_t size : {c.T, c.N, c.Cin + 4 * c.C + 64, c.H + c.kernel_h, c.W + c.kernel_w})
    bytes *= double(size);
  const double weight = 64. * double(c.C) * double(c.Cin + c.C) * c.kernel_h * c.kernel_w;
  if (bytes > double(std::numeric_limits<int64_t>::max() / 16) ||
      weight > double(std::numeric_limits<int64_t>::max() / 16))
    throw py::value_error("the sizes of a cell are too large");
}

inline Cell make_cell(int dtype, int64_t T, int64_t N, int64_t Cin, int64_t C, int64_t H, int64_t W,
                      std::pair<int, int> kernel, std::pair<int, int> stride,
                      std::pair<int, int> dilation, int pool, std::pair<int, int> pool_size,
                      int reset, int surrogate, double p0, double p1, bool inhibition,
                      int num_levels) {
  Cell c;
  c.dtype = numbered<DType>("dtype", dtype, 4);
  c.T = T, c.N = N, c.Cin = Cin, c.C = C, c.H = H, c.W = W;
  std::tie(c.kernel_h, c.kernel_w) = kernel;
  std::tie(c.stride_h, c.stride_w) = stride;
  std::tie(c.dilation_h, c.dilation_w) = dilation;
  c.pool = numbered<Pool>("pool", pool, 3);
  std::tie(c.pool_h, c.pool_w) = pool_size;
  c.reset = numbered<Reset>("reset", reset, 3);
  c.surrogate = numbered<Surrogate>("surrogate", surrogate, int(Surrogate::leaky) + 1);
  c.surrogate_p0 = p0, c.surrogate_p1 = p1;
  c.inhibition = inhibition;
  c.num_levels = num_levels;
  check_sizes(c);
  if (c.kernel_h % 2 == 0 || c.kernel_w % 2 == 0) throw py::value_error("kernel must be odd");
  if (c.Hp() < 1 || c.Wp() < 1) throw py::value_error("pool_size must fit into the state");
  return c;
}

inline void bind_cell(py::module_& m) {
  py::class_<Cell>(m, "Cell", py::module_local())
      .def(py::init(&make_cell), py::kw_only(), py::arg("dtype"), py::arg("T"), py::arg("N"),
           py::arg("Cin"), py::arg("C"), py::arg("H"), py::arg("W"), py::arg("kernel"),
           py::arg("stride"), py::arg("dilation"), py::arg("pool"), py::arg("pool_size"),
           py::arg("reset"), py::arg("surrogate"), py::arg("p0"), py::arg("p1"),
           py::arg("inhibition"), py::arg("num_levels"));
}

}  // namespace snnlstm::bindings
