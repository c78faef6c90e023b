// The launchers: one function a kernel, which picks the instance for the types. Each family is
// compiled in a file of its own.
#pragma once

#include "forward_fma.cuh"
#include "fire.cuh"
#include "pack.cuh"

namespace snnlstm::cuda {

void launch_pack_fma(DType dtype, const WeightMap& map, void* packed, Stream stream);
void launch_forward_fma(DType dtype, const ForwardFma& p, Stream stream);
void launch_fire(DType dtype, const FireStep& p, bool inhibition, Stream stream);

// f(S{}) with the storage type of dtype.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(fp16{});
    case DType::bfloat16:
      return f(bf16{});
  }
}

}  // namespace snnlstm::cuda
