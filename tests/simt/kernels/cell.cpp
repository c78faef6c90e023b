// The cell's entry points (csrc/cuda/api.h) for Python. What cell.py fills in are the plain structs
// below, so that it need not follow every change of csrc/args.h.
#include "api.h"
#include "entry.h"

using namespace snnlstm;

namespace {

struct PlainCell {
  int64_t T, N, Cin, C, H, W;
  double surrogate_p0, surrogate_p1;
  int dtype, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int pool, pool_h, pool_w, reset, surrogate, inhibition, num_levels;
};

struct PlainTarget {
  int64_t shared_bytes;
  int compute_capability, multiprocessors, matrix, algorithm;
};

struct PlainArgs {
  View x, syn0, mem0, spk, syn, mem;                        // forward
  View noise, grad_spk, grad_syn, grad_mem;                 // backward
  View grad_x, grad_syn0, grad_mem0;
  void *weight, *bias, *threshold, *levels, *saved_gates, *saved_syn, *workspace;
  void *grad_weight, *grad_bias, *grad_threshold;
  int64_t* winner;
  int64_t threshold_stride;
  double graded;
  int record;
};

Cell cell_of(const PlainCell& from) {
  Cell c;
  c.dtype = DType(from.dtype);
  c.T = from.T, c.N = from.N, c.Cin = from.Cin, c.C = from.C, c.H = from.H, c.W = from.W;
  c.kernel_h = from.kernel_h, c.kernel_w = from.kernel_w;
  c.stride_h = from.stride_h, c.stride_w = from.stride_w;
  c.dilation_h = from.dilation_h, c.dilation_w = from.dilation_w;
  c.pool = Pool(from.pool), c.pool_h = from.pool_h, c.pool_w = from.pool_w;
  c.reset = Reset(from.reset), c.surrogate = Surrogate(from.surrogate);
  c.surrogate_p0 = from.surrogate_p0, c.surrogate_p1 = from.surrogate_p1;
  c.inhibition = from.inhibition != 0, c.num_levels = from.num_levels;
  return c;
}

cuda::Target target_of(const PlainTarget& from) {
  cuda::Target t;
  t.shared_bytes = from.shared_bytes;
  t.compute_capability = from.compute_capability;
  t.multiprocessors = from.multiprocessors;
  t.matrix = cuda::Matrix(from.matrix);
  t.algorithm = cuda::Algorithm(from.algorithm);
  return t;
}

template <class Args>
Args common(const PlainCell& cell, const PlainArgs& from) {
  Args a;
  a.cell = cell_of(cell);
  a.x = from.x, a.syn0 = from.syn0, a.mem0 = from.mem0;
  a.weight = from.weight;
  a.threshold = from.threshold, a.threshold_stride = from.threshold_stride;
  a.graded = from.graded, a.levels = from.levels;
  a.saved_gates = from.saved_gates, a.saved_syn = from.saved_syn, a.winner = from.winner;
  a.record = from.record != 0, a.workspace = from.workspace;
  return a;
}

}  // namespace

ENTRY snnlstm_sizes(const PlainCell* cell, const PlainTarget* target, cuda::Sizes* out) {
  return guarded([&] { *out = cuda::sizes(cell_of(*cell), target_of(*target)); });
}
ENTRY snnlstm_pack_weight(const PlainCell* cell, const PlainTarget* target, const void* weight,
                          int backward, void* packed) {
  return guarded([&] {
    cuda::pack_weight(cell_of(*cell), weight, backward != 0, packed, target_of(*target));
  });
}
ENTRY snnlstm_forward(const PlainCell* cell, const PlainTarget* target, const PlainArgs* from) {
  return guarded([&] {
    auto a = common<ForwardArgs>(*cell, *from);
    a.bias = from->bias;
    a.spk = from->spk, a.syn = from->syn, a.mem = from->mem;
    cuda::forward(a, target_of(*target));
  });
}
ENTRY snnlstm_backward(const PlainCell* cell, const PlainTarget* target, const PlainArgs* from) {
  return guarded([&] {
    auto a = common<BackwardArgs>(*cell, *from);
    a.noise = from->noise;
    a.grad_spk = from->grad_spk, a.grad_syn = from->grad_syn, a.grad_mem = from->grad_mem;
    a.grad_x = from->grad_x, a.grad_syn0 = from->grad_syn0, a.grad_mem0 = from->grad_mem0;
    a.grad_weight = from->grad_weight, a.grad_bias = from->grad_bias;
    a.grad_threshold = from->grad_threshold;
    cuda::backward(a, target_of(*target));
  });
}
