// Implicit GEMM without tensor cores: for float64, for float32 at full precision, for sm_75, for the
// transpose of a convolution with stride, and for every shape whose neighbourhood the tensor core
// kernels cannot keep in shared memory.
//
// A block computes 128 pixels x 32 columns; a column is an output channel, or one gate of it. K comes
// in chunks: a chunk of A is gathered from the images, a chunk of B comes from the packed weights.
// Both are double buffered, and are loaded into registers while the previous chunk is multiplied. A
// warp has 64 pixels x 16 columns, a thread 8 x 4:
//   pixels  16 i + 2 (lane % 8) + {0, 1}, i < 4      columns  4 (lane / 8) ...
//
// The packed weights of a segment are (column blocks, K, columns of a block) in the compute type.
// K = taps x channels, channels fastest, filled up with zeros to a multiple of 16.
#pragma once

#include "../gemm.h"
#include "tile.cuh"

namespace snnlstm::cuda {

namespace fma {

// The number of float32 blocks of a multiprocessor. On sm_75 its shared memory limits them to 3.
template <class R>
constexpr int kBlocks = sizeof(R) == 4 ? 3 : 1;

template <class R>
struct GemmShared {
  R vectors[5 * kColumns / 4];  // for the epilogue: 5 for a channel, or 1 for a column
  R sums[2 * kColumns];         // of the threshold's gradient, of each row of warps
  R a[2][kDepth][kTilePixels];
  R b[2][kDepth][kColumns];
  // Row and column of a tap, and the offsets of its channel and of all three: Gemm::locate().
  alignas(16) int where[2][kDepth][4];
};

// The thread's first pixel of a pair, and its first column.
SNNLSTM_DEVICE int pixel_of(int pair) {
  return int(threadIdx.x) / 64 * 64 + 16 * pair + 2 * (int(threadIdx.x) % 8);
}
SNNLSTM_DEVICE int column_of() {
  return int(threadIdx.x) / 32 % 2 * 16 + 4 * (int(threadIdx.x) % 32 / 8);
}

// acc[pair][pixel][column] += a * b for one chunk of K.
template <class R>
SNNLSTM_DEVICE void multiply(const R (&a)[kDepth][kTilePixels], const R (&b)[kDepth][kColumns],
                             R (&acc)[4][2][4]) {
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    R left[4][2], right[4];
    load_vector(&b[k][column_of()], right);
    unrolled<4>([&](int i) { load_vector(&a[k][pixel_of(i)], left[i]); });
    unrolled<4, 2>([&](int i, int px) {
      unrolled<4>([&](int c) { acc[i][px][c] += left[i][px] * right[c]; });
    });
  }
}

template <class R>
class Gemm {
 public:
  SNNLSTM_DEVICE Gemm(GemmShared<R>& shared, const Tiling& tiling, const BlockPlace& block)
      : shared_(shared), block_(block), tid_(int(threadIdx.x)) {
    const int row = tid_ / tiling.w;
    row_ = row < tiling.h ? block.y0 + row : kNowhere;
    col_ = block.x0 + tid_ % tiling.w;
  }

  // acc[pair][pixel][column] += segment * its weights.
  SNNLSTM_DEVICE void add(const Segment& s, R (&acc)[4][2][4]) {
    const int chunks = int(depth(s)) / kDepth;
    if (chunks == 0) return;
    const bool strided = s.strided_dgrad();
    const R* weight = reinterpret_cast<const R*>(static_cast<const char*>(s.weight) +
                                                 block_.column * s.weight_pitch);
    tap_ = 0;  // for locate(), like the channel
    channel_ = tid_;
    __syncthreads();  // all threads have read the previous segment
    locate(s, 0);
    locate(s, 1);
    for (int chunk = -1; chunk < chunks; ++chunk) {
      const int buffer = chunk & 1;
      if (!fault(Fault::no_fma_chunk_barrier)) __syncthreads();
      const bool more = chunk + 1 < chunks;
      if (more) {
        fetch_weights(weight + int64_t(chunk + 1) * kDepth * kColumns);
        strided ? fetch<true>(s, buffer ^ 1) : fetch<false>(s, buffer ^ 1);
      }
      if (chunk >= 0) {
        multiply(shared_.a[buffer], shared_.b[buffer], acc);
        locate(s, buffer);
      }
      if (more) put(fault(Fault::wrong_fma_buffer) ? buffer : buffer ^ 1);
    }
  }

 private:
  static constexpr int kVector = 16 / sizeof(R);  // elements in 16 bytes
  static constexpr int kOwnVectors = kDepth * kColumns / kVector / kThreads;  // of a chunk of B
  // A row or column that lies outside every image, whatever is added to it.
  static constexpr int kNowhere = -(1 << 30);

  // Writes `where` for the rows of the chunk after the next: row and column of the row's tap, the
  // offset of its channel, and of all three.
  SNNLSTM_DEVICE void locate(const Segment& s, int buffer) {
    if (tid_ >= kDepth) return;
    while (channel_ >= s.channels && tap_ < s.taps()) {
      channel_ -= s.channels;
      ++tap_;
    }
    const int shift = fault(Fault::wrong_fma_halo) ? 1 : 0;
    const int y = tap_ / s.taps_w * s.dilation_h - s.pad_h;
    const int x = tap_ % s.taps_w * s.dilation_w - s.pad_w + shift;
    const int4 nowhere = make_int4(kNowhere, kNowhere, 0, 0);
    const unsigned c = unsigned(channel_) * unsigned(s.src.c);
    store(shared_.where[buffer][tid_],
          tap_ < s.taps() ? make_int4(y, x, int(c), int(c + place(s.src, y, x))) : nowhere);
    channel_ += kDepth;
  }

  // Returns the offset of row y and column x, which is meaningless outside the image.
  SNNLSTM_DEVICE static unsigned place(const Tensor& a, int y, int x) {
    return unsigned(y) * unsigned(a.h) + unsigned(x) * unsigned(a.w);
  }

  // Loads the thread's pixel of the next chunk of A from global memory into registers. Strided: the
  // convolution is the transpose of one with stride.
  template <bool Strided>
  SNNLSTM_DEVICE void fetch(const Segment& s, int buffer) {
    const Tensor& src = s.src;
    const int top = row_ == kNowhere ? kNowhere : row_ * s.step_h, left = col_ * s.step_w;
    const unsigned from = place(src, top, left);
    with_stored<R>(src.type, [&](auto stored) {
      const auto* image = static_cast<const decltype(stored)*>(image_of(src, block_.t, block_.n));
      unrolled<kDepth>([&](int k) {
        const int4 where = load<int4>(shared_.where[buffer][k]);
        int y = top + where.x, x = left + where.y;
        bool real = true;
        unsigned at = from + unsigned(where.w);
        if constexpr (Strided) {
          real = y >= 0 && x >= 0 && y % s.dgrad_stride_h == 0 && x % s.dgrad_stride_w == 0;
          y /= s.dgrad_stride_h;
          x /= s.dgrad_stride_w;
          at = unsigned(where.z) + place(src, y, x);
        }
        real = real && inside(y, s.height) && inside(x, s.width);
        next_[k] = 0;
        if (!real) return;
        if constexpr (sizeof(stored) == 2)
          next_[k] = to_float(image[int(at)]);
        else
          next_[k] = image[int(at)];
      });
    });
  }

  SNNLSTM_DEVICE void fetch_weights(const R* weight) {
    unrolled<kOwnVectors>(
        [&](int k) { weights_[k] = load<uint4>(weight + (tid_ + k * kThreads) * kVector); });
  }

  SNNLSTM_DEVICE void put(int buffer) {
    unrolled<kDepth>([&](int k) { shared_.a[buffer][k][tid_] = next_[k]; });
    unrolled<kOwnVectors>([&](int k) {
      store(&shared_.b[buffer][0][0] + (tid_ + k * kThreads) * kVector, weights_[k]);
    });
  }

  GemmShared<R>& shared_;
  const BlockPlace& block_;
  int tid_, row_, col_;
  int tap_ = 0, channel_ = 0;
  R next_[kDepth];
  uint4 weights_[kOwnVectors];
};

}  // namespace fma

}  // namespace snnlstm::cuda
