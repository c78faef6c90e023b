// The entry points of one instruction set, which table.cpp collects.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

void forward(const ForwardArgs& args);
void backward(const BackwardArgs& args);
int64_t forward_workspace(const Cell& cell, int threads);
int64_t backward_workspace(const Cell& cell, int threads, bool weight);
void leaky_forward(const LeakyForwardArgs& args);
void leaky_backward(const LeakyBackwardArgs& args);
void pool_forward(const PoolForwardArgs& args);
void pool_backward(const PoolBackwardArgs& args);
int64_t batch_norm_workspace(const BatchNormArgs& args);
void batch_norm_forward(const BatchNormForwardArgs& args);
void batch_norm_backward(const BatchNormBackwardArgs& args);
// csrc/testing/evaluate.cpp
bool evaluate(const char* name, DType dtype, const void* in, void* out, int64_t count);

SNNLSTM_END_ISA
