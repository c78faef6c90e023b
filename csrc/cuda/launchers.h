// The launchers, each in the file that is named after its kernels, and what they share.
#pragma once

#include "kernels/add_gradients.cuh"
#include "kernels/fire.cuh"
#include "kernels/weight_gradient.cuh"
#include "launch.cuh"
#include "planning.h"

namespace snnlstm::cuda {

struct BackwardSteps;

void launch_fire(const FireStep& p, void* stream);

// Brings the gradients of pooled spikes to p's neurons, by way of `spikes`, if there are any.
void launch_spread(NeuronBackward& p, const Tensor& spikes, int64_t N, void* stream);

// The tensors from which the gradients of weight and bias are summed, and memory for the parts.
struct WeightSources {
  Tensor x;                             // (T, N, Cin, H, W)
  Tensor mem;                           // before the first step
  Tensor mem_later;                     // after each step; absent if there is one step
  void* d_gates = nullptr;              // (T, N, Ho, Wo, 4, Cp)
  void* parts[2] = {nullptr, nullptr};  // of x's and of mem's half of the weight
  void* bias_parts = nullptr;
  const int64_t* lengths = nullptr;  // as PassArgs::lengths
};
// Sums the gradients of weight and bias, if they have an address, in parts. Sets p to how these
// parts are to be added.
void weight_gradient(const BackwardSteps& steps, const WeightSources& sources, void* weight,
                     void* bias, AddGradients& p, void* stream);
// type: of the sums.
void launch_add_gradients(AddGradients p, DType type, void* stream);

// Calls f(E{}), E the type of elements that tensor core kernels are compiled for.
template <class F>
void with_element(Multiply multiply, F&& f) {
  if (multiply == Multiply::fp16) return f(fp16{});
  if (multiply == Multiply::bf16) return f(bf16{});
  f(float{});
}

// Calls f(R{}), R the type that the kernels compute in.
template <class F>
void with_real(DType type, F&& f) {
  type == DType::float64 ? f(double{}) : f(float{});
}

// ---- the caller's arguments as the neurons' kernels take them -----------------------------------
//
// t: the launch's step. per_thread: channels of a thread. spk: spikes forward, their gradient
// backward.

template <class Step, class Args>
Step neuron_of_step(const Args& a, const View& spk, int64_t t, int per_thread) {
  const Cell& c = a.cell;
  Step n;
  n.C = int(c.C);
  n.Cp = int(Shape(c).Cp);
  n.Ho = int(c.Ho());
  n.Wo = int(c.Wo());
  n.reset = c.reset;
  Fire& f = n.fire;
  f.spiking = c.spiking;
  f.C = int(c.C);
  f.Hp = int(c.Hp());
  f.Wp = int(c.Wp());
  f.pool = c.pool;
  f.pool_h = c.pool_h;
  f.pool_w = c.pool_w;
  f.num_levels = c.num_levels;
  f.levels = a.levels;
  f.threshold = a.threshold;
  f.threshold_stride = a.threshold_stride;
  f.graded = a.graded_factor;
  f.lengths = a.lengths;
  f.step = int(t);
  f.spk = tensor(spk, c.dtype, t, {1, c.N, c.C, c.Hp(), c.Wp()}, per_thread);
  if (a.argmax && c.pool == Pool::max)
    f.argmax = static_cast<char*>(a.argmax) + t * c.N * c.C * c.Hp() * c.Wp() * c.argmax_bytes();
  return n;
}

inline Tensor state_tensor(const Cell& c, const View& v, int64_t t, int per_thread) {
  return tensor(v, c.dtype, t, {1, c.N, c.C, c.Ho(), c.Wo()}, per_thread);
}

// Returns the caller's states of step t, or their gradients, if any. If samples have lengths, each
// step may be the last one for some.
template <class Args>
Tensor states_of_step(const Args& a, const View& v, int64_t t, int per_thread) {
  if (a.record) return state_tensor(a.cell, v, t, per_thread);
  return t + 1 == a.cell.T || a.lengths ? state_tensor(a.cell, v, 0, per_thread) : Tensor();
}

// Sets the states before the first step, and those after step t that the caller wants.
inline NeuronForward neuron_forward(const ForwardArgs& a, int64_t t, int per_thread) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronForward>(a, a.spk, t, per_thread);
  n.bias = a.bias;
  n.syn_in = state_tensor(c, a.syn0, 0, per_thread);
  n.mem_in = state_tensor(c, a.mem0, 0, per_thread);
  n.syn_out = states_of_step(a, a.syn, t, per_thread);
  n.mem_out = states_of_step(a, a.mem, t, per_thread);
  return n;
}

// Sets syn before the first step, and the caller's gradients of step t.
inline NeuronBackward neuron_backward(const BackwardArgs& a, int64_t t) {
  const Cell& c = a.cell;
  auto n = neuron_of_step<NeuronBackward>(a, a.grad_spk, t, 4);
  n.surrogate = c.surrogate;
  n.p0 = c.surrogate_p0;
  n.p1 = c.surrogate_p1;
  n.syn_prev = state_tensor(c, a.syn0, 0, 4);
  n.grad_syn = states_of_step(a, a.grad_syn, t, 4);
  n.grad_mem = states_of_step(a, a.grad_mem, t, 4);
  n.at_ends = a.lengths != nullptr && !a.record;
  return n;
}

}  // namespace snnlstm::cuda
