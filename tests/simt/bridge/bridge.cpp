// The emulated CUDA half for Python, through ctypes: plain structs in, the calls of csrc/cuda/api.h
// out. Every array of a call is registered with the emulator, so that an access beside one is an
// error, and what a call must write is poisoned before.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "kernels/entry.h"
#include "memory.h"

using namespace snnlstm;

namespace snnlstm::cuda {
void backward(const BackwardArgs&, const Target&) __attribute__((weak));
}

namespace {

cuda::Target the_target;

size_t element_size(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

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

// ---- what backend.py mirrors ------------------------------------------------------------------

struct SimtCell {
  int64_t dtype, T, N, Cin, C, H, W, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w,
      pool, pool_h, pool_w, reset, surrogate, inhibition, num_levels;
  double p0, p1;
};

struct SimtForward {
  View x, syn0, mem0, spk, syn, mem;
  void *weight, *bias, *threshold, *levels, *saved_gates, *saved_syn, *winner, *workspace;
  int64_t threshold_stride, record;
  double graded;
};

struct SimtBackward {
  View x, syn0, mem0, noise, grad_spk, grad_syn, grad_mem, grad_x, grad_syn0, grad_mem0;
  void *weight, *threshold, *levels, *saved_gates, *saved_syn, *winner, *grad_weight, *grad_bias,
      *grad_threshold, *workspace;
  int64_t threshold_stride, record;
  double graded;
};

namespace {

Cell cell_of(const SimtCell& s) {
  Cell c;
  c.dtype = DType(s.dtype);
  c.T = s.T, c.N = s.N, c.Cin = s.Cin, c.C = s.C, c.H = s.H, c.W = s.W;
  c.kernel_h = int(s.kernel_h), c.kernel_w = int(s.kernel_w);
  c.stride_h = int(s.stride_h), c.stride_w = int(s.stride_w);
  c.dilation_h = int(s.dilation_h), c.dilation_w = int(s.dilation_w);
  c.pool = Pool(s.pool), c.pool_h = int(s.pool_h), c.pool_w = int(s.pool_w);
  c.reset = Reset(s.reset);
  c.surrogate = Surrogate(s.surrogate), c.surrogate_p0 = s.p0, c.surrogate_p1 = s.p1;
  c.inhibition = s.inhibition != 0;
  c.num_levels = int(s.num_levels);
  return c;
}

void forward(const SimtCell& cell, const SimtForward& s) {
  const Cell c = cell_of(cell);
  const cuda::Sizes z = cuda::sizes(c, the_target);
  const int64_t state[5] = {1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t states[5] = {s.record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()};
  Arrays arrays;
  arrays.add("x", s.x, {c.T, c.N, c.Cin, c.H, c.W}, c.dtype, false);
  arrays.add("syn0", s.syn0, state, c.dtype, false);
  arrays.add("mem0", s.mem0, state, c.dtype, false);
  arrays.add("packed weight", s.weight, z.packed_forward, false);
  arrays.add("bias", s.bias, 4 * c.C * int64_t(element_size(c.dtype)), false);
  add_parameters(arrays, c, s.threshold, s.threshold_stride, s.levels);
  arrays.add("spk", s.spk, {c.T, c.N, c.C, c.Hp(), c.Wp()}, c.dtype, true);
  arrays.add("syn", s.syn, states, c.dtype, true);
  arrays.add("mem", s.mem, states, c.dtype, true);
  arrays.add("saved gates", s.saved_gates, z.saved_gates, true, true);
  arrays.add("saved syn", s.saved_syn, z.saved_syn, true, true);
  arrays.add("winner", s.winner, c.T * c.N * 8, true, true);
  arrays.add("workspace", s.workspace, z.forward_workspace, true, true);
  arrays.commit();

  ForwardArgs a;
  a.cell = c;
  a.x = s.x, a.syn0 = s.syn0, a.mem0 = s.mem0;
  a.weight = s.weight, a.bias = s.bias;
  a.threshold = s.threshold, a.threshold_stride = s.threshold_stride;
  a.graded = s.graded, a.levels = s.levels, a.record = s.record != 0;
  a.spk = s.spk, a.syn = s.syn, a.mem = s.mem;
  a.saved_gates = s.saved_gates, a.saved_syn = s.saved_syn;
  a.winner = static_cast<int64_t*>(s.winner), a.workspace = s.workspace;
  cuda::forward(a, the_target);
}

void backward(const SimtCell& cell, const SimtBackward& s) {
  if (cuda::backward == nullptr) throw std::runtime_error("there is no backward pass yet");
  const Cell c = cell_of(cell);
  const cuda::Sizes z = cuda::sizes(c, the_target);
  const int64_t input[5] = {c.T, c.N, c.Cin, c.H, c.W};
  const int64_t state[5] = {1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t states[5] = {s.record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()};
  const int64_t spikes[5] = {c.T, c.N, c.C, c.Hp(), c.Wp()};
  const auto size = int64_t(element_size(c.dtype));
  Arrays arrays;
  arrays.add("x", s.x, input, c.dtype, false);
  arrays.add("syn0", s.syn0, state, c.dtype, false);
  arrays.add("mem0", s.mem0, state, c.dtype, false);
  arrays.add("packed weight", s.weight, z.packed_backward, false);
  add_parameters(arrays, c, s.threshold, s.threshold_stride, s.levels);
  arrays.add("saved gates", s.saved_gates, z.saved_gates, false);
  arrays.add("saved syn", s.saved_syn, z.saved_syn, false);
  arrays.add("winner", s.winner, c.T * c.N * 8, false);
  arrays.add("noise", s.noise, spikes, c.dtype, false);
  arrays.add("grad_spk", s.grad_spk, spikes, c.dtype, false);
  arrays.add("grad_syn", s.grad_syn, states, c.dtype, false);
  arrays.add("grad_mem", s.grad_mem, states, c.dtype, false);
  arrays.add("grad_x", s.grad_x, input, c.dtype, true);
  arrays.add("grad_syn0", s.grad_syn0, state, c.dtype, true);
  arrays.add("grad_mem0", s.grad_mem0, state, c.dtype, true);
  arrays.add("grad_weight", s.grad_weight, 4 * c.C * (c.Cin + c.C) * c.kernel_h * c.kernel_w * size,
             true, true);
  arrays.add("grad_bias", s.grad_bias, 4 * c.C * size, true, true);
  arrays.add("grad_threshold", s.grad_threshold, c.C * size, true, true);
  arrays.add("workspace", s.workspace, z.backward_workspace, true, true);
  arrays.commit();

  BackwardArgs a;
  a.cell = c;
  a.x = s.x, a.syn0 = s.syn0, a.mem0 = s.mem0;
  a.weight = s.weight;
  a.threshold = s.threshold, a.threshold_stride = s.threshold_stride;
  a.graded = s.graded, a.levels = s.levels, a.record = s.record != 0;
  a.saved_gates = s.saved_gates, a.saved_syn = s.saved_syn;
  a.winner = static_cast<const int64_t*>(s.winner), a.noise = s.noise;
  a.grad_spk = s.grad_spk, a.grad_syn = s.grad_syn, a.grad_mem = s.grad_mem;
  a.grad_x = s.grad_x, a.grad_syn0 = s.grad_syn0, a.grad_mem0 = s.grad_mem0;
  a.grad_weight = s.grad_weight, a.grad_bias = s.grad_bias;
  a.grad_threshold = s.grad_threshold, a.workspace = s.workspace;
  cuda::backward(a, the_target);
}

}  // namespace

// The device that the launchers believe they run on, and in which numbers they multiply.
ENTRY core_target(int compute_capability, int multiprocessors, int shared_bytes, int matrix,
                  int algorithm) {
  return guarded([&] {
    the_target.compute_capability = compute_capability;
    the_target.multiprocessors = multiprocessors;
    the_target.shared_bytes = shared_bytes;
    the_target.matrix = cuda::Matrix(matrix);
    the_target.algorithm = cuda::Algorithm(algorithm);
  });
}

// packed_forward, packed_backward, saved_gates, saved_syn, forward_ and backward_workspace: bytes.
ENTRY core_sizes(const SimtCell* cell, int64_t* bytes) {
  return guarded([&] {
    const cuda::Sizes z = cuda::sizes(cell_of(*cell), the_target);
    const int64_t all[6] = {z.packed_forward, z.packed_backward,   z.saved_gates,
                            z.saved_syn,      z.forward_workspace, z.backward_workspace};
    std::copy(all, all + 6, bytes);
  });
}

ENTRY core_pack(const SimtCell* cell, const void* weight, int backward, void* packed) {
  return guarded([&] {
    const Cell c = cell_of(*cell);
    const cuda::Sizes z = cuda::sizes(c, the_target);
    Arrays arrays;
    arrays.add("weight", weight,
               4 * c.C * (c.Cin + c.C) * c.kernel_h * c.kernel_w * int64_t(element_size(c.dtype)),
               false);
    arrays.add("packed weight", packed, backward ? z.packed_backward : z.packed_forward, true,
               true);
    arrays.commit();
    cuda::pack_weight(c, weight, backward != 0, packed, the_target);
  });
}

ENTRY core_forward(const SimtCell* cell, const SimtForward* args) {
  return guarded([&] { forward(*cell, *args); });
}

ENTRY core_backward(const SimtCell* cell, const SimtBackward* args) {
  return guarded([&] { backward(*cell, *args); });
}
