// The caller's tensors and our own images, as kernels take them.
#pragma once

#include "../args.h"
#include "half.cuh"

namespace snnlstm::cuda {

SNNLSTM_BOTH int bytes_of(DType type) {
  return type == DType::float32 ? 4 : type == DType::float64 ? 8 : 2;
}

// How patches (tensor.cuh) are accessed.
enum class Access : int {
  none,      // no tensor
  scalar,    // element by element
  rows,      // the channel's 2 pixels as one vector
  channels,  // the pixel's CH channels as one vector
};

// (T, N, channels, H, W), strides in elements. A tensor may have any size, but an image of it
// reaches over less than 2^31 elements. In images of ours, (T, N, H, W, planes, Cp), the vectors of
// every pixel are aligned.
struct Tensor {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int c = 0, h = 0, w = 0, plane = 0;  // ours: 4 planes if there is one for each gate
  int channels = 0;  // load_patch() gives 0 for channels beyond, store_patch() drops them
  Access access = Access::none;
  DType type = DType::float32;

  SNNLSTM_BOTH bool present() const { return access != Access::none; }
};

}  // namespace snnlstm::cuda
