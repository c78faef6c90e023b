// Implicit GEMM without tensor cores: for float64, for GPUs before sm_80, for exact float32, and
// for every shape whose neighbourhood the tensor core kernels cannot keep in shared memory.
//
// A block computes 64 pixels x 64 columns; a column is an output channel, or one gate of it. K
// comes in chunks of 16: a chunk of A is gathered from the images, a chunk of B copied from the
// packed weights, and both are double buffered. Thread tid of 128 holds 8 pixels x 4 columns:
//   pixels  16 i + 2 (tid % 8) + {0, 1}, i < 4      columns  4 (tid / 8) ...
//
// The packed weights of a segment are (column blocks, K, 64) in the compute type. K = taps x
// channels, channels fastest, filled up with zeros to a multiple of 16.
#pragma once

#include "tile.cuh"

namespace snnlstm::cuda {

namespace fma {

constexpr int kPixels = 64, kColumns = 64, kDepth = 16, kThreads = 128;
constexpr int kLoads = kDepth * kPixels / kThreads;  // elements of A in a thread's chunk
// The pitch of the mem tile. A half warp stores pixel pairs of two channels, to different banks.
constexpr int kMemPitch = kPixels + 16;

template <class R>
struct GemmShared {
  R a[2][kDepth][kPixels];
  R b[2][kDepth][kColumns];
  int4 where[2][kDepth];    // of each row of A: channel (negative: none), row and column of its tap
  R vectors[5 * kColumns];  // for the epilogue
};

SNNLSTM_BOTH int64_t depth(const Segment& s) {
  const int64_t k = int64_t(s.taps()) * s.channels;
  return (k + kDepth - 1) / kDepth * kDepth;
}

// The thread's first pixel of a pair, and its first column.
SNNLSTM_DEVICE int pixel(int pair) { return 16 * pair + 2 * (int(threadIdx.x) % 8); }
SNNLSTM_DEVICE int column() { return 4 * (int(threadIdx.x) / 8); }

// acc[pair][pixel][column] += a * b for one chunk of K.
template <class R>
SNNLSTM_DEVICE void multiply(const R (&a)[kDepth][kPixels], const R (&b)[kDepth][kColumns],
                             R (&acc)[4][2][4]) {
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    R left[4][2], right[4];
    load_vector(&b[k][column()], right);
    unrolled<4>([&](int i) { load_vector(&a[k][pixel(i)], left[i]); });
    unrolled<4, 2>([&](int i, int px) {
      unrolled<4>([&](int c) { acc[i][px][c] += left[i][px] * right[c]; });
    });
  }
}

template <class R>
class Gemm {
 public:
  static constexpr int kVector = 16 / sizeof(R);  // elements in a 16-byte copy

  SNNLSTM_DEVICE Gemm(GemmShared<R>& shared, const Tiling& tiling, const BlockPlace& block)
      : shared_(shared), block_(block), tid_(int(threadIdx.x)) {
    unsigned row = unsigned(tid_ % kPixels);
    col_ = block.x0 + int(tiling.by_w.split(row));
    row_ = block.y0 + int(row);
    inside_ = int(row) < tiling.h;
  }

  // acc[pair][pixel][column] += segment * its weights.
  SNNLSTM_DEVICE void add(const Segment& s, R (&acc)[4][2][4]) {
    const int chunks = int(depth(s) / kDepth);
    if (chunks == 0) return;
    const R* weight = reinterpret_cast<const R*>(static_cast<const char*>(s.weight) +
                                                 block_.column * s.weight_pitch);
    tap_ = 0, channel_ = tid_;  // for locate()
    __syncthreads();            // all threads have read the segment before
    locate(s, 0);
    locate(s, 1);
    for (int chunk = -1; chunk < chunks; ++chunk) {
      const int buffer = chunk & 1;
      if (!fault(Fault::missing_wait)) cp_async_wait<0>();
      if (!fault(Fault::missing_barrier_read)) __syncthreads();
      const bool more = chunk + 1 < chunks;
      if (more) {
        copy_weights(weight + int64_t(chunk + 1) * kDepth * kColumns, buffer ^ 1);
        fetch(s, buffer ^ 1);
      }
      if (chunk >= 0) {
        multiply(shared_.a[buffer], shared_.b[buffer], acc);
        locate(s, buffer);
      }
      if (more) put(fault(Fault::missing_barrier_overwrite) ? buffer : buffer ^ 1);
    }
  }

 private:
  // Writes `where` for the rows of the chunk after the next.
  SNNLSTM_DEVICE void locate(const Segment& s, int buffer) {
    if (tid_ >= kDepth) return;
    while (channel_ >= s.channels && tap_ < s.taps()) channel_ -= s.channels, ++tap_;
    const bool real = tap_ < s.taps();
    const int shift = fault(Fault::wrong_halo) ? 1 : 0;
    store(&shared_.where[buffer][tid_],
          make_int4(real ? channel_ : -1, tap_ / s.taps_w * s.dilation_h - s.pad_h,
                    tap_ % s.taps_w * s.dilation_w - s.pad_w + shift, 0));
    channel_ += kDepth;
  }

  // Loads the next chunk of A from global memory into registers.
  SNNLSTM_DEVICE void fetch(const Segment& s, int buffer) {
    const void* image = image_of(s.src, block_.t, block_.n);
    const bool up = s.up_h.value > 1 || s.up_w.value > 1;
    unrolled<kLoads>([&](int k) {
      const int4 where =
          load<int4>(&shared_.where[buffer][tid_ / kPixels + k * (kThreads / kPixels)]);
      int y = row_ * s.step_h + where.y, x = col_ * s.step_w + where.z;
      bool real = inside_ && where.x >= 0;
      if (up) {
        unsigned row = unsigned(y), col = unsigned(x);
        real = real && y >= 0 && x >= 0 && s.up_h.split(row) == 0 && s.up_w.split(col) == 0;
        y = int(row), x = int(col);
      }
      real = real && inside(y, s.height) && inside(x, s.width);
      next_[k] = real ? read<R>(image, s.src.type, offset(s.src, where.x, y, x)) : R(0);
    });
  }

  SNNLSTM_DEVICE void put(int buffer) {
    unrolled<kLoads>([&](int k) {
      shared_.a[buffer][tid_ / kPixels + k * (kThreads / kPixels)][tid_ % kPixels] = next_[k];
    });
  }

  SNNLSTM_DEVICE void copy_weights(const R* weight, int buffer) {
    R* to = &shared_.b[buffer][0][0];
    for (int i = tid_; i < kDepth * kColumns / kVector; i += kThreads)
      cp_async(to + i * kVector, weight + i * kVector);
    cp_async_commit();
  }

  GemmShared<R>& shared_;
  const BlockPlace& block_;
  int tid_, row_, col_;
  bool inside_;
  int tap_ = 0, channel_ = 0;
  R next_[kLoads];
};

}  // namespace fma

}  // namespace snnlstm::cuda
