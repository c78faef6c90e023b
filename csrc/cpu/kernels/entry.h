// The entry points of one instruction set, which table.cpp collects.
#pragma once

#include "simd.h"

SNNLSTM_BEGIN_ISA

void forward(const ForwardArgs& args);
void backward(const BackwardArgs& args);
void convolve(const ConvolutionArgs& args);
int64_t convolution_workspace(const Cell& cell, int threads, bool backward);
int64_t forward_workspace(const Cell& cell, int threads);
int64_t backward_workspace(const Cell& cell, int threads, bool weight);
void leaky_forward(const LeakyForwardArgs& args);
void leaky_backward(const LeakyBackwardArgs& args);
void pool_forward(const PoolForwardArgs& args);
void pool_backward(const PoolBackwardArgs& args);
int64_t batch_norm_workspace(const BatchNormArgs& args);
void batch_norm_forward(const BatchNormForwardArgs& args);
void batch_norm_backward(const BatchNormBackwardArgs& args);
double linear_look(const LinearArgs& args);
int64_t linear_bytes(int64_t K, int64_t Out);
void linear_pack(int64_t K, int64_t Out, int threads, const float* weight, float* packed);
int64_t linear_workspace(const LinearArgs& args, bool backward);
Listed linear_forward(const LinearForwardArgs& args);
void linear_backward(const LinearBackwardArgs& args);
// csrc/testing/evaluate.cpp
bool evaluate(const char* name, DType dtype, const void* in, void* out, int64_t count);

SNNLSTM_END_ISA
