// The neurons alone (csrc/cuda/pointwise.cu) for Python. test_neurons.py fills in the plain struct.
#include "api.h"
#include "entry.h"

using namespace snnlstm;

struct Neurons {
  // cell
  int64_t dtype, N, C, H, W, pool, pool_h, pool_w, reset, surrogate, inhibition, num_levels;
  double p0, p1, graded;
  // both directions
  View gates;  // gate sums, or what gets their gradient
  int64_t gate_type;
  View syn0, mem0;
  void *threshold, *levels, *saved_gates, *winner, *workspace;
  // forward
  View spk, syn, mem;
  // backward
  View grad_spk, grad_syn, grad_mem, grad_syn0;
  void* grad_threshold;
};

namespace {

Cell cell_of(const Neurons& n) {
  Cell c;
  c.dtype = DType(n.dtype);
  c.N = n.N, c.Cin = 1, c.C = n.C, c.H = n.H, c.W = n.W;
  c.pool = Pool(n.pool), c.pool_h = int(n.pool_h), c.pool_w = int(n.pool_w);
  c.reset = Reset(n.reset);
  c.surrogate = Surrogate(n.surrogate), c.surrogate_p0 = n.p0, c.surrogate_p1 = n.p1;
  c.inhibition = n.inhibition != 0;
  c.num_levels = int(n.num_levels);
  return c;
}

template <class Args>
Args common(const Neurons& n) {
  Args a;
  a.cell = cell_of(n);
  a.syn0 = n.syn0, a.mem0 = n.mem0;
  a.threshold = n.threshold, a.threshold_stride = 1;
  a.graded = n.graded, a.levels = n.levels;
  a.saved_gates = n.saved_gates;
  a.winner = static_cast<int64_t*>(n.winner);
  a.workspace = n.workspace;
  return a;
}

}  // namespace

ENTRY neurons_sizes(const Neurons* n, int64_t* gates, int64_t* workspace) {
  return guarded([&] {
    cuda::Target target;
    target.algorithm = cuda::Algorithm::fma;
    *gates = cuda::sizes(cell_of(*n), target).saved_gates;
    *workspace = cuda::pointwise_workspace(cell_of(*n), target);
  });
}

ENTRY neurons_forward(const Neurons* n) {
  return guarded([&] {
    auto a = common<ForwardArgs>(*n);
    a.spk = n->spk, a.syn = n->syn, a.mem = n->mem;
    cuda::pointwise_forward(a, n->gates, DType(n->gate_type), cuda::Target());
  });
}

ENTRY neurons_backward(const Neurons* n) {
  return guarded([&] {
    auto a = common<BackwardArgs>(*n);
    a.grad_spk = n->grad_spk, a.grad_syn = n->grad_syn, a.grad_mem = n->grad_mem;
    a.grad_syn0 = n->grad_syn0, a.grad_threshold = n->grad_threshold;
    cuda::pointwise_backward(a, n->gates, DType(n->gate_type), cuda::Target());
  });
}
