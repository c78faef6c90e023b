// How images are cut into tiles, and what a convolution reads.
//
//      x0       x0 + w
//   y0 +-----------+        One block computes one tile of one image for one group of output
//      | m = 0 1 2 |        channels. Pixel m of the tile is (y0 + m / w, x0 + m % w). The tile's
//      |  w  ...   |        shape follows from the image's: full rows where it is narrow, so that
//      +-----------+ y0 + h neighbouring pixels are neighbours in memory, too (planning.cpp: cut()).
// The channel group counts fastest in a block's number: blocks of the same pixels run together.
#pragma once

#include "../args.h"

#if defined(__CUDACC__)
#define SNNLSTM_BOTH __host__ __device__ __forceinline__
#define SNNLSTM_DEVICE __device__ __forceinline__
#else
#define SNNLSTM_BOTH inline
#define SNNLSTM_DEVICE inline
#endif

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
// spans less than 2^31 elements. In our own images, (T, N, H, W, planes, Cp), the vectors of every
// pixel are aligned.
struct Tensor {
  void* data = nullptr;
  int64_t t = 0, n = 0;
  int c = 0, h = 0, w = 0, plane = 0;  // saved gates and d_gates have 4 planes, others one
  int channels = 0;  // load_patch() gives 0 for channels beyond, store_patch() drops them
  Access access = Access::none;
  DType type = DType::float32;

  SNNLSTM_BOTH bool present() const { return access != Access::none; }
};

// Compares 0 <= i < n in one instruction.
SNNLSTM_BOTH bool inside(int i, int n) { return unsigned(i) < unsigned(n); }

struct Tiling {
  int h = 1, w = 1;        // pixels of a tile
  int rows = 1, cols = 1;  // of tiles, in an image
  int columns = 1;         // channel groups
  int batch = 1;           // images of a time step
  int64_t images = 0;      // of the launch: batch, or batch * T

  int64_t tiles() const { return images * rows * cols; }
  int64_t blocks() const { return tiles() * columns; }
};

// Two jobs of one launch, each on other data.
template <class Job>
struct Jobs {
  Job job[2];
};

// One of the images that a convolution sums over, K = taps x channels. For output pixel (y, x), tap
// (i, j) reads row (y * step_h + i * dilation_h - pad_h) / dgrad_stride_h of the source, or 0 if
// that is not an integer or lies outside the image; the column likewise.
struct Segment {
  Tensor src;        // (T, N, channels, height, width)
  int channels = 0;  // 0: the segment is absent
  int height = 0, width = 0;
  int taps_h = 1, taps_w = 1;
  int dilation_h = 1, dilation_w = 1;
  int pad_h = 0, pad_w = 0;
  int step_h = 1, step_w = 1;                  // stride of the convolution
  int dgrad_stride_h = 1, dgrad_stride_w = 1;  // stride of the convolution whose transpose this is
  const void* weight = nullptr;  // packed as fma.cuh says, first column block; mma: in MmaConv
  int64_t weight_pitch = 0;      // bytes from one column block to the next

  SNNLSTM_BOTH int taps() const { return taps_h * taps_w; }
  SNNLSTM_BOTH bool strided_dgrad() const { return dgrad_stride_h > 1 || dgrad_stride_w > 1; }
};

}  // namespace snnlstm::cuda
