// Python bindings of the CUDA backend (csrc/cuda/pass.h). Memory is passed by address. bindings.cpp
// includes this file if that backend is built, and the tests build it with the emulated kernels.
#pragma once

#include "bindings.h"
#include "cuda/pass.h"

namespace snnlstm::bindings {

// Refuses memory of our own, of which the kernels load 16 bytes at a time, at other addresses.
inline void aligned(const void* memory, const char* name) {
  if (reinterpret_cast<uintptr_t>(memory) % 16 != 0)
    throw py::value_error(std::string(name) + " must be aligned to 16 bytes");
}

// Refuses a call that lacks what the pass's kernels read, or has memory that they cannot use.
template <class Args>
void check_pass(const Args& a, const cuda::Pass& pass) {
  constexpr bool backward = std::is_same_v<Args, BackwardArgs>;
  if (pass.backward != backward) throw py::value_error("the pass has the other direction");
  if (a.lengths && !pass.cell.has_lengths)
    throw py::value_error("lengths must not be given: the pass was made without them");
  aligned(a.weight, "weight"), aligned(a.workspace, "workspace");
  aligned(a.saved_gates, "saved_gates"), aligned(a.saved_syn, "saved_syn");
  if (pass.workspace > 0) needs(a.workspace, "workspace");
  const bool cudnn = pass.algorithm == cuda::Algorithm::cudnn;
  if (!cudnn) needs(a.weight, "weight");
  if constexpr (backward) {
    aligned(a.d_gates, "d_gates"), aligned(a.mem_after, "mem_after");
    if (!cudnn) needs(a.mem0.data, "mem0");
    if (cudnn) {
      needs(a.d_gates, "d_gates");
      refuse_gradients(a);
    } else {
      refuse_d_gates(a);
    }
    if (a.d_gates == a.saved_gates)
      throw py::value_error(
          "d_gates must not be saved_gates, because a backward pass keeps saved_gates");
  } else if (cudnn) {
    needs(a.gate_sums.data, "gate_sums");
  } else {
    needs(a.x.data, "x");
  }
}

// matrix and algorithm: the numbers of cuda::Matrix and cuda::Algorithm.
template <class Pass>
Pass make_cuda_pass(Cell cell, const cuda::Device& device, int matrix, int algorithm, bool backward,
                    bool lengths) {
  cell.has_lengths = lengths;
  return Pass(cell, device, numbered<cuda::Matrix>("matrix", matrix, 4),
              numbered<cuda::Algorithm>("algorithm", algorithm, 3), backward);
}

template <class Args, class Pass>
void run_as(const Pass& pass, Address stream, const py::tuple& fields) {
  const auto a = pass_args<Args>(pass.cell, fields);
  check_pass(a, pass);
  py::gil_scoped_release release;
  pass.run(a, at(stream));
}

template <class Pass>
void run_pass(const Pass& pass, Address stream, const py::tuple& fields) {
  if (pass.backward)
    run_as<BackwardArgs>(pass, stream, fields);
  else
    run_as<ForwardArgs>(pass, stream, fields);
}

template <class Leaky, class Args>
void run_leaky(const cuda::Device& device, Address stream, const py::tuple& fields) {
  const auto a = leaky_args<Args>(fields);
  py::gil_scoped_release release;
  Leaky::run(device, a, at(stream));
}

// The tests have a Pass and a Leaky of their own, which check the memory of each call.
template <class Pass = cuda::Pass, class Leaky = cuda::Leaky>
void bind_cuda(py::module_& m) {
  py::class_<cuda::Device>(m, "CudaDevice", py::module_local())
      .def(py::init([](int compute_capability, int multiprocessors, int64_t shared_bytes) {
             counted("compute_capability", compute_capability, 1);
             counted("multiprocessors", multiprocessors, 1);
             counted("shared_bytes", shared_bytes, 48 * 1024);
             return cuda::Device{compute_capability, multiprocessors, shared_bytes};
           }),
           py::arg("compute_capability"), py::arg("multiprocessors"), py::arg("shared_bytes"))
      .def_readonly("compute_capability", &cuda::Device::compute_capability);

  m.def("cuda_padded_channels", [](int64_t C) {
    counted("C", C, 1);
    return cuda::padded_channels(C);
  });

  m.def("cuda_leaky_forward", &run_leaky<Leaky, LeakyForwardArgs>);
  m.def("cuda_leaky_backward", &run_leaky<Leaky, LeakyBackwardArgs>);

  py::class_<Pass>(m, "CudaPass", py::module_local())
      .def(py::init(&make_cuda_pass<Pass>), py::arg("cell"), py::arg("device"), py::arg("matrix"),
           py::arg("algorithm"), py::arg("backward"), py::arg("lengths") = false)
      .def_property_readonly("name", [](const Pass& p) { return p.name; })
      .def_property_readonly("algorithm", [](const Pass& p) { return int(p.algorithm); })
      // The convolution that torch computes: kernel, stride, dilation and padding without the taps
      // that only meet the border, and the number of such taps on either side.
      .def_property_readonly("geometry",
                             [](const Pass& p) {
                               const Cell c = within_image(p.cell);
                               using Pair = std::pair<int64_t, int64_t>;
                               return std::tuple<Pair, Pair, Pair, Pair, Pair>(
                                   {c.kernel_h, c.kernel_w}, {c.stride_h, c.stride_w},
                                   {c.dilation_h, c.dilation_w}, {c.pad_h(), c.pad_w()},
                                   {c.outer_h, c.outer_w});
                             })
      .def_property_readonly("reason_against", [](const Pass& p) { return p.reason_against; })
      .def_property_readonly("packed_bytes", [](const Pass& p) { return p.packed_bytes; })
      .def_property_readonly("workspace", [](const Pass& p) { return p.workspace; })
      .def(
          "pack",
          [](const Pass& p, Address weight, Address packed, Address stream) {
            needs(at(weight), "weight");
            if (p.packed_bytes > 0) needs(at(packed), "packed");
            aligned(at(packed), "packed");
            py::gil_scoped_release release;
            p.pack(at(weight), at(packed), at(stream));
          },
          py::arg("weight"), py::arg("packed"), py::arg("stream"))
      // values: doubles on the host
      .def(
          "store_levels",
          [](const Pass& p, Address values, Address levels, Address stream) {
            if (p.cell.num_levels > 0) {
              needs(at(values), "values");
              needs(at(levels), "levels");
            }
            py::gil_scoped_release release;
            p.store_levels(static_cast<const double*>(at(values)), at(levels), at(stream));
          },
          py::arg("values"), py::arg("levels"), py::arg("stream"))
      .def("run", &run_pass<Pass>);
}

}  // namespace snnlstm::bindings
