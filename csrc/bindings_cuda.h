// The CUDA half for Python: csrc/cuda/api.h over addresses. bindings.cpp includes this file if that
// half is built; the tests build it on top of the emulated kernels.
#pragma once

#include "bindings.h"
#include "cuda/api.h"

namespace snnlstm::bindings {

// The functions that the bindings call; the tests put checks in between.
struct CudaCalls {
  decltype(&cuda::pack_weight) pack_weight = &cuda::pack_weight;
  decltype(&cuda::store_levels) store_levels = &cuda::store_levels;
  decltype(&cuda::forward) forward = &cuda::forward;
  decltype(&cuda::backward) backward = &cuda::backward;
  decltype(&cuda::pointwise_forward) pointwise_forward = &cuda::pointwise_forward;
  decltype(&cuda::pointwise_backward) pointwise_backward = &cuda::pointwise_backward;
};

// Memory that no tensor of the caller's lies in. The kernels load 16 bytes of it at a time.
struct Own {
  const char* name;
  const void* memory;
};
inline void aligned(std::initializer_list<Own> all) {
  for (const Own& own : all)
    if (reinterpret_cast<uintptr_t>(own.memory) % 16 != 0)
      throw py::value_error(std::string(own.name) + " must be aligned to 16 bytes");
}

// bytes(): the size of the call's workspace.
template <class F>
void needs_workspace(const void* workspace, F&& bytes) {
  aligned({{"workspace", workspace}});
  if (!workspace && bytes() > 0) needs(workspace, "workspace");
}

template <class Args>
void own_memory(const Args& a) {
  aligned({{"weight", a.weight}, {"saved_gates", a.saved_gates}, {"saved_syn", a.saved_syn}});
  if constexpr (std::is_same_v<Args, BackwardArgs>) {
    aligned({{"d_gates", a.d_gates}, {"mem_after", a.mem_after}});
    if (a.d_gates == a.saved_gates)
      throw py::value_error(
          "d_gates must not be saved_gates: nothing that was saved is written to");
  }
}

inline cuda::Target on(const cuda::Target& target, Address stream) {
  cuda::Target there = target;
  there.stream = at(stream);
  return there;
}

inline void bind_cuda(py::module_& m, const CudaCalls& calls = {}) {
  using cuda::Target;
  py::class_<Target>(m, "CudaTarget", py::module_local())
      // matrix and algorithm: the numbers of cuda::Matrix and cuda::Algorithm
      .def("wanting", [](const Target& target, int matrix, int algorithm) {
        Target with = target;
        with.matrix = numbered<cuda::Matrix>("matrix", matrix, 5);
        numbered<cuda::Algorithm>("algorithm", algorithm, 7);
        if (algorithm == 4) throw py::value_error("algorithm must not be 4");
        if (algorithm != 0) with.algorithm = cuda::Algorithm(algorithm);
        return with;
      });

  m.def("cuda_target", &cuda::current_target);
  m.def("cuda_full_precision", [](const Target& t) { return int(cuda::full_precision(t)); });
  m.def("cuda_choose",
        [](const Cell& cell, const Target& t) { return int(cuda::choose_algorithm(cell, t)); });
  m.def("cuda_reason_against",
        py::overload_cast<const Cell&, const Target&>(&cuda::reason_against));
  m.def("cuda_algorithm_name", &cuda::algorithm_name);
  m.def("cuda_ways", [](const Cell& cell, const Target& t, bool backward) {
    py::list ways;
    for (const cuda::Way& way : cuda::ways(cell, t, backward))
      ways.append(py::make_tuple(way.name, way.target));
    return ways;
  });
  m.def("cuda_padded_channels", [](int64_t C) {
    counted("C", C, 1);
    return cuda::padded_channels(C);
  });
  m.def("cuda_packed_bytes", [](const Cell& cell, const Target& t, bool backward) {
    const cuda::Sizes sizes = cuda::sizes(cell, t);
    return backward ? sizes.packed_backward : sizes.packed_forward;
  });
  m.def("cuda_workspace", [](const Cell& cell, const Target& t, bool backward) {
    const cuda::Sizes sizes = cuda::sizes(cell, t);
    return backward ? sizes.backward_workspace : sizes.forward_workspace;
  });
  m.def("cuda_data_workspace",
        [](const Cell& cell, const Target& t) { return cuda::sizes(cell, t).data_workspace; });
  m.def("cuda_pointwise_workspace", &cuda::pointwise_workspace);

  m.def("cuda_pack_weight", [calls](const Cell& cell, const Target& t, Address stream,
                                    Address weight, bool backward, Address packed) {
    needs(at(weight), "weight");
    needs(at(packed), "packed");
    aligned({{"packed", at(packed)}});
    py::gil_scoped_release release;
    calls.pack_weight(cell, at(weight), backward, at(packed), on(t, stream));
  });
  // values: doubles on the host
  m.def("cuda_store_levels", [calls](const Cell& cell, const Target& t, Address stream,
                                     Address values, Address levels) {
    if (cell.num_levels > 0) {
      needs(at(values), "values");
      needs(at(levels), "levels");
    }
    py::gil_scoped_release release;
    calls.store_levels(cell, static_cast<const double*>(at(values)), at(levels), on(t, stream));
  });
  m.def("cuda_forward",
        [calls](const Cell& cell, const Target& t, Address stream, const py::kwargs& given) {
          const ForwardArgs args = forward_args(cell, given);
          own_memory(args);
          needs(args.x.data, "x");
          needs(args.weight, "weight");
          needs_workspace(args.workspace, [&] { return cuda::sizes(cell, t).forward_workspace; });
          py::gil_scoped_release release;
          calls.forward(args, on(t, stream));
        });
  m.def("cuda_backward",
        [calls](const Cell& cell, const Target& t, Address stream, const py::kwargs& given) {
          const BackwardArgs args = backward_args(cell, given);
          own_memory(args);
          needs(args.weight, "weight");
          needs(args.mem0.data, "mem0");
          needs_workspace(args.workspace, [&] {
            const bool of_data = args.d_gates && !args.grad_weight && !args.grad_bias;
            const cuda::Sizes sizes = cuda::sizes(cell, t);
            return of_data ? sizes.data_workspace : sizes.backward_workspace;
          });
          py::gil_scoped_release release;
          calls.backward(args, on(t, stream));
        });
  m.def("cuda_pointwise_forward", [calls](const Cell& cell, const Target& t, Address stream,
                                          const py::object& gate_sums, const py::kwargs& given) {
    const ForwardArgs args = forward_args(cell, given);
    own_memory(args);
    const View sums = view(gate_sums);
    needs(sums.data, "gate_sums");
    if (cell.T != 1) throw py::value_error("T must be 1");
    py::gil_scoped_release release;
    calls.pointwise_forward(args, sums, on(t, stream));
  });
  m.def("cuda_pointwise_backward",
        [calls](const Cell& cell, const Target& t, Address stream, const py::kwargs& given) {
          const BackwardArgs args = backward_args(cell, given);
          own_memory(args);
          needs(args.d_gates, "d_gates");
          if (cell.T != 1) throw py::value_error("T must be 1");
          needs_workspace(args.workspace, [&] { return cuda::pointwise_workspace(cell, t); });
          py::gil_scoped_release release;
          calls.pointwise_backward(args, on(t, stream));
        });
}

}  // namespace snnlstm::bindings
