// The emulated CUDA kernels behind the CPU half's entry points: linked with csrc/bindings.cpp, this
// makes a snnlstm._C whose "CPU" is the emulator. Every array of a call is registered with it, so
// that an access beside one is an error, and what a call must write is poisoned before.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/api.h"
#include "cuda/api.h"
#include "memory.h"
#include "openmp.h"

namespace snnlstm {

namespace cuda {
void backward(const BackwardArgs&, const Target&) __attribute__((weak));
}

const char* openmp_library() { return ""; }

namespace {

cuda::Target the_target;

size_t element_size(DType t) {
  return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2;
}

// Arrays of one call. Those that share memory become one: views may interleave.
class Arrays {
 public:
  ~Arrays() {
    for (const char* start : registered_) simt::unregister_allocation(start);
  }

  void add(const char* name, const void* p, int64_t bytes, bool writable, bool poison = false) {
    if (p == nullptr || bytes <= 0) return;
    const char* c = static_cast<const char*>(p);
    items_.push_back({c, c + bytes, name, writable});
    if (poison) std::memset(const_cast<void*>(p), 0xff, size_t(bytes));
  }

  void add(const char* name, const View& v, const int64_t (&shape)[5], DType type, bool writable) {
    if (v.data == nullptr) return;
    int64_t last = 0;
    for (int k = 0; k < 5; ++k) {
      if (shape[k] == 0) return;
      last += (shape[k] - 1) * v.stride[k];
    }
    add(name, v.data, (last + 1) * int64_t(element_size(type)), writable);
    if (writable) poison(static_cast<char*>(v.data), v, shape, element_size(type), 0);
  }

  void commit() {
    std::sort(items_.begin(), items_.end(),
              [](const Item& a, const Item& b) { return a.start < b.start; });
    for (size_t i = 0; i < items_.size();) {
      Item joint = items_[i++];
      for (; i < items_.size() && items_[i].start < joint.end; ++i) {
        joint.end = std::max(joint.end, items_[i].end);
        joint.writable |= items_[i].writable;
        joint.name += std::string("+") + items_[i].name;
      }
      simt::register_allocation(joint.start, size_t(joint.end - joint.start), joint.name,
                                joint.writable);
      registered_.push_back(joint.start);
    }
  }

 private:
  struct Item {
    const char *start, *end;
    std::string name;
    bool writable;
  };
  std::vector<Item> items_;
  std::vector<const char*> registered_;

  static void poison(char* p, const View& v, const int64_t (&shape)[5], size_t size, int k) {
    if (k == 5) {
      std::memset(p, 0xff, size);
      return;
    }
    for (int64_t i = 0; i < shape[k]; ++i) {
      poison(p + i * v.stride[k] * int64_t(size), v, shape, size, k + 1);
    }
  }
};

void add_parameters(Arrays& arrays, const Cell& c, const void* threshold, int64_t stride,
                    const void* levels) {
  const auto size = int64_t(element_size(c.dtype));
  arrays.add("threshold", threshold, (stride == 0 ? 1 : (c.C - 1) * stride + 1) * size, false);
  arrays.add("levels", levels, c.num_levels * size, false);
}

}  // namespace

namespace cpu {

Sizes sizes(const Cell& cell, int) {
  const cuda::Sizes z = cuda::sizes(cell, the_target);
  return {z.packed_forward, z.packed_backward, z.forward_workspace, z.backward_workspace};
}

// What the saved tensors are sized by; here they must be at least what the CUDA half asks for.
int64_t padded_channels(const Cell& cell) { return (cell.C + 7) / 8 * 8; }

void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed) {
  const cuda::Sizes z = cuda::sizes(cell, the_target);
  Arrays arrays;
  arrays.add("weight", weight,
             4 * cell.C * (cell.Cin + cell.C) * cell.kernel_h * cell.kernel_w *
                 int64_t(element_size(cell.dtype)),
             false);
  arrays.add("packed weight", packed, backward ? z.packed_backward : z.packed_forward, true, true);
  arrays.commit();
  cuda::pack_weight(cell, weight, backward, packed, the_target);
}

void forward(const ForwardArgs& a) {
  const Cell& c = a.cell;
  const cuda::Sizes z = cuda::sizes(c, the_target);
  const int64_t state[5] = {1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t states[5] = {a.record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()};
  Arrays arrays;
  arrays.add("x", a.x, {c.T, c.N, c.Cin, c.H, c.W}, c.dtype, false);
  arrays.add("syn0", a.syn0, state, c.dtype, false);
  arrays.add("mem0", a.mem0, state, c.dtype, false);
  arrays.add("packed weight", a.weight, z.packed_forward, false);
  arrays.add("bias", a.bias, 4 * c.C * int64_t(element_size(c.dtype)), false);
  add_parameters(arrays, c, a.threshold, a.threshold_stride, a.levels);
  arrays.add("spk", a.spk, {c.T, c.N, c.C, c.Hp(), c.Wp()}, c.dtype, true);
  arrays.add("syn", a.syn, states, c.dtype, true);
  arrays.add("mem", a.mem, states, c.dtype, true);
  arrays.add("saved gates", a.saved_gates, z.saved_gates, true, true);
  arrays.add("saved syn", a.saved_syn, z.saved_syn, true, true);
  arrays.add("winner", a.winner, c.T * c.N * 8, true, true);
  arrays.add("workspace", a.workspace, z.forward_workspace, true, true);
  arrays.commit();
  cuda::forward(a, the_target);
}

void backward(const BackwardArgs& a) {
  const Cell& c = a.cell;
  const cuda::Sizes z = cuda::sizes(c, the_target);
  const int64_t state[5] = {1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t states[5] = {a.record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t spikes[5] = {c.T, c.N, c.C, c.Hp(), c.Wp()};
  const auto size = int64_t(element_size(c.dtype));
  Arrays arrays;
  arrays.add("x", a.x, {c.T, c.N, c.Cin, c.H, c.W}, c.dtype, false);
  arrays.add("syn0", a.syn0, state, c.dtype, false);
  arrays.add("mem0", a.mem0, state, c.dtype, false);
  arrays.add("packed weight", a.weight, z.packed_backward, false);
  add_parameters(arrays, c, a.threshold, a.threshold_stride, a.levels);
  arrays.add("saved gates", a.saved_gates, z.saved_gates, false);
  arrays.add("saved syn", a.saved_syn, z.saved_syn, false);
  arrays.add("winner", a.winner, c.T * c.N * 8, false);
  arrays.add("noise", a.noise, spikes, c.dtype, false);
  arrays.add("grad_spk", a.grad_spk, spikes, c.dtype, false);
  arrays.add("grad_syn", a.grad_syn, states, c.dtype, false);
  arrays.add("grad_mem", a.grad_mem, states, c.dtype, false);
  arrays.add("grad_x", a.grad_x, {c.T, c.N, c.Cin, c.H, c.W}, c.dtype, true);
  arrays.add("grad_syn0", a.grad_syn0, state, c.dtype, true);
  arrays.add("grad_mem0", a.grad_mem0, state, c.dtype, true);
  arrays.add("grad_weight", a.grad_weight,
             4 * c.C * (c.Cin + c.C) * c.kernel_h * c.kernel_w * size, true, true);
  arrays.add("grad_bias", a.grad_bias, 4 * c.C * size, true, true);
  arrays.add("grad_threshold", a.grad_threshold, c.C * size, true, true);
  arrays.add("workspace", a.workspace, z.backward_workspace, true, true);
  arrays.commit();
  if (cuda::backward == nullptr) throw std::runtime_error("there is no backward kernel yet");
  cuda::backward(a, the_target);
}

void evaluate(const std::string&, DType, const void*, void*, int64_t) {
  throw std::runtime_error("the emulation has no CPU kernels to evaluate");
}

std::vector<std::string> isa_names() { return {"simt"}; }
std::string isa_name() { return "simt"; }
void set_isa(const std::string& name) {
  if (name != "simt") throw std::invalid_argument("the emulation is no CPU: 'simt' only");
}

}  // namespace cpu
}  // namespace snnlstm

// The device that the launchers believe they run on, and in which numbers they multiply.
extern "C" __attribute__((visibility("default"))) void simt_target(int compute_capability,
                                                                   int multiprocessors,
                                                                   int shared_bytes, int matrix,
                                                                   int algorithm) {
  using namespace snnlstm;
  the_target.compute_capability = compute_capability;
  the_target.multiprocessors = multiprocessors;
  the_target.shared_bytes = shared_bytes;
  the_target.matrix = cuda::Matrix(matrix);
  the_target.algorithm = cuda::Algorithm(algorithm);
}
