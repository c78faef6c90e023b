// The CPU half's entry points, twins of csrc/cuda/api.h. All memory is the caller's: the sizes
// that it must bring are asked for first. Float32 and float64.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace snnlstm::cpu {

// Sizes in bytes.
struct Sizes {
  int64_t packed_forward, packed_backward;  // pack_weight()'s result
  int64_t forward_workspace, backward_workspace;
};

Sizes sizes(const Cell& cell, int threads);

// C rounded up to whole vectors: what a pixel of saved_syn holds, and a quarter of saved_gates.
int64_t padded_channels(const Cell& cell);

// weight: (4C, Cin + C, kernel_h, kernel_w), contiguous.
void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed);

void forward(const ForwardArgs& args);
void backward(const BackwardArgs& args);

// out[k] = function(in[k]) as the kernels compute it: "exp", "sigmoid", "tanh".
void evaluate(const std::string& function, DType dtype, const void* in, void* out, int64_t count);

// The instruction sets compiled in that this processor can run, best last, and the one in use:
// the best, or what the environment variable SNNLSTM_ISA names.
std::vector<std::string> isa_names();
std::string isa_name();
void set_isa(const std::string& name);  // std::invalid_argument where it cannot run

// What each instruction set's build provides.
struct Kernels {
  Sizes (*sizes)(const Cell&, int);
  int64_t (*padded_channels)(const Cell&);
  void (*pack_weight)(const Cell&, const void*, bool, void*);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  bool (*evaluate)(const char*, DType, const void*, void*, int64_t);
};

}  // namespace snnlstm::cpu
