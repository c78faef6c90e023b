// Python bindings of the CPU backend (csrc/cpu/api.h). Memory is passed by address.
#pragma once

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#include "bindings.h"
#include "cpu/api.h"
#include "platform.h"

namespace snnlstm::bindings {

constexpr int kMostThreads = 1 << 14;  // workspaces grow with this number

inline cpu::Pass make_cpu_pass(const Cell& cell, int algorithm, double density, int max_tile_inputs,
                               int threads, bool backward, bool grad_x, bool grad_weight) {
  if (cell.dtype != DType::float32 && cell.dtype != DType::float64)
    throw py::value_error("the CPU kernels compute in float32 and float64");
  if (threads < 1 || threads > kMostThreads)
    throw py::value_error("threads must lie between 1 and " + std::to_string(kMostThreads));
  if (!(density >= 0 && density <= 1)) throw py::value_error("density must lie between 0 and 1");
  const auto number = numbered<CpuAlgorithm>("algorithm", algorithm, 3);
  return {cpu::choose(cell, number, density, max_tile_inputs, backward),
          backward,
          grad_x,
          grad_weight,
          cpu::kernels(),
          threads};
}

// Calls f(chunk, begin, end) for chunks of `count` values or bytes on all of torch's threads, until
// f returns false. Returns whether every call returned true.
template <class F>
bool each_chunk(int64_t count, int64_t chunk, F&& f) {
  int64_t next = 0;
  bool stop = false;
  const int64_t threads = std::min<int64_t>(most_threads(), count / (4 * chunk));
  run_team(int(std::max<int64_t>(threads, 1)), [&](int) {
    for (int64_t k; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) * chunk < count;)
      if (__atomic_load_n(&stop, __ATOMIC_RELAXED) ||
          !f(k, k * chunk, std::min(count, (k + 1) * chunk)))
        return __atomic_store_n(&stop, true, __ATOMIC_RELAXED);
  });
  return !stop;
}

template <class T>
double squares_of(Address weight, int64_t count) {
  const T* from = static_cast<const T*>(at(weight));
  constexpr int64_t kChunk = 1 << 14, kLanes = 16;
  std::vector<double> sums(size_t(count / kChunk + 1));
  each_chunk(count, kChunk, [&](int64_t chunk, int64_t begin, int64_t end) {
    T lanes[kLanes] = {};
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += from[k + lane] * from[k + lane];
    for (; k < end; ++k) lanes[0] += from[k] * from[k];
    for (const T lane : lanes) sums[size_t(chunk)] += double(lane);
    return true;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.);  // the order does not depend on the threads
}

inline double sum_of_squares(Address weight, int dtype, int64_t count) {
  counted("count", count);
  if (count == 0) return 0;
  needs(at(weight), "weight");
  numbered<DType>("dtype", dtype, 2);
  py::gil_scoped_release release;
  return DType(dtype) == DType::float64 ? squares_of<double>(weight, count)
                                        : squares_of<float>(weight, count);
}

// Says whether the bytes at `tensor` equal those at `copy`.
inline bool same_bytes(Address tensor, Address copy, int64_t bytes) {
  counted("bytes", bytes);
  if (bytes == 0) return true;
  needs(at(tensor), "tensor");
  needs(at(copy), "copy");
  const auto equal = [&](int64_t, int64_t begin, int64_t end) {
    return std::memcmp(at(tensor + begin), at(copy + begin), size_t(end - begin)) == 0;
  };
  if (bytes < (1 << 16)) return equal(0, 0, bytes);
  py::gil_scoped_release release;
  return each_chunk(bytes, 1 << 17, equal);
}

// Returns x's density in hundredths, and its largest magnitude, which is at least 1. Both come from
// all values if x has at most four channels, as images have, otherwise from some 16,000, which are
// spread over all images. Padded images do not count.
inline py::tuple facts(const Cell& cell, const py::handle& from, Address lengths) {
  const View x = view(from);
  needs(x.data, "x");
  const auto* steps = static_cast<const int64_t*>(at(lengths));
  const int64_t size = cell.Cin * cell.H * cell.W, images = cell.T * cell.N;
  const int64_t running = steps ? std::accumulate(steps, steps + cell.N, int64_t(0)) : images;
  const bool whole = cell.Cin <= 4;
  // An odd distance shares no period with even numbers of channels and columns.
  const int64_t distance = whole ? 1 : running * size / 16384 | 1;
  cpu::Seen seen;
  if (!whole || images * size < 1 << 17) {
    seen = cpu::kernels().look_at(cell, x, steps, 0, images, distance);
  } else {
    py::gil_scoped_release release;
    std::mutex mutex;
    each_chunk(images, (1 << 15) / size + 1, [&](int64_t, int64_t begin, int64_t end) {
      const cpu::Seen some = cpu::kernels().look_at(cell, x, steps, begin, end, distance);
      const std::lock_guard<std::mutex> lock(mutex);
      seen.values += some.values;
      seen.nonzero += some.nonzero;
      seen.largest = std::max(seen.largest, some.largest);
      return true;
    });
  }
  // One or two channels gain nothing from lists of nonzeros.
  const bool counts = cell.Cin > 2 && seen.values > 0;
  const double density = counts ? double(seen.nonzero) / double(seen.values) : 1;
  return py::make_tuple(int(100 * density + 0.5), seen.largest);
}

// Returns the layouts of the weight that a pass reads, each as (number, name, bytes). Layouts with
// the same number differ by name.
inline py::list layouts(const cpu::Pass& pass) {
  py::list layouts;
  const int first = int(pass.backward ? cpu::Form::backward : cpu::Form::forward);
  for (int number = first; number < first + 3; ++number) {
    const auto form = cpu::Form(number);
    if (!cpu::reads(pass.cell, form, pass.grad_x)) continue;
    layouts.append(py::make_tuple(number, cpu::form_name(pass.cell, form),
                                  pass.kernels.packed_bytes(pass.cell, form)));
  }
  return layouts;
}

inline void pack(const cpu::Pass& pass, int number, Address weight, Address packed) {
  needs(at(weight), "weight");
  needs(at(packed), "packed");
  const auto form = numbered<cpu::Form>("form", number, 6);
  if ((form >= cpu::Form::backward) != pass.backward || !cpu::reads(pass.cell, form, true))
    throw py::value_error("form must be one that the pass reads");
  py::gil_scoped_release release;
  pass.kernels.pack_weight(pass.cell, form, pass.threads, at(weight), at(packed));
}

// Runs a call. Refuses it if an argument that the kernels read is missing.
template <class Args>
void run_as(const cpu::Pass& pass, const py::tuple& fields) {
  constexpr bool forward = std::is_same_v<Args, ForwardArgs>;
  auto a = pass_args<Args>(pass.cell, fields);
  a.threads = pass.threads;
  needs(a.workspace, "workspace");
  bool grad_x = false;
  if constexpr (forward) {
    needs(a.x.data, "x");
    if (a.saved_gates) needs(a.saved_syn, "saved_syn");
  } else {
    grad_x = a.grad_x.data != nullptr;
    needs(a.mem0.data, "mem0"), needs(a.saved_syn, "saved_syn"), refuse_d_gates(a);
  }
  const void* const weights[] = {a.weight, a.weight_mem, a.weight_x};
  const char* const names[] = {"weight", "weight_mem", "weight_x"};
  const int first = int(forward ? cpu::Form::forward : cpu::Form::backward);
  for (int k = 0; k < 3; ++k)
    if (cpu::reads(a.cell, cpu::Form(first + k), grad_x)) needs(weights[k], names[k]);
  py::gil_scoped_release release;
  if constexpr (forward)
    pass.kernels.forward(a);
  else
    pass.kernels.backward(a);
}

inline void run_pass(const cpu::Pass& pass, const py::tuple& fields) {
  if (pass.backward)
    run_as<BackwardArgs>(pass, fields);
  else
    run_as<ForwardArgs>(pass, fields);
}

template <class Args>
void run_leaky(const py::tuple& fields) {
  auto a = leaky_args<Args>(fields);
  a.threads = most_threads();
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Args, LeakyForwardArgs>)
    cpu::kernels().leaky_forward(a);
  else
    cpu::kernels().leaky_backward(a);
}

template <class Args>
void run_pool(const py::tuple& fields) {
  auto a = pool_args<Args>(fields);
  if (a.N == 0) return;
  a.threads = most_threads();
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Args, PoolForwardArgs>)
    cpu::kernels().pool_forward(a);
  else
    cpu::kernels().pool_backward(a);
}

template <class Args>
void run_batch_norm(const py::tuple& fields) {
  auto a = batch_norm_args<Args>(fields);
  a.threads = most_threads();
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Args, BatchNormForwardArgs>)
    cpu::kernels().batch_norm_forward(a);
  else
    cpu::kernels().batch_norm_backward(a);
}

// ---- linear layers of spikes ----

inline LinearArgs given_linear(const py::tuple& fields) {
  auto a = linear_args<LinearArgs>(fields);
  a.threads = most_threads();
  return a;
}

inline int64_t linear_bytes(int64_t K, int64_t Out) {
  check_linear(1, K, Out);
  return cpu::kernels().linear_bytes(K, Out);
}

inline void linear_pack(int64_t K, int64_t Out, Address weight, Address packed) {
  check_linear(1, K, Out);
  needs(at(weight), "weight"), needs(at(packed), "packed");
  const int threads = most_threads();
  py::gil_scoped_release release;
  cpu::kernels().linear_pack(K, Out, threads, static_cast<float*>(at(weight)),
                             static_cast<float*>(at(packed)));
}

// Returns the number of nonzeros, and whether all of them are 1.
inline std::pair<int64_t, bool> linear_forward(const py::tuple& fields) {
  using A = LinearForwardArgs;
  auto a = linear_args<A>(fields, &A::most, &A::weight, &A::bias, &A::y);
  a.threads = most_threads();
  counted("most", a.most);
  needs(a.x, "x"), needs(a.workspace, "workspace"), needs(a.weight, "weight"), needs(a.y, "y");
  py::gil_scoped_release release;
  const Listed listed = cpu::kernels().linear_forward(a);
  return {listed.nonzeros, listed.ones};
}

inline void linear_backward(const py::tuple& fields) {
  using A = LinearBackwardArgs;
  auto a = linear_args<A>(fields, &A::grad_y, &A::grad_weight, &A::grad_bias);
  a.threads = most_threads();
  needs(a.nonzeros, "nonzeros"), needs(a.workspace, "workspace"), needs(a.grad_y, "grad_y");
  needs(a.grad_weight, "grad_weight");
  py::gil_scoped_release release;
  cpu::kernels().linear_backward(a);
}

// ---- convolutions of spikes ----

// What a convolution computes: y by lists of the nonzeros of x, or by Winograd; or, by Winograd, the
// gradient of x, for which the weight is turned around, or those of weight and bias.
enum class ConvolutionPass : int { lists = 0, tiles = 1, turned = 2, weight = 3 };

struct Convolution {
  Cell cell;
  bool weight;
  int threads;
  const cpu::Kernels& kernels;
  std::string layout;  // names that of the packed weight

  cpu::Form form() const { return cell.tiled() ? cpu::Form::forward_x_tiles : cpu::Form::forward; }
};

inline Convolution make_convolution(int number, bool fine, bool weight_last, int64_t T, int64_t N,
                                    int64_t Cin, int64_t Cout, int64_t H, int64_t W,
                                    std::pair<int, int> kernel, std::pair<int, int> stride,
                                    std::pair<int, int> padding) {
  const auto pass = numbered<ConvolutionPass>("pass", number, 4);
  counted("Cout", Cout, 1);
  Cell c;
  c.T = T, c.N = N, c.Cin = Cin, c.C = (Cout + 3) / 4, c.Cout = Cout, c.H = H, c.W = W;
  std::tie(c.kernel_h, c.kernel_w) = kernel;
  std::tie(c.stride_h, c.stride_w) = stride;
  std::tie(c.padding_h, c.padding_w) = padding;
  check_sizes(c);
  const auto fits = [](int64_t size, int kernel, int padding) {
    return kernel % 2 == 1 && padding >= 0 && padding < kernel && kernel <= size + 2 * padding;
  };
  if (!fits(H, c.kernel_h, c.padding_h) || !fits(W, c.kernel_w, c.padding_w))
    throw py::value_error("kernel must be odd, larger than padding, and fit into the image");
  c.turned = pass == ConvolutionPass::turned;
  c.weight_last = weight_last && pass != ConvolutionPass::weight;
  if (pass != ConvolutionPass::weight && T > 1) throw py::value_error("T must be 1");
  const cpu::Kernels& kernels = cpu::kernels();
  c.x_algorithm = CpuAlgorithm::sparse;
  if (pass != ConvolutionPass::lists) {
    c.x_algorithm = CpuAlgorithm::winograd;
    std::tie(c.tile_h, c.tile_w) = cpu::convolution_tile(c, fine);
    if (!c.tiled() || c.stride_h * c.stride_w != 1)
      throw py::value_error("there are no tiles for this kernel and stride");
  }
  const std::string layout = cpu::isa_name() + " " + cpu::form_name(c, cpu::Form::forward_x_tiles) +
                             (c.turned ? " turned" : "") + (c.weight_last ? " last" : "");
  return {c, pass == ConvolutionPass::weight, most_threads(), kernels, layout};
}

inline void pack_convolution(const Convolution& conv, Address weight, Address packed) {
  needs(at(weight), "weight"), needs(at(packed), "packed");
  if (conv.weight) throw py::value_error("the weight's gradient reads no weight");
  py::gil_scoped_release release;
  conv.kernels.pack_weight(conv.cell, conv.form(), conv.threads, at(weight), at(packed));
}

inline void run_convolution(const Convolution& conv, const py::tuple& fields) {
  ConvolutionArgs a;
  a.cell = conv.cell, a.threads = conv.threads;
  Fields(fields, 7).read(a.workspace, a.weight, a.x, a.bias, a.y, a.grad_weight, a.grad_bias);
  needs(a.workspace, "workspace"), needs(a.x.data, "x"), needs(a.y.data, "y");
  if (conv.weight)
    needs(a.grad_weight, "grad_weight");
  else if (needs(a.weight, "weight"); a.grad_weight)
    throw py::value_error("grad_weight must not be given: this pass computes y");
  py::gil_scoped_release release;
  conv.kernels.convolve(a);
}

inline void bind_cpu(py::module_& m) {
  m.def("isa_names", &cpu::isa_names);
  m.def("isa_name", &cpu::isa_name);
  m.def("set_isa", &cpu::set_isa);
  m.def("same", &same_bytes);
  m.def("same",
        [](Address a, Address copy_a, int64_t a_bytes, Address b, Address copy_b, int64_t b_bytes) {
          return same_bytes(a, copy_a, a_bytes) && same_bytes(b, copy_b, b_bytes);
        });
  m.def("facts", &facts);
  m.def("sum_of_squares", &sum_of_squares);
  m.def("cpu_padded_channels", [](int dtype, int64_t C) {
    Cell cell;
    cell.dtype = numbered<DType>("dtype", dtype, 2);
    cell.C = C;
    counted("C", C, 1);
    return cpu::kernels().padded_channels(cell);
  });

  m.def("leaky_forward", &run_leaky<LeakyForwardArgs>);
  m.def("leaky_backward", &run_leaky<LeakyBackwardArgs>);
  m.def("pool_forward", &run_pool<PoolForwardArgs>);
  m.def("pool_backward", &run_pool<PoolBackwardArgs>);
  m.def("batch_norm_workspace", [](int dtype, int64_t T, int64_t N, int64_t C, int64_t S) {
    BatchNormArgs a;
    a.dtype = numbered<DType>("dtype", dtype, 2);
    a.T = T, a.N = N, a.C = C, a.S = S;
    return cpu::kernels().batch_norm_workspace(a);
  });
  m.def("batch_norm_forward", &run_batch_norm<BatchNormForwardArgs>);
  m.def("batch_norm_backward", &run_batch_norm<BatchNormBackwardArgs>);

  m.def("linear_look", [](const py::tuple& fields) {
    const auto a = given_linear(fields);
    needs(a.x, "x");
    return cpu::kernels().linear_look(a);
  });
  m.def("linear_bytes", &linear_bytes);
  m.def("linear_pack", &linear_pack);
  m.def("linear_workspace", [](const py::tuple& fields, bool backward) {
    return cpu::kernels().linear_workspace(given_linear(fields), backward);
  });
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);

  using cpu::Pass;
  py::class_<Convolution>(m, "Convolution", py::module_local())
      .def(py::init(&make_convolution))
      .def_property_readonly("workspace",
                             [](const Convolution& c) {
                               return c.kernels.convolution_workspace(c.cell, c.threads, c.weight);
                             })
      .def_property_readonly(
          "packed_bytes",
          [](const Convolution& c) { return c.kernels.packed_bytes(c.cell, c.form()); })
      .def_readonly("layout", &Convolution::layout)
      .def("facts", [](const Convolution& c, const py::handle& x) { return facts(c.cell, x, 0); })
      .def("cost", [](const Convolution& c,
                      double density) { return cpu::convolution_cost(c.cell, c.weight, density); })
      .def("pack", &pack_convolution)
      .def("run", &run_convolution);
  py::class_<Pass>(m, "CpuPass", py::module_local())
      .def(py::init(&make_cpu_pass), py::arg("cell"), py::arg("algorithm"), py::arg("density"),
           py::arg("max_tile_inputs"), py::arg("threads"), py::arg("backward") = false,
           py::arg("grad_x") = false, py::arg("grad_weight") = false)
      .def_property_readonly("name", [](const Pass& p) { return cpu::algorithm_name(p.cell); })
      .def_property_readonly("workspace",
                             [](const Pass& p) {
                               const cpu::Kernels& k = p.kernels;
                               return p.backward
                                          ? k.backward_workspace(p.cell, p.threads, p.grad_weight)
                                          : k.forward_workspace(p.cell, p.threads);
                             })
      .def_readonly("backward", &Pass::backward)
      .def_property_readonly("layouts", &layouts)
      .def("pack", &pack)
      .def("run", &run_pass);
}

}  // namespace snnlstm::bindings
