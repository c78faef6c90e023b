// The bindings of both backends use this file to read a cell and the arguments of a call. These
// come as one tuple, in the order of the structs' fields (args.h).
//
// A tensor of the caller comes as a pair (address, strides of time, batch, channel, row and column,
// in elements) or None. Other memory comes as its address or 0.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "args.h"

namespace snnlstm::bindings {

namespace py = pybind11;

using Address = uintptr_t;

constexpr int64_t kMostElements = int64_t(1) << 48;  // of an image or weight; no memory holds more

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

// Refuses a null pointer.
inline void needs(const void* address, const char* name) {
  if (!address) throw py::value_error(std::string(name) + " must be given");
}

// Refuses a number of elements or bytes that no memory can hold.
inline void counted(const char* name, int64_t count, int64_t least = 0) {
  if (count < least || count > kMostElements)
    throw py::value_error(std::string(name) + " must lie between " + std::to_string(least) +
                          " and 2^48");
}

// Returns a number from Python, or throws if its conversion has failed.
template <class N>
N converted(N number) {
  if (number == N(-1) && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

inline Address address_of(const py::handle& number) {
  return converted(PyLong_AsSize_t(number.ptr()));
}

inline View view(const py::handle& from) {
  View v;
  if (from.is_none()) return v;
  PyObject* const pair = from.ptr();
  if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
    throw py::value_error("a tensor must be (address, strides)");
  PyObject* const strides = PyTuple_GET_ITEM(pair, 1);
  if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != 5)
    throw py::value_error("a tensor must have 5 strides");
  v.data = at(address_of(PyTuple_GET_ITEM(pair, 0)));
  for (int k = 0; k < 5; ++k) {
    v.stride[k] = converted(PyLong_AsLongLong(PyTuple_GET_ITEM(strides, k)));
    counted("a stride", v.stride[k]);
  }
  return v;
}

// Checks the length of a call's tuple and reads it field by field.
class Fields {
 public:
  Fields(const py::tuple& fields, Py_ssize_t count) : fields_(fields.ptr()) {
    const Py_ssize_t size = PyTuple_GET_SIZE(fields_);
    if (size != count)
      throw py::value_error("a call of this pass takes " + std::to_string(count) + " fields, got " +
                            std::to_string(size));
  }

  template <class... All>
  void read(All&... fields) {
    (one(fields), ...);
  }

 private:
  py::handle next() { return PyTuple_GET_ITEM(fields_, used_++); }
  void one(View& v) { v = view(next()); }
  template <class T>
  void one(T*& address) {
    address = static_cast<T*>(at(address_of(next())));
  }
  void one(int64_t& number) { number = converted(PyLong_AsLongLong(next().ptr())); }
  void one(double& number) { number = converted(PyFloat_AsDouble(next().ptr())); }
  void one(LeakyParameter& p) {
    read(p.values, p.count, p.stride);
    counted("count", p.count, 1), counted("stride", p.stride, 1);
  }
  void one(bool& flag) {
    int64_t number;
    one(number);
    flag = number != 0;
  }

  PyObject* fields_;
  Py_ssize_t used_ = 0;
};

// ---- arguments of a call, for both backends ----

constexpr Py_ssize_t kPassFields = 17;

// Reads a call of either pass. Refuses it if an argument that all kernels read is missing.
template <class Args>
Args pass_args(const Cell& cell, const py::tuple& fields) {
  constexpr bool forward = std::is_same_v<Args, ForwardArgs>;
  Args a;
  a.cell = cell;
  Fields f(fields, kPassFields + (forward ? 5 : 11));
  f.read(a.workspace, a.weight, a.weight_mem, a.weight_x, a.levels, a.order, a.x, a.syn0, a.mem0,
         a.threshold, a.threshold_stride, a.graded_factor, a.lengths, a.record, a.saved_gates,
         a.saved_syn, a.argmax);
  needs(a.syn0.data, "syn0");
  if (a.threshold_stride != 0 && a.threshold_stride != 1)
    throw py::value_error("threshold_stride must be 0 or 1");
  if (cell.spiking) needs(a.threshold, "threshold"), needs(a.graded_factor, "graded");
  if (cell.num_levels > 0) needs(a.levels, "levels");
  if (a.saved_gates && cell.T > 1) needs(a.saved_syn, "saved_syn");
  if constexpr (forward) {
    f.read(a.bias, a.gate_sums, a.spk, a.syn, a.mem);
    needs(a.mem0.data, "mem0"), needs(a.syn.data, "syn"), needs(a.mem.data, "mem");
    if (cell.spiking || cell.T > 1) needs(a.spk.data, "spk");
    if (a.saved_gates && cell.pool == Pool::max) needs(a.argmax, "argmax");
  } else {
    f.read(a.grad_spk, a.grad_syn, a.grad_mem, a.grad_x, a.grad_syn0, a.grad_mem0, a.grad_weight,
           a.grad_bias, a.grad_threshold, a.d_gates, a.mem_after);
    needs(a.saved_gates, "saved_gates");
    if (a.grad_spk.data && cell.pool == Pool::max) needs(a.argmax, "argmax");
    if (a.grad_weight) needs(a.x.data, "x");
  }
  return a;
}

// These refuse memory for results that only other algorithms compute.
inline void refuse_gradients(const BackwardArgs& a) {
  if (a.grad_weight || a.grad_bias)
    throw py::value_error("grad_weight and grad_bias must not be given: torch computes them");
}
inline void refuse_d_gates(const BackwardArgs& a) {
  if (a.d_gates || a.mem_after)
    throw py::value_error("d_gates and mem_after must not be given: the kernels keep their own");
}

// ---- the cell ----

constexpr int kDTypes = 4, kResets = 3;

template <class Enum>
Enum numbered(const char* name, int64_t number, int count) {
  if (number < 0 || number >= count)
    throw py::value_error(std::string(name) + " must be less than " + std::to_string(count) +
                          ", got " + std::to_string(number));
  return Enum(number);
}

inline Surrogate surrogate_of(int64_t number) {
  const auto kind = numbered<Surrogate>("surrogate", number, kSurrogates);
  if (kind == Surrogate::stochastic)
    throw py::value_error("surrogate must not be stochastic: the kernels draw no numbers");
  return kind;
}

// Refuses sizes below 1, and products of sizes that the kernels' integers cannot hold. The caller
// keeps calls without a step or an image away: no kernel would write their results.
inline void check_sizes(const Cell& c) {
  for (const int64_t size : {c.Cin, c.C, c.H, c.W, int64_t(c.kernel_h), int64_t(c.kernel_w),
                             int64_t(c.stride_h), int64_t(c.stride_w), int64_t(c.dilation_h),
                             int64_t(c.dilation_w), int64_t(c.pool_h), int64_t(c.pool_w)})
    if (size < 1) throw py::value_error("every size of a cell must be positive");
  if (c.T < 1 || c.N < 1) throw py::value_error("T and N must be at least 1");
  if (c.num_levels < 0) throw py::value_error("num_levels must not be negative");
  const double taps = double(c.kernel_h) * c.kernel_w;
  const double channels = double(c.Cin) + 4. * double(c.C);
  // Bounds of the rows and columns: the image, a border no wider than the image, and padding.
  const double height = 3. * double(c.H) + 64, width = 3. * double(c.W) + 64;
  const double image = (channels + 64) * height * width;
  const double weight = (channels + 64) * channels * taps;
  const double images = double(c.T) * double(c.N) * image;
  // The gradient of x has a list of taps for each offset within a stride.
  const double places =
      double(std::min<int64_t>(c.stride_h, c.H)) * double(std::min<int64_t>(c.stride_w, c.W));
  if (std::max({image, weight, images / 64}) > double(kMostElements) ||
      std::max({height, width, channels}) > double(1 << 30) || taps * places > 1 << 22)
    throw py::value_error("the sizes of a cell are too large");
}

inline Cell make_cell(int dtype, int64_t T, int64_t N, int64_t Cin, int64_t C, int64_t H, int64_t W,
                      std::pair<int, int> kernel, std::pair<int, int> stride,
                      std::pair<int, int> dilation, int pool, std::pair<int, int> pool_size,
                      int reset, int surrogate, double p0, double p1, int num_levels,
                      bool spiking) {
  Cell c;
  c.dtype = numbered<DType>("dtype", dtype, kDTypes);
  c.T = T;
  c.N = N;
  c.Cin = Cin;
  c.C = C;
  c.H = H;
  c.W = W;
  std::tie(c.kernel_h, c.kernel_w) = kernel;
  std::tie(c.stride_h, c.stride_w) = stride;
  std::tie(c.dilation_h, c.dilation_w) = dilation;
  c.pool = numbered<Pool>("pool", pool, 3);
  std::tie(c.pool_h, c.pool_w) = pool_size;
  c.reset = numbered<Reset>("reset", reset, kResets);
  c.surrogate = surrogate_of(surrogate);
  c.surrogate_p0 = p0;
  c.surrogate_p1 = p1;
  c.num_levels = num_levels;
  c.spiking = spiking;
  check_sizes(c);
  if (c.kernel_h % 2 == 0 || c.kernel_w % 2 == 0) throw py::value_error("kernel must be odd");
  if (c.pool == Pool::none && c.pool_h * c.pool_w != 1)
    throw py::value_error("pool_size must be (1, 1) without pooling");
  if (c.Hp() < 1 || c.Wp() < 1) throw py::value_error("pool_size must fit into the state");
  if (!spiking && (c.reset != Reset::none || c.pool != Pool::none || num_levels > 0 ||
                   c.surrogate != Surrogate::none))
    throw py::value_error("spiking=False excludes reset, pool, surrogate and levels");
  return c;
}

inline void bind_cell(py::module_& m) {
  py::class_<Cell>(m, "Cell", py::module_local())
      .def(py::init(&make_cell), py::kw_only(), py::arg("dtype"), py::arg("T"), py::arg("N"),
           py::arg("Cin"), py::arg("C"), py::arg("H"), py::arg("W"), py::arg("kernel"),
           py::arg("stride"), py::arg("dilation"), py::arg("pool"), py::arg("pool_size"),
           py::arg("reset"), py::arg("surrogate"), py::arg("p0"), py::arg("p1"),
           py::arg("num_levels"), py::arg("spiking") = true);
}

// ---- snntorch.Leaky, for both backends ----

constexpr Py_ssize_t kLeakyFields = 15;

template <class Args>
Args leaky_args(const py::tuple& fields) {
  constexpr bool backward = std::is_same_v<Args, LeakyBackwardArgs>;
  Args a;
  Fields f(fields, kLeakyFields + (backward ? 7 : 4));
  int64_t dtype, reset, surrogate;
  f.read(dtype, reset, surrogate, a.surrogate_p0, a.surrogate_p1, a.T, a.n, a.beta, a.threshold,
         a.graded_factor, a.mem0);
  a.dtype = numbered<DType>("dtype", dtype, kDTypes);
  a.reset = numbered<Reset>("reset", reset, kResets);
  a.surrogate = surrogate_of(surrogate);
  counted("T", a.T, 1), counted("n", a.n);
  if (double(a.T) * double(a.n) > double(kMostElements))
    throw py::value_error("T * n must lie below 2^48");
  needs(a.beta.values, "beta"), needs(a.threshold.values, "threshold");
  needs(a.graded_factor, "graded");
  if constexpr (backward)
    f.read(a.mem, a.grad_spk, a.grad_mem, a.grad_x, a.grad_mem0, a.grad_beta, a.grad_threshold);
  else
    f.read(a.x, a.spk, a.mem, a.record);
  if (a.n == 0) return a;
  needs(a.mem, "mem");
  if constexpr (backward) {
    if (a.needs_before()) needs(a.mem0, "mem0");
    if (a.T > 1) needs(a.grad_mem0, "grad_mem0");
  } else {
    needs(a.mem0, "mem0"), needs(a.x, "x"), needs(a.spk, "spk");
  }
  return a;
}

// ---- max_pool2d and avg_pool2d ----

// Reads a call of either pass. Refuses sizes with which a window would lie outside of the image.
template <class Args>
Args pool_args(const py::tuple& fields) {
  Args a;
  Fields f(fields, 20);
  int64_t dtype, pool;
  f.read(dtype, pool, a.channels_last, a.N, a.C, a.H, a.W, a.Ho, a.Wo, a.kernel_h, a.kernel_w,
         a.stride_h, a.stride_w, a.padding_h, a.padding_w, a.counts_padding, a.divisor);
  a.dtype = numbered<DType>("dtype", dtype, 2);
  a.pool = pool == int(Pool::avg) ? Pool::avg : Pool::max;
  counted("N", a.N);
  for (const int64_t size : {a.C, a.H, a.W, a.Ho, a.Wo}) counted("a size of an image", size, 1);
  if (std::max(double(a.H) * double(a.W), double(a.Ho) * double(a.Wo)) * double(a.N) * double(a.C) >
      double(kMostElements))
    throw py::value_error("the sizes of a pool are too large");
  const auto check = [](int64_t size, int64_t outputs, int64_t kernel, int64_t stride,
                        int64_t padding) {
    const int64_t most = int64_t(1) << 30;
    if (kernel < 1 || stride < 1 || padding < 0 || std::max(kernel, stride) > most ||
        padding > kernel / 2 || (outputs - 1) * double(stride) >= double(size + padding))
      throw py::value_error("each window must have a pixel of the image");
  };
  check(a.H, a.Ho, a.kernel_h, a.stride_h, a.padding_h);
  check(a.W, a.Wo, a.kernel_w, a.stride_w, a.padding_w);
  if (a.kernel_h * a.kernel_w > INT32_MAX) throw py::value_error("a window is too large");
  if (a.N == 0) return a;
  if constexpr (std::is_same_v<Args, PoolForwardArgs>) {
    f.read(a.x, a.y, a.places);
    needs(a.x, "x"), needs(a.y, "y");
  } else {
    f.read(a.grad_y, a.places, a.grad_x);
    needs(a.grad_y, "grad_y"), needs(a.grad_x, "grad_x");
    if (a.pool == Pool::max) needs(a.places, "places");
  }
  return a;
}

// ---- batch norm in training ----

template <class Args>
Args batch_norm_args(const py::tuple& fields) {
  Args a;
  constexpr bool backward = std::is_same_v<Args, BatchNormBackwardArgs>;
  Fields f(fields, 11 + (backward ? 4 : 6));
  int64_t dtype;
  f.read(dtype, a.T, a.N, a.C, a.S, a.x_step, a.x, a.weight, a.means, a.inverses, a.workspace);
  a.dtype = numbered<DType>("dtype", dtype, 2);
  for (const int64_t size : {a.T, a.N, a.C, a.S}) counted("a size", size, 1);
  counted("x_step", a.x_step);
  if (double(a.T) * double(a.N) * double(a.C) * double(a.S) > double(kMostElements))
    throw py::value_error("T * N * C * S must lie below 2^48");
  needs(a.x, "x"), needs(a.means, "means"), needs(a.inverses, "inverses");
  needs(a.workspace, "workspace");
  if constexpr (backward) {
    f.read(a.grad_y, a.grad_x, a.grad_weight, a.grad_bias);
    needs(a.grad_y, "grad_y");
  } else {
    f.read(a.bias, a.running_mean, a.running_var, a.momentum, a.eps, a.y);
    needs(a.y, "y");
  }
  return a;
}

// ---- linear layers of spikes ----

// Refuses sizes that the kernels' integers cannot hold.
inline void check_linear(int64_t M, int64_t K, int64_t Out) {
  counted("M", M, 1), counted("Out", Out, 1);
  if (K < 1 || K > UINT16_MAX) throw py::value_error("K must lie between 1 and 65535");
  if (double(K) * double(Out) > double(kMostElements) ||
      double(M) * double(std::max(K, Out)) > double(kMostElements))
    throw py::value_error("the sizes of a linear layer are too large");
}

// Reads the fields of LinearArgs, and those that follow them.
template <class Args, class... More>
Args linear_args(const py::tuple& fields, More Args::*... more) {
  Args a;
  Fields f(fields, 7 + sizeof...(more));
  f.read(a.M, a.K, a.Out, a.row, a.x, a.nonzeros, a.workspace, a.*more...);
  check_linear(a.M, a.K, a.Out), counted("row", a.row, a.K);
  if (double(a.M) * double(a.row) > double(kMostElements))
    throw py::value_error("the rows of x lie too far apart");
  return a;
}

}  // namespace snnlstm::bindings
