// Makes random calls of the CPU kernels of one instruction set, in a build with sanitizers.
//
//   driver CASES SEED
//
// Every buffer is an allocation of its own, exactly as large as the interface says, so that
// AddressSanitizer sees an access to the first byte beside it. Teams are of std::thread (below),
// whose synchronisation ThreadSanitizer knows. The driver checks that every output was written, and
// that it is finite unless an input holds infinities, NaN or the like. Its random numbers are the
// same with every compiler and C++ library.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/api.h"
#include "cpu/tiling.h"
#include "platform.h"

namespace snnlstm::SNNLSTM_ISA {
extern const cpu::Kernels kernels;
}

// The functions of csrc/platform.cpp that the kernels call.
namespace snnlstm {
void run_team(int threads, void (*body)(void* data, int thread), void* data) {
  std::vector<std::thread> team;
  for (int k = 1; k < threads; ++k) team.emplace_back(body, data, k);
  body(data, 0);
  for (std::thread& member : team) member.join();
}
void yield_core() { std::this_thread::yield(); }
}  // namespace snnlstm

namespace {

using namespace snnlstm;
using cpu::Form;

std::mt19937_64 random_bits;
double total = 0;      // the sum of all computed numbers, for a comparison of processors
bool special = false;  // true if this case's inputs hold infinities, NaN or the like
bool loose = false;    // true if its results may be infinite or chaotic: special, or large weights

int64_t between(int64_t low, int64_t high) {
  return low + int64_t(random_bits() % uint64_t(high - low + 1));
}
int64_t mostly_small(int64_t most) { return std::min(between(1, most), between(1, most)); }
double uniform() { return double(random_bits() >> 11) / double(uint64_t(1) << 53); }
double normal() {  // by the central limit theorem
  double sum = -6;
  for (int k = 0; k < 12; ++k) sum += uniform();
  return sum;
}
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[between(0, int64_t(values.size()) - 1)];
}

// Ends the program if a result was not written: memory begins as a NaN that no operation makes.
template <class T>
void check_written(T value, const char* name) {
  static const signed char nothing[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const bool finite = std::isfinite(value);
  if (finite && !loose) total += std::abs(double(value));
  if (finite || (loose && std::memcmp(&value, nothing, sizeof(T)) != 0)) return;
  std::fprintf(stderr, "%s was not written, or is not finite\n", name);
  std::exit(3);
}

// A tensor in memory of exactly its extent. Memory between its elements holds NaN.
template <class T>
class StridedTensor {
 public:
  // `shape` has 4 or 5 sizes. The layout is contiguous, channels-last or a slice of a larger
  // tensor; a tensor that is only read may also repeat one image or channel by a stride of 0, or
  // overlap itself.
  explicit StridedTensor(std::vector<int64_t> shape, bool read_only = false) : shape_(shape) {
    const int dims = int(shape.size()), layout = int(between(0, read_only ? 4 : 2));
    std::vector<int> order;  // dimensions by their strides, the smallest first
    for (int d = dims - 1; d >= 0; --d) order.push_back(d);
    if (layout == 1) std::rotate(order.begin(), order.begin() + 2, order.begin() + 3);
    const int64_t gap = layout == 2 ? between(1, 3) : 0;
    strides_.resize(dims);
    int64_t step = layout == 2 ? between(1, 2) : 1;
    for (int d : order) {
      strides_[d] = step;
      step = step * shape[d] + gap;
    }
    if (layout == 3) strides_[between(0, dims - 3)] = 0;
    if (layout == 4)
      for (int d = 0; d < dims - 1; ++d) strides_[d] = std::max<int64_t>(strides_[d] / 2, 1);
    count_ = 1;
    for (int d = 0; d < dims; ++d) count_ += (shape[d] - 1) * strides_[d];
    data_.reset(new T[count_]);
    std::memset(data_.get(), 0xFF, size_t(count_) * sizeof(T));
  }

  template <class F>
  void fill(F&& value) {
    each([&](T& element) { element = value(); });
  }
  void check(const char* name) {
    each([&](T& element) { check_written(element, name); });
  }
  View view() const {
    View v;
    v.data = data_.get();
    for (size_t d = 0; d < strides_.size(); ++d) v.stride[5 - strides_.size() + d] = strides_[d];
    return v;
  }

 private:
  template <class F>
  void each(F&& f, size_t d = 0, int64_t at = 0) {
    if (d == shape_.size()) return f(data_[at]);
    for (int64_t k = 0; k < shape_[d]; ++k) each(f, d + 1, at + k * strides_[d]);
  }

  std::vector<int64_t> shape_, strides_;
  int64_t count_;
  std::unique_ptr<T[]> data_;
};

// A Bytes object owns memory that begins as bytes of 0xFF: as floats NaN, as integers -1.
class Bytes {
 public:
  explicit Bytes(int64_t count) : data_(new char[count]), count_(count) {
    std::memset(data_.get(), 0xFF, size_t(count));
  }
  void* get() const { return data_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  template <class T>
  void check(const char* name) const {
    for (int64_t k = 0; k < count_ / int64_t(sizeof(T)); ++k) check_written(as<T>()[k], name);
  }

 private:
  std::unique_ptr<char[]> data_;
  int64_t count_;
};

Cell random_cell() {
  Cell c;
  c.T = mostly_small(6);
  c.N = mostly_small(6);
  c.Cin = one_of<int64_t>({1, 2, 3, 5, 8, 9, 17, 40});
  c.C = one_of<int64_t>({1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 24, 31, 48});
  c.H = between(1, 15), c.W = between(1, 19);
  if (between(0, 9) == 0) c.W = between(60, 150), c.H = between(1, 5);
  c.kernel_h = c.kernel_w = one_of({1, 3, 3, 3, 5, 5, 7, 9});
  if (between(0, 3) == 0) {
    c.kernel_w = one_of({1, 3, 5, 7, 11});
    c.stride_h = int(mostly_small(9)), c.stride_w = int(mostly_small(9));
    c.dilation_h = int(mostly_small(9)), c.dilation_w = int(mostly_small(9));
  }
  c.reset = one_of({Reset::subtract, Reset::zero, Reset::none});
  c.pool = one_of({Pool::none, Pool::max, Pool::avg});
  if (c.pool != Pool::none) {
    c.pool_h = int(between(1, std::min<int64_t>(3, c.Ho())));
    c.pool_w = int(between(1, std::min<int64_t>(3, c.Wo())));
  }
  c.surrogate = Surrogate(between(0, kSurrogates - 1));
  c.surrogate_p0 = 0.5, c.surrogate_p1 = 0.25;
  c.num_levels = between(0, 2) == 0 ? int(between(1, 9)) : 0;
  return c;
}

void choose_algorithms(Cell& c, const cpu::Kernels& kernels) {
  c = within_image(c);
  const auto tile = [](int kernel) {
    return kernel == 1 ? 1 : int(between(kernel < 7 ? 2 : 3, 4));
  };
  if (kernels.has_tiles(c) && c.kernel_h * c.kernel_w > 1 && between(0, 5) > 0)
    c.tile_h = tile(c.kernel_h), c.tile_w = tile(c.kernel_w);
  const bool tiles_of_x = c.tiled() && c.stride_h == 1 && c.stride_w == 1;
  c.x_algorithm = tiles_of_x ? one_of({CpuAlgorithm::direct, CpuAlgorithm::sparse,
                                       CpuAlgorithm::winograd, CpuAlgorithm::winograd})
                             : one_of({CpuAlgorithm::direct, CpuAlgorithm::sparse});
}

template <class T>
void run(Cell c, const cpu::Kernels& kernels) {
  using Limits = std::numeric_limits<T>;
  const auto number = [&] {
    if (special && between(0, 40) == 0)
      return one_of({Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), Limits::max(),
                     Limits::lowest(), Limits::denorm_min(), T(-0.0)});
    return T(normal());
  };
  const int threads = int(between(1, 4));
  const T graded = T(0.7);
  const bool record = between(0, 1), training = between(0, 3) > 0, has_bias = between(0, 3) > 0;
  const bool per_channel = between(0, 1);
  const int64_t item = sizeof(T), Ho = c.Ho(), Wo = c.Wo();
  const int64_t K = (c.kernel_h + 2 * c.outer_h) * (c.kernel_w + 2 * c.outer_w);

  StridedTensor<T> x({c.T, c.N, c.Cin, c.H, c.W}, true);
  StridedTensor<T> syn0({c.N, c.C, Ho, Wo}, true), mem0({c.N, c.C, Ho, Wo}, true);
  const double density = one_of({1.0, 0.3, 0.05, 0.0});
  x.fill([&] { return uniform() < density ? number() : T(0); });
  syn0.fill(number);
  mem0.fill([&] { return number() / 3; });

  Bytes weight(4 * c.C * (c.Cin + c.C) * K * item), bias(4 * c.C * item);
  const double gain = one_of({1., 1., 1., 1., 1e-3, 0.1, 10., 100.});
  loose = special || gain > 1;
  const double scale = gain / std::sqrt(double(K * (c.Cin + c.C)));
  for (int64_t k = 0; k < 4 * c.C * (c.Cin + c.C) * K; ++k) weight.as<T>()[k] = T(number() * scale);
  for (int64_t k = 0; k < 4 * c.C; ++k) bias.as<T>()[k] = number() / 4;
  const auto pack = [&](Form form, bool grad_x) {
    const bool read = cpu::reads(c, form, grad_x);
    Bytes packed(read ? kernels.packed_bytes(c, form) : 0);
    if (read) kernels.pack_weight(c, form, threads, weight.get(), packed.get());
    return packed;
  };

  Bytes threshold((per_channel ? c.C : 1) * item), levels(c.num_levels * item);
  for (int64_t k = 0; k < (per_channel ? c.C : 1); ++k) threshold.as<T>()[k] = T(0.05 * k);
  for (int k = 0; k < c.num_levels; ++k) levels.as<T>()[k] = T(k - 3) / 8;

  const std::vector<int64_t> state = {c.N, c.C, Ho, Wo};
  const std::vector<int64_t> states = record ? std::vector<int64_t>{c.T, c.N, c.C, Ho, Wo} : state;
  StridedTensor<T> spk({c.T, c.N, c.C, c.Hp(), c.Wp()}), syn(states), mem(states);
  const int64_t padded = kernels.padded_channels(c), rows = c.T * c.N * Ho * Wo * padded;
  Bytes gates(4 * rows * item), saved_syn(rows * item),
      argmax(c.T * c.N * c.Hp() * c.Wp() * padded * c.argmax_bytes());
  // Sets what both passes take. The packed weights are those of direct, mem's tiles and x's tiles.
  const auto give = [&](auto& a, const Bytes(&packed)[3], const Bytes& workspace) {
    a.cell = c, a.threads = threads, a.record = record;
    a.x = x.view(), a.syn0 = syn0.view(), a.mem0 = mem0.view();
    a.weight = packed[0].get(), a.weight_mem = packed[1].get(), a.weight_x = packed[2].get();
    a.threshold = threshold.get(), a.threshold_stride = per_channel;
    a.graded_factor = &graded, a.levels = levels.get();
    a.workspace = workspace.get();
    if (!training) return;
    a.saved_gates = gates.get(), a.saved_syn = saved_syn.get(), a.argmax = argmax.get();
  };
  {
    const Bytes packed[] = {pack(Form::forward, false), pack(Form::forward_mem_tiles, false),
                            pack(Form::forward_x_tiles, false)};
    const Bytes workspace(kernels.forward_workspace(c, threads));
    ForwardArgs a;
    give(a, packed, workspace);
    a.bias = has_bias ? bias.get() : nullptr;
    a.spk = spk.view(), a.syn = syn.view(), a.mem = mem.view();
    kernels.look_at(c, a.x, nullptr, 0, c.T * c.N, one_of<int64_t>({1, 1, 3, 29}));
    kernels.forward(a);
  }
  spk.check("spk"), syn.check("syn"), mem.check("mem");
  if (!training) return;

  StridedTensor<T> grad_spk({c.T, c.N, c.C, c.Hp(), c.Wp()}, true);
  StridedTensor<T> grad_syn(states, true), grad_mem(states, true);
  grad_spk.fill(number), grad_syn.fill(number), grad_mem.fill(number);
  StridedTensor<T> grad_x({c.T, c.N, c.Cin, c.H, c.W}), grad_syn0(state), grad_mem0(state);
  if (c.x_algorithm == CpuAlgorithm::sparse) c.x_algorithm = CpuAlgorithm::direct;
  const Bytes grad_weight(4 * c.C * (c.Cin + c.C) * K * item), grad_bias(4 * c.C * item),
      grad_threshold(c.C * item);
  const auto wanted = [&] { return between(0, 4) > 0; };
  const bool want_x = wanted(), want_syn = wanted(), want_mem = wanted(), want_weight = wanted();
  const Bytes packed[] = {pack(Form::backward, want_x), pack(Form::backward_mem_tiles, want_x),
                          pack(Form::backward_x_tiles, want_x)};
  const Bytes workspace(kernels.backward_workspace(c, threads, true));
  BackwardArgs a;
  give(a, packed, workspace);
  if (wanted()) a.grad_spk = grad_spk.view();
  if (wanted()) a.grad_syn = grad_syn.view();
  if (wanted()) a.grad_mem = grad_mem.view();
  if (want_x) a.grad_x = grad_x.view();
  if (want_syn) a.grad_syn0 = grad_syn0.view();
  if (want_mem) a.grad_mem0 = grad_mem0.view();
  if (want_weight) a.grad_weight = grad_weight.get();
  a.grad_bias = grad_bias.get(), a.grad_threshold = grad_threshold.get();
  kernels.backward(a);
  if (want_x) grad_x.check("grad_x");
  if (want_syn) grad_syn0.check("grad_syn0");
  if (want_mem) grad_mem0.check("grad_mem0");
  if (want_weight) grad_weight.check<T>("grad_weight");
  grad_bias.check<T>("grad_bias"), grad_threshold.check<T>("grad_threshold");
}

// Returns memory of `count` values.
template <class F>
Bytes numbers(int64_t count, F&& value) {
  Bytes b(count * 4);
  for (int64_t k = 0; k < count; ++k) b.as<float>()[k] = value();
  return b;
}

// A convolution without a cell: y over lists or by Winograd, and the gradients of weight and bias.
void run_convolution(const cpu::Kernels& kernels) {
  Cell c;
  c.N = mostly_small(6);
  c.Cin = one_of<int64_t>({1, 2, 3, 5, 8, 17, 40}), c.Cout = between(1, between(0, 1) ? 20 : 150);
  c.C = (c.Cout + 3) / 4;
  c.H = between(1, 15), c.W = between(1, 19);
  c.kernel_h = int(between(1, 7)), c.kernel_w = int(between(1, 7));
  if (between(0, 1)) {
    c.stride_h = int(mostly_small(4)), c.stride_w = int(mostly_small(4));
    c.dilation_h = int(mostly_small(3)), c.dilation_w = int(mostly_small(3));
  }
  c.padding_h = int(between(0, c.dilation_h * (c.kernel_h - 1)));
  c.padding_w = int(between(0, c.dilation_w * (c.kernel_w - 1)));
  if (c.Ho() < 1 || c.Wo() < 1) return;
  const bool odd = c.kernel_h % 2 && c.kernel_w % 2 && c.kernel_h * c.kernel_w > 1;
  const auto tile = [](int kernel) {
    return kernel == 1 ? 1 : int(between(kernel <= 5 ? 2 : 3, 4));
  };
  if (odd && c.stride_h * c.stride_w == 1 && kernels.has_tiles(c) && between(0, 2) > 0)
    c.tile_h = tile(c.kernel_h), c.tile_w = tile(c.kernel_w);
  c.x_algorithm = c.tiled() ? CpuAlgorithm::winograd : CpuAlgorithm::sparse;
  c.weight_last = between(0, 1), c.turned = c.tiled() && between(0, 1);
  loose = special;
  const auto number = [&] {
    return special && between(0, 40) == 0
               ? one_of({std::numeric_limits<float>::infinity(), std::nanf(""), -0.f})
               : float(normal());
  };
  const double density = one_of({0.0, 0.1, 1.0});
  StridedTensor<float> x({1, c.N, c.Cin, c.H, c.W}, true), y({1, c.N, c.Cout, c.Ho(), c.Wo()});
  x.fill([&] { return uniform() < density ? number() : 0.f; });
  const int64_t weights = c.Cout * c.Cin * c.kernel_h * c.kernel_w;
  const Bytes weight = numbers(weights, number), bias = numbers(c.Cout, number);
  const Form form = c.tiled() ? Form::forward_x_tiles : Form::forward;
  const Bytes packed(kernels.packed_bytes(c, form));
  ConvolutionArgs a;
  a.threads = int(between(1, 4));
  kernels.pack_weight(c, form, a.threads, weight.get(), packed.get());
  a.cell = c, a.x = x.view(), a.y = y.view();
  a.weight = packed.get(), a.bias = between(0, 3) > 0 ? bias.get() : nullptr;
  {
    const Bytes workspace(kernels.convolution_workspace(c, a.threads, false));
    a.workspace = workspace.get();
    kernels.convolve(a);
  }
  y.check("y of a convolution");

  a.cell.T = mostly_small(4), a.cell.weight_last = a.cell.turned = false;
  if (!c.tiled()) a.cell.x_algorithm = CpuAlgorithm::direct;
  StridedTensor<float> steps({a.cell.T, c.N, c.Cin, c.H, c.W}, true);
  StridedTensor<float> grad_y({a.cell.T, c.N, c.Cout, c.Ho(), c.Wo()}, true);
  steps.fill(number), grad_y.fill(number);
  const Bytes workspace(kernels.convolution_workspace(a.cell, a.threads, true));
  const Bytes grad_weight(weights * 4), grad_bias(c.Cout * 4);
  a.x = steps.view(), a.y = grad_y.view(), a.workspace = workspace.get();
  a.grad_weight = grad_weight.get(), a.grad_bias = between(0, 3) > 0 ? grad_bias.get() : nullptr;
  kernels.convolve(a);
  grad_weight.check<float>("grad_weight of a convolution");
  if (a.grad_bias) grad_bias.check<float>("grad_bias of a convolution");
}

// A linear layer of spikes.
void run_linear(const cpu::Kernels& kernels) {
  using Limits = std::numeric_limits<float>;
  const int64_t M = one_of<int64_t>({between(1, 40), between(1, 300), between(1000, 2300)});
  const int64_t K = between(1, M > 300 ? 200 : 400), Out = mostly_small(M > 300 ? 50 : 300);
  const int64_t gap = between(0, 1) * between(1, 9);
  const bool ones = between(0, 1);
  const double density = one_of({0.0, 0.02, 0.2, 1.0});
  const auto number = [&] {
    if (special && between(0, 40) == 0)
      return one_of({Limits::infinity(), Limits::quiet_NaN(), Limits::denorm_min(), -0.f});
    return float(normal());
  };
  loose = special;
  const Bytes x = numbers((M - 1) * (K + gap) + K, [&] {
    return uniform() >= density ? 0.f : ones ? 1.f : number();
  });
  const Bytes weight = numbers(Out * K, number), bias = numbers(Out, number);
  const Bytes grad_y = numbers(M * Out, number);
  const Bytes packed(kernels.linear_bytes(K, Out)), nonzeros(M * ((K + 7) / 8)), y(M * Out * 4);
  const Bytes grad_weight(Out * K * 4), grad_bias(Out * 4);
  LinearForwardArgs f;
  f.M = M, f.K = K, f.Out = Out, f.row = K + gap, f.threads = int(between(1, 4));
  f.x = x.as<float>(), f.nonzeros = nonzeros.as<uint8_t>();
  f.most = one_of({M * K, M * K, between(0, M * K)});
  kernels.linear_look(f);
  kernels.linear_pack(K, Out, f.threads, weight.as<float>(), packed.as<float>());
  f.weight = packed.as<float>(), f.y = y.as<float>();
  if (between(0, 3) > 0) f.bias = bias.as<float>();
  Listed listed;
  {
    const Bytes workspace(kernels.linear_workspace(f, false));
    f.workspace = workspace.get();
    listed = kernels.linear_forward(f);
  }
  if (listed.nonzeros < 0) return;
  y.check<float>("y of a linear layer");
  LinearBackwardArgs b;
  static_cast<LinearArgs&>(b) = f;
  const Bytes workspace(kernels.linear_workspace(b, true));
  if (listed.ones) b.x = nullptr;
  b.workspace = workspace.get(), b.grad_y = grad_y.as<float>();
  b.grad_weight = grad_weight.as<float>(), b.grad_bias = grad_bias.as<float>();
  kernels.linear_backward(b);
  grad_weight.check<float>("grad_weight of a linear layer");
  grad_bias.check<float>("grad_bias of a linear layer");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  const cpu::Kernels& kernels = SNNLSTM_ISA::kernels;
  for (int k = 0; k < cases; ++k) {
    random_bits.seed(uint64_t(seed) * 1000003 + k);
    special = between(0, 4) == 0;
    Cell c = random_cell();
    c.dtype = one_of({DType::float32, DType::float32, DType::float64});
    choose_algorithms(c, kernels);
    if (c.dtype == DType::float64)
      run<double>(c, kernels);
    else
      run<float>(c, kernels);
    run_linear(kernels);
    run_convolution(kernels);
  }
  std::printf("%d cases; sum %.6g\n", cases, total);
}
