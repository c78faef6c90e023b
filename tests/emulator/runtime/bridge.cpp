// The emulated CUDA backend as a Python module, with the bindings of the real one. Every array of a
// call is registered with the emulator, so that an access beside it is an error, and the memory
// that a call must write is poisoned before.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "bindings_cuda.h"
#include "images.h"
#include "machine.h"
#include "memory.h"

using namespace snnlstm;
namespace py = pybind11;

namespace {

// What a call does to an array: it overwrites it, or reads and writes it (updates).
enum Does { reads, writes, updates };

using Extent = int64_t[5];

// The arrays of one call. Arrays that share memory become one, since views may interleave.
class Arrays {
 public:
  ~Arrays() {
    for (const char* start : registered_) simt::unregister_allocation(start);
  }

  // commit() changes p: the call is to use the emulator's copy.
  template <class T>
  void add(const char* name, T*& p, int64_t bytes, Does does) {
    if (simt::simt_settings.dry || p == nullptr || bytes <= 0) return;
    const char* c = reinterpret_cast<const char*>(p);
    auto** pointer = const_cast<std::remove_const_t<T>**>(&p);
    items_.push_back({c, c + bytes, name, does != reads, reinterpret_cast<void**>(pointer)});
    if (does == writes) std::memset(const_cast<char*>(c), 0xff, size_t(bytes));
  }

  void add(const char* name, View& v, const Extent& extent, DType type, Does does) {
    if (simt::simt_settings.dry || v.data == nullptr) return;
    int64_t last = 0;
    for (int k = 0; k < 5; ++k) {
      if (extent[k] == 0) return;
      last += (extent[k] - 1) * v.stride[k];
    }
    const int64_t size = cuda::bytes_of(type);
    if (does != writes) return add(name, v.data, (last + 1) * size, does);
    add(name, v.data, (last + 1) * size, updates);
    poison(static_cast<char*>(v.data), v, extent, size, 0);
  }

  void commit() {
    std::sort(items_.begin(), items_.end(),
              [](const Registered& a, const Registered& b) { return a.start < b.start; });
    for (size_t i = 0; i < items_.size();) {
      Registered joint = items_[i++];
      for (; i < items_.size() && items_[i].start < joint.end; ++i) {
        joint.end = std::max(joint.end, items_[i].end);
        joint.writable |= items_[i].writable;
        joint.name += std::string("+") + items_[i].name;
      }
      simt::register_allocation(joint.start, size_t(joint.end - joint.start), joint.name,
                                joint.writable);
      registered_.push_back(joint.start);
    }
    for (const Registered& i : items_) *i.pointer = const_cast<void*>(simt::copy_of(i.start));
  }

 private:
  struct Registered {
    const char *start, *end;
    std::string name;
    bool writable;
    void** pointer;  // of the call
  };
  std::vector<Registered> items_;
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

// Extents of a call's arrays, and sizes in bytes.
struct Extents {
  cuda::Shape shape;
  Extent input, state, states, spikes, gates;
  int64_t size, real, gate;  // of an element: of the states, the compute type, the gates
  int64_t weight, gates_of_all, argmax;

  Extents(const cuda::Pass& plan, bool record = false) : Extents(plan.cell, plan.matrix, record) {}
  Extents(const Cell& c, cuda::Matrix matrix, bool record)
      : shape(c),
        input{c.T, c.N, c.Cin, c.H, c.W},
        state{1, c.N, c.C, c.Ho(), c.Wo()},
        states{record ? c.T : 1, c.N, c.C, c.Ho(), c.Wo()},
        spikes{c.T, c.N, c.C, c.Hp(), c.Wp()},
        gates{1, c.N, 4 * c.C, c.Ho(), c.Wo()},
        size(cuda::bytes_of(c.dtype)),
        real(cuda::bytes_of(cuda::real_of(c.dtype))),
        gate(cuda::bytes_of(cuda::gate_type(c.dtype, matrix))),
        weight(4 * c.C * (c.Cin + c.C) * shape.taps * size),
        gates_of_all(c.T * shape.gates() * gate),
        argmax(c.T * c.N * c.C * c.Hp() * c.Wp() * c.argmax_bytes()) {}

  // Bytes of syn after each step that another follows, or of one step with cudnn.
  int64_t saved_syn(bool cudnn) const { return (cudnn ? 1 : shape.c.T - 1) * shape.state() * size; }
};

// What the kernels of a plan read and write in a call. A step with cudnn may write
// the states where it has read them.
struct CheckedPass : cuda::Pass {
  using cuda::Pass::Pass;

  bool cudnn() const { return algorithm == cuda::Algorithm::cudnn; }

  template <class Args>
  void add_inputs(Arrays& arrays, Args& a, const Extents& e) const {
    arrays.add("x", a.x, e.input, cell.dtype, reads);
    arrays.add("syn0", a.syn0, e.state, cell.dtype, reads);
    arrays.add("mem0", a.mem0, e.state, cell.dtype, reads);
    arrays.add("packed weight", a.weight, packed_bytes, reads);
    arrays.add("threshold", a.threshold, (1 + (cell.C - 1) * a.threshold_stride) * e.size, reads);
    arrays.add("graded factor", a.graded_factor, e.size, reads);
    arrays.add("levels", a.levels, cell.num_levels * e.real, reads);
    arrays.add("workspace", a.workspace, workspace, writes);
    arrays.add("lengths", a.lengths, cell.N * 8, reads);
  }

  void run(ForwardArgs a, void* stream) const {
    const Cell& c = cell;
    const Extents e(*this, a.record);
    const Does states = cudnn() ? updates : writes;
    Arrays arrays;
    add_inputs(arrays, a, e);
    arrays.add("bias", a.bias, 4 * c.C * e.size, reads);
    arrays.add("gate sums", a.gate_sums, e.gates, cuda::gate_type(c.dtype, matrix), reads);
    arrays.add("spk", a.spk, e.spikes, c.dtype, a.lengths ? updates : writes);
    arrays.add("syn", a.syn, e.states, c.dtype, states);
    arrays.add("mem", a.mem, e.states, c.dtype, states);
    arrays.add("saved gates", a.saved_gates, e.gates_of_all, writes);
    arrays.add("saved syn", a.saved_syn, e.saved_syn(cudnn()), writes);
    arrays.add("argmax", a.argmax, e.argmax, writes);
    arrays.commit();
    cuda::Pass::run(a, stream);
  }

  void run(BackwardArgs a, void* stream) const {
    const Cell& c = cell;
    const Extents e(*this, a.record);
    Arrays arrays;
    add_inputs(arrays, a, e);
    arrays.add("saved gates", a.saved_gates, e.gates_of_all, reads);
    const Does some = a.lengths ? updates : writes;  // no kernel writes those of padded samples
    arrays.add("d_gates", a.d_gates, e.gates_of_all, some);
    arrays.add("mem after", a.mem_after, e.shape.state() * e.gate, some);
    arrays.add("saved syn", a.saved_syn, e.saved_syn(false), reads);
    arrays.add("argmax", a.argmax, e.argmax, reads);
    arrays.add("grad_spk", a.grad_spk, e.spikes, c.dtype, reads);
    arrays.add("grad_syn", a.grad_syn, e.states, c.dtype, reads);
    arrays.add("grad_mem", a.grad_mem, e.states, c.dtype, reads);
    arrays.add("grad_x", a.grad_x, e.input, c.dtype, some);
    arrays.add("grad_syn0", a.grad_syn0, e.state, c.dtype, cudnn() ? updates : writes);
    arrays.add("grad_mem0", a.grad_mem0, e.state, c.dtype, writes);
    arrays.add("grad_weight", a.grad_weight, e.weight, writes);
    arrays.add("grad_bias", a.grad_bias, 4 * c.C * e.size, writes);
    arrays.add("grad_threshold", a.grad_threshold, c.C * e.size, writes);
    arrays.commit();
    cuda::Pass::run(a, stream);
  }

  void pack(const void* weight, void* packed, void* stream) const {
    Arrays arrays;
    arrays.add("weight", weight, Extents(*this).weight, reads);
    arrays.add("packed weight", packed, packed_bytes, writes);
    arrays.commit();
    cuda::Pass::pack(weight, packed, stream);
  }

  void store_levels(const double* values, void* levels, void* stream) const {
    Arrays arrays;
    arrays.add("levels", levels, cell.num_levels * Extents(*this).real, writes);
    arrays.commit();
    cuda::Pass::store_levels(values, levels, stream);
  }
};

// What the kernels of snntorch.Leaky read and write in a call.
struct CheckedLeaky : cuda::Leaky {
  // Returns bytes of T steps in the compute type.
  static int64_t add_inputs(Arrays& arrays, LeakyArgs& a) {
    const int64_t real = cuda::bytes_of(cuda::real_of(a.dtype));
    arrays.add("beta", a.beta.values, a.beta.count * real, reads);
    arrays.add("threshold", a.threshold.values, a.threshold.count * real, reads);
    arrays.add("graded factor", a.graded_factor, real, reads);
    arrays.add("mem0", a.mem0, a.n * real, reads);
    return a.T * a.n * real;
  }

  static void run(const cuda::Device& device, LeakyForwardArgs a, void* stream) {
    Arrays arrays;
    const int64_t steps = add_inputs(arrays, a);
    arrays.add("x", a.x, a.T * a.n * cuda::bytes_of(a.dtype), reads);
    arrays.add("spk", a.spk, steps, writes);
    arrays.add("mem", a.mem, a.record ? steps : steps / a.T, writes);
    arrays.commit();
    cuda::Leaky::run(device, a, stream);
  }

  static void run(const cuda::Device& device, LeakyBackwardArgs a, void* stream) {
    Arrays arrays;
    const int64_t steps = add_inputs(arrays, a);
    arrays.add("mem", a.mem, steps, reads);
    arrays.add("grad_spk", a.grad_spk, steps, reads);
    arrays.add("grad_mem", a.grad_mem, steps, reads);
    arrays.add("grad_x", a.grad_x, a.T * a.n * cuda::bytes_of(a.dtype), writes);
    arrays.add("grad_mem0", a.grad_mem0, steps / a.T, writes);
    arrays.add("grad_beta", a.grad_beta, steps / a.T, writes);
    arrays.add("grad_threshold", a.grad_threshold, steps / a.T, writes);
    arrays.commit();
    cuda::Leaky::run(device, a, stream);
  }
};

}  // namespace

PYBIND11_MODULE(snnlstm_emulator, m) {
  bindings::bind_cell(m);
  bindings::bind_cuda<CheckedPass, CheckedLeaky>(m);
}
