// The launchers: one function a kernel, which picks the instance for the types. Each family is
// compiled in a file of its own.
#pragma once

#include "choose.h"
#include "fire.cuh"
#include "forward_fma.cuh"
#include "forward_mma.cuh"
#include "pack.cuh"

namespace snnlstm::cuda {

void launch_pack_fma(DType dtype, const WeightMap& map, void* packed, Stream stream);
void launch_pack_mma(Multiply multiply, DType dtype, const MmaPacking& p, int column_blocks,
                     void* packed, Stream stream);
void launch_forward_fma(DType dtype, const ForwardFma& p, Stream stream);
void launch_forward_mma(const ForwardPlan& plan, DType dtype, const ForwardMma& p, Stream stream);
void launch_fire(DType dtype, const FireStep& p, bool inhibition, Stream stream);

int64_t forward_workspace(const Cell& cell, const Target& target);
int64_t backward_workspace(const Cell& cell, const Target& target);

template <class T>
struct Type {
  using type = T;
};

// f(Type<S>) with the storage type of dtype.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>{});
    case DType::float64:
      return f(Type<double>{});
    case DType::float16:
      return f(Type<fp16>{});
    case DType::bfloat16:
      return f(Type<bf16>{});
  }
}

// f(Type<Op>, Type<S>) with the operand and the storage type of a tensor core kernel.
template <class F>
void with_operand(Multiply multiply, DType dtype, F&& f) {
  const bool single = dtype == DType::float32;
  switch (multiply) {
    case Multiply::tf32:
      return f(Type<tf32>{}, Type<float>{});
    case Multiply::tf32x3:
      return f(Type<tf32x3>{}, Type<float>{});
    case Multiply::fp16:
      return single ? f(Type<fp16>{}, Type<float>{}) : f(Type<fp16>{}, Type<fp16>{});
    case Multiply::bf16:
      return single ? f(Type<bf16>{}, Type<float>{}) : f(Type<bf16>{}, Type<bf16>{});
    default:
      return;
  }
}

}  // namespace snnlstm::cuda
