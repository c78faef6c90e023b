// The emulated CUDA half as a Python module: the bindings of the real one, with every array of a
// call registered with the emulator, so that an access beside one is an error, and with what a call
// must write poisoned before.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "bindings_cuda.h"
#include "machine.h"
#include "memory.h"

using namespace snnlstm;

namespace {

// The device that the launchers believe they run on.
cuda::Target the_target;

size_t element_size(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }
DType compute_type(DType t) { return t == DType::float64 ? t : DType::float32; }

// What a call does to an array; if it updates one, the present values matter.
enum class Does { reads, writes, updates };

using Extent = int64_t[5];

// The arrays of one call. Arrays that share memory become one: views may interleave.
class Arrays {
 public:
  ~Arrays() {
    for (const char* start : registered_) simt::unregister_allocation(start);
  }

  void add(const char* name, const void* p, int64_t bytes, Does does) {
    if (simt::simt_settings.dry || p == nullptr || bytes <= 0) return;
    const char* c = static_cast<const char*>(p);
    items_.push_back({c, c + bytes, name, does != Does::reads});
    if (does == Does::writes) std::memset(const_cast<void*>(p), 0xff, size_t(bytes));
  }

  void add(const char* name, const View& v, const Extent& extent, DType type, Does does) {
    if (simt::simt_settings.dry || v.data == nullptr) return;
    int64_t last = 0;
    for (int k = 0; k < 5; ++k) {
      if (extent[k] == 0) return;
      last += (extent[k] - 1) * v.stride[k];
    }
    const auto size = int64_t(element_size(type));
    add(name, v.data, (last + 1) * size, does == Does::writes ? Does::updates : does);
    if (does == Does::writes) poison(static_cast<char*>(v.data), v, extent, size, 0);
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

  static void poison(char* p, const View& v, const Extent& extent, int64_t size, int k) {
    if (k == 5) {
      std::memset(p, 0xff, size_t(size));
      return;
    }
    for (int64_t i = 0; i < extent[k]; ++i)
      poison(p + i * v.stride[k] * size, v, extent, size, k + 1);
  }
};

// Extents of the arrays of a call.
struct Extents {
  Extent input, state, states, spikes, gates;

  Extents(const Cell& c, bool record)
      : input{c.T, c.N, c.Cin, c.H, c.W},
        state{1, c.N, c.C, c.Ho(), c.Wo()},
        states{record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()},
        spikes{c.T, c.N, c.C, c.Hp(), c.Wp()},
        gates{1, c.N, 4 * c.C, c.Ho(), c.Wo()} {}
};

int64_t weight_bytes(const Cell& c) {
  return 4 * c.C * (c.Cin + c.C) * c.kernel_h * c.kernel_w * int64_t(element_size(c.dtype));
}

template <class Args>
void add_inputs(Arrays& arrays, const Args& a, const Extents& e, int64_t packed) {
  const Cell& c = a.cell;
  const auto size = int64_t(element_size(c.dtype)),
             real = int64_t(element_size(compute_type(c.dtype)));
  arrays.add("x", a.x, e.input, c.dtype, Does::reads);
  arrays.add("syn0", a.syn0, e.state, c.dtype, Does::reads);
  arrays.add("mem0", a.mem0, e.state, c.dtype, Does::reads);
  arrays.add("packed weight", a.weight, packed, Does::reads);
  arrays.add("threshold", a.threshold,
             (a.threshold_stride == 0 ? 1 : (c.C - 1) * a.threshold_stride + 1) * size,
             Does::reads);
  arrays.add("graded factor", a.graded_factor, real, Does::reads);
  arrays.add("levels", a.levels, c.num_levels * real, Does::reads);
}

// in_place: a step behind torch's convolution may write the states where it has read them.
void add_forward(Arrays& arrays, const ForwardArgs& a, const cuda::Target& target, bool in_place) {
  const Cell& c = a.cell;
  const Extents e(c, a.record);
  const cuda::Sizes z = cuda::sizes(c, target);
  const Does states = in_place ? Does::updates : Does::writes;
  add_inputs(arrays, a, e, z.packed_forward);
  arrays.add("bias", a.bias, 4 * c.C * int64_t(element_size(c.dtype)), Does::reads);
  arrays.add("spk", a.spk, e.spikes, c.dtype, Does::writes);
  arrays.add("syn", a.syn, e.states, c.dtype, states);
  arrays.add("mem", a.mem, e.states, c.dtype, states);
  arrays.add("saved gates", a.saved_gates, z.saved_gates, Does::writes);
  const int64_t syn_of_step =
      c.N * c.Ho() * c.Wo() * cuda::padded_channels(c.C) * int64_t(element_size(c.dtype));
  arrays.add("saved syn", a.saved_syn, in_place ? syn_of_step : z.saved_syn, Does::writes);
  arrays.add("winner", a.winner, c.T * c.N * 8, Does::writes);
  arrays.add("workspace", a.workspace, z.forward_workspace, Does::writes);
}

int64_t gate_bytes(const Cell& c, const cuda::Target& target) {
  return c.T * c.N * c.Ho() * c.Wo() * 4 * cuda::padded_channels(c.C) *
         int64_t(element_size(cuda::gate_type(c.dtype, target.matrix)));
}

void add_backward(Arrays& arrays, const BackwardArgs& a, const cuda::Target& target,
                  int64_t workspace, bool in_place) {
  const Cell& c = a.cell;
  const Extents e(c, a.record);
  const cuda::Sizes z = cuda::sizes(c, target);
  const auto size = int64_t(element_size(c.dtype));
  add_inputs(arrays, a, e, z.packed_backward);
  arrays.add("saved gates", a.saved_gates, z.saved_gates, Does::reads);
  arrays.add("d_gates", a.d_gates, gate_bytes(c, target),
             a.d_gates == a.saved_gates ? Does::updates : Does::writes);
  const int64_t mems = in_place ? 1 : c.T - 1;  // a step behind torch's convolution, or all but one
  arrays.add("mem after", a.mem_after,
             mems * c.N * c.Ho() * c.Wo() * cuda::padded_channels(c.C) *
                 int64_t(element_size(cuda::gate_type(c.dtype, target.matrix))),
             Does::writes);
  arrays.add("saved syn", a.saved_syn, z.saved_syn, Does::reads);
  arrays.add("winner", a.winner, c.T * c.N * 8, Does::reads);
  arrays.add("noise", a.noise, e.spikes, c.dtype, Does::reads);
  arrays.add("grad_spk", a.grad_spk, e.spikes, c.dtype, Does::reads);
  arrays.add("grad_syn", a.grad_syn, e.states, c.dtype, Does::reads);
  arrays.add("grad_mem", a.grad_mem, e.states, c.dtype, Does::reads);
  arrays.add("grad_x", a.grad_x, e.input, c.dtype, Does::writes);
  arrays.add("grad_syn0", a.grad_syn0, e.state, c.dtype, in_place ? Does::updates : Does::writes);
  arrays.add("grad_mem0", a.grad_mem0, e.state, c.dtype, Does::writes);
  arrays.add("grad_weight", a.grad_weight, weight_bytes(c), Does::writes);
  arrays.add("grad_bias", a.grad_bias, 4 * c.C * size, Does::writes);
  arrays.add("grad_threshold", a.grad_threshold, c.C * size, Does::writes);
  arrays.add("workspace", a.workspace, workspace, Does::writes);
}

void pack_weight(const Cell& c, const void* weight, bool backward, void* packed,
                 const cuda::Target& target) {
  const cuda::Sizes z = cuda::sizes(c, target);
  Arrays arrays;
  arrays.add("weight", weight, weight_bytes(c), Does::reads);
  arrays.add("packed weight", packed, backward ? z.packed_backward : z.packed_forward,
             Does::writes);
  arrays.commit();
  cuda::pack_weight(c, weight, backward, packed, target);
}

void store_levels(const Cell& c, const double* values, void* levels, const cuda::Target& target) {
  Arrays arrays;
  arrays.add("levels", levels, c.num_levels * int64_t(element_size(compute_type(c.dtype))),
             Does::writes);
  arrays.commit();
  cuda::store_levels(c, values, levels, target);
}

void forward(const ForwardArgs& a, const cuda::Target& target) {
  Arrays arrays;
  add_forward(arrays, a, target, false);
  arrays.commit();
  cuda::forward(a, target);
}

void backward(const BackwardArgs& a, const cuda::Target& target) {
  Arrays arrays;
  const cuda::Sizes z = cuda::sizes(a.cell, target);
  const bool of_data = a.d_gates && !a.grad_weight && !a.grad_bias;
  add_backward(arrays, a, target, of_data ? z.data_workspace : z.backward_workspace, false);
  arrays.commit();
  cuda::backward(a, target);
}

void weight_gradient(const WeightGradArgs& a, const cuda::Target& target) {
  const Cell& c = a.cell;
  const auto size = int64_t(element_size(c.dtype));
  Arrays arrays;
  arrays.add("x", a.x, {c.T, c.N, c.Cin, c.H, c.W}, c.dtype, Does::reads);
  arrays.add("mem", a.mem, {c.T, c.N, c.C, c.Ho(), c.Wo()}, c.dtype, Does::reads);
  arrays.add("d_gates", a.d_gates, gate_bytes(c, target), Does::reads);
  arrays.add("grad_weight", a.grad_weight, weight_bytes(c), Does::writes);
  arrays.add("grad_bias", a.grad_bias, 4 * c.C * size, Does::writes);
  arrays.add("workspace", a.workspace, cuda::sizes(c, target).weight_workspace, Does::writes);
  arrays.commit();
  cuda::weight_gradient(a, target);
}

void pointwise_forward(const ForwardArgs& a, const View& gate_sums, const cuda::Target& target) {
  Arrays arrays;
  add_forward(arrays, a, target, true);
  arrays.add("gate sums", gate_sums, Extents(a.cell, false).gates,
             cuda::gate_type(a.cell.dtype, target.matrix), Does::reads);
  arrays.commit();
  cuda::pointwise_forward(a, gate_sums, target);
}

void pointwise_backward(const BackwardArgs& a, const cuda::Target& target) {
  Arrays arrays;
  add_backward(arrays, a, target, cuda::pointwise_workspace(a.cell, target), true);
  arrays.commit();
  cuda::pointwise_backward(a, target);
}

}  // namespace

PYBIND11_MODULE(snnlstm_simt, m) {
  bindings::bind_cell(m);
  bindings::CudaCalls calls;
  calls.current_target = [](void*) { return the_target; };
  calls.pack_weight = &pack_weight;
  calls.store_levels = &store_levels;
  calls.forward = &forward;
  calls.backward = &backward;
  calls.weight_gradient = &weight_gradient;
  calls.pointwise_forward = &pointwise_forward;
  calls.pointwise_backward = &pointwise_backward;
  bindings::bind_cuda(m, calls);
  m.def("set_device",
        [](int compute_capability, int multiprocessors, int64_t shared_bytes, int algorithm) {
          the_target.compute_capability = compute_capability;
          the_target.multiprocessors = multiprocessors;
          the_target.shared_bytes = shared_bytes;
          the_target.algorithm = cuda::Algorithm(algorithm);
        });
}
