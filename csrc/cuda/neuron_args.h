// From the caller's arguments to what the neurons' kernels take, for one time step.
#pragma once

#include "neuron_backward.cuh"
#include "plan.h"

namespace snnlstm::cuda {

template <class Args>
Fire fire_of(const Args& a, const View& spk, int64_t t, int held) {
  const Cell& c = a.cell;
  Fire f;
  f.C = int(c.C), f.Hp = int(c.Hp()), f.Wp = int(c.Wp());
  f.pool = c.pool, f.pool_h = c.pool_h, f.pool_w = c.pool_w;
  f.num_levels = c.num_levels, f.levels = a.levels;
  f.threshold = a.threshold, f.threshold_stride = a.threshold_stride;
  f.graded = a.graded_factor;
  f.spk = tensor(spk, c.dtype, t, {1, c.N, c.C, c.Hp(), c.Wp()}, held);
  return f;
}

// What the kernels of both passes take; spk: of step t, or its gradient.
template <class Neuron, class Args>
Neuron neuron_of_step(const Args& a, const View& spk, int64_t t, int held) {
  const Cell& c = a.cell;
  Neuron n;
  n.C = int(c.C), n.Cp = int(Shape(c).Cp), n.Ho = int(c.Ho()), n.Wo = int(c.Wo());
  n.reset = c.reset;
  n.fire = fire_of(a, spk, t, held);
  return n;
}

inline Tensor state_tensor(const Cell& c, const View& v, int64_t t, int held) {
  return tensor(v, c.dtype, t, {1, c.N, c.C, c.Ho(), c.Wo()}, held);
}

// Has the states before the first step, and those after step t where the caller wants them; held:
// channels that a thread holds.
inline NeuronForward neuron_forward(const ForwardArgs& a, int64_t t, int held) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronForward>(a, a.spk, t, held);
  n.bias = a.bias;
  n.syn_in = state_tensor(c, a.syn0, 0, held), n.mem_in = state_tensor(c, a.mem0, 0, held);
  if (a.record || t == c.T - 1)
    n.syn_out = state_tensor(c, a.syn, t, held), n.mem_out = state_tensor(c, a.mem, t, held);
  return n;
}

// Has syn before the first step, and the caller's gradients of step t.
inline NeuronBackward neuron_backward(const BackwardArgs& a, int64_t t) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronBackward>(a, a.grad_spk, t, 4);
  n.surrogate = c.surrogate, n.p0 = c.surrogate_p0, n.p1 = c.surrogate_p1;
  n.noise = tensor(a.noise, c.dtype, t, {1, c.N, c.C, c.Hp(), c.Wp()}, 4);
  n.winner = c.inhibition ? a.winner + t * c.N : nullptr;
  n.syn_prev = state_tensor(c, a.syn0, 0, 4);
  if (a.record || t == c.T - 1) {
    n.grad_syn = state_tensor(c, a.grad_syn, a.record ? t : 0, 4);
    n.grad_mem = state_tensor(c, a.grad_mem, a.record ? t : 0, 4);
  }
  return n;
}

}  // namespace snnlstm::cuda
