// Instantiates linear layers of spikes for one instruction set.
#include "linear.h"

#include "entry.h"

SNNLSTM_BEGIN_ISA

double linear_look(const LinearArgs& a) { return Linear::look(a); }

int64_t linear_bytes(int64_t K, int64_t Out) { return Linear::packed_bytes(K, Out); }

void linear_pack(int64_t K, int64_t Out, int threads, const float* weight, float* packed) {
  Linear::pack(K, Out, threads, weight, packed);
}

int64_t linear_workspace(const LinearArgs& a, bool backward) {
  return Linear::workspace(a, backward);
}

Listed linear_forward(const LinearForwardArgs& a) { return Linear::forward(a); }

void linear_backward(const LinearBackwardArgs& a) { Linear::backward(a); }

SNNLSTM_END_ISA
