// What the files of one instruction set's build offer each other; table.cpp gathers it.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

void forward(const ForwardArgs& args);
void backward(const BackwardArgs& args);
int64_t forward_workspace(const Cell& cell, int threads);
int64_t backward_workspace(const Cell& cell, int threads, bool weight);
void leaky_forward(const LeakyForwardArgs& args);
void leaky_backward(const LeakyBackwardArgs& args);

SNNLSTM_END_ISA
