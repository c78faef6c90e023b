// The weight gradient of one of the two convolutions, over all time steps at once:
//   dW[(gate, c)][tap][ci] = sum over t, n, y, x of d_gates[t, n, y, x, gate, c] * in[.. + tap, ci]
// This is a GEMM whose K are the pixels of the whole sequence. K is split: each block writes a part
// of the sum, and a second kernel adds the parts in order, so that results repeat themselves.
//   parts  (splits, rows, columns): rows (gate, c) of 4 Cp, columns (tap, ci), each filled up to
//          the kernel's tiles
#pragma once

#include "fma.cuh"

namespace snnlstm::cuda {

struct WeightGradientJob {
  Segment in;     // what was convolved; in.src has all t, or if `later` is present t = 0
  Tensor later;   // the source for t = 1, 2, ... (mem after each step)
  Image d_gates;  // (T, N, Ho, Wo, 4, Cp), contiguous
  Tiling tiling;  // of all T * N images
  int Ho = 0, Wo = 0;
  int rows = 0, columns = 0;  // 4 Cp; taps * channels
  int64_t share = 0;          // of a split: pixels (fma) or tiles (mma)
  int64_t total = 0;          // pixels, or tiles
  void* parts = nullptr;
  int part_rows = 0, part_columns = 0;

  SNNLSTM_DEVICE const Tensor& source(int t) const {
    return t > 0 && later.present() ? later : in.src;
  }
  SNNLSTM_DEVICE int source_time(int t) const { return t > 0 && later.present() ? t - 1 : t; }
};

// ---- without tensor cores: a block has 64 rows x 64 columns, and takes 16 pixels at a time ------

namespace fma {
template <class R>
struct WeightGradientShared {
  R a[2][kDepth][kPixels];   // d_gates; [..][row of the gradient], where fma::multiply() has pixels
  R b[2][kDepth][kColumns];  // source
  int4 where[2][kDepth];     // t (negative: none), n, y, x
};
}  // namespace fma

// grid: (column blocks, row blocks, splits)
template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    weight_gradient_fma(const __grid_constant__ WeightGradientJob p) {
  auto& shared = shared_memory<fma::WeightGradientShared<R>>();
  const int tid = int(threadIdx.x), lane = tid % 64, first = tid / 64;
  const int row = int(blockIdx.y) * 64 + lane, column = int(blockIdx.x) * 64 + lane;
  const Segment& s = p.in;
  const int tap = column / s.channels, channel = column % s.channels;
  const int shift_y = tap / s.taps_w * s.dilation_h - s.pad_h;
  const int shift_x = tap % s.taps_w * s.dilation_w - s.pad_w;
  const int64_t begin = blockIdx.z * p.share;
  const int64_t end = begin + p.share < p.total ? begin + p.share : p.total;
  const int chunks = begin < end ? int((end - begin + fma::kDepth - 1) / fma::kDepth) : 0;

  const auto locate = [&](int chunk) {
    if (tid >= fma::kDepth) return;
    const int64_t i = begin + int64_t(chunk) * fma::kDepth + tid;
    const int64_t size = int64_t(p.Ho) * p.Wo, image = i / size;
    const int pixel = int(i % size), batch = int(p.tiling.by_batch.value);
    store(&shared.where[chunk & 1][tid], make_int4(i < end ? int(image / batch) : -1,
                                                   int(image % batch), pixel / p.Wo, pixel % p.Wo));
  };
  R next_a[fma::kLoads], next_b[fma::kLoads];
  const auto fetch = [&](int chunk) {
    unrolled<fma::kLoads>([&](int k) {
      const int4 at = load<int4>(&shared.where[chunk & 1][first + 2 * k]);
      const int64_t i = begin + int64_t(chunk) * fma::kDepth + first + 2 * k;
      next_a[k] = at.x >= 0 && row < p.rows
                      ? read<R>(p.d_gates.data, p.d_gates.type, i * p.rows + row)
                      : R(0);
      const int y = at.z * s.step_h + shift_y, x = at.w * s.step_w + shift_x;
      const bool real =
          at.x >= 0 && column < p.columns && inside(y, s.height) && inside(x, s.width);
      const Tensor& src = p.source(at.x);
      next_b[k] = real ? read<R>(image_of(src, p.source_time(at.x), at.y), src.type,
                                 offset(src, channel, y, x))
                       : R(0);
    });
  };

  // Sums of 1024 pixels are added to totals, since long sums round less in two stages.
  R acc[4][2][4] = {}, total[4][2][4] = {};
  const auto fold = [&] {
    unrolled<32>([&](int i) {
      (&total[0][0][0])[i] += (&acc[0][0][0])[i];
      (&acc[0][0][0])[i] = 0;
    });
  };
  locate(0);
  locate(1);
  for (int chunk = -1; chunk < chunks; ++chunk) {
    __syncthreads();
    const bool more = chunk + 1 < chunks;
    if (more) fetch(chunk + 1);
    if (chunk >= 0) {
      fma::multiply(shared.a[chunk & 1], shared.b[chunk & 1], acc);
      if ((chunk & 63) == 63) fold();
      locate(chunk + 2);
    }
    if (more) {
      unrolled<fma::kLoads>([&](int k) {
        shared.a[(chunk + 1) & 1][first + 2 * k][lane] = next_a[k];
        shared.b[(chunk + 1) & 1][first + 2 * k][lane] = next_b[k];
      });
    }
  }
  fold();
  R* part = static_cast<R*>(p.parts) + int64_t(blockIdx.z) * p.part_rows * p.part_columns;
  unrolled<4, 2>([&](int i, int px) {
    store_vector(part + int64_t(blockIdx.y * 64 + fma::pixel(i) + px) * p.part_columns +
                     blockIdx.x * 64 + fma::column(),
                 total[i][px]);
  });
}

constexpr int kReduceThreads = 256;

// ---- adding the parts ---------------------------------------------------------------------------

struct ReduceWeight {
  const void* parts = nullptr;
  int splits = 1, part_rows = 0, part_columns = 0;
  int channels = 0, tap_stride = 0;  // columns of the parts: tap * tap_stride + ci
  int first_channel = 0;             // among the weight's input channels
};

// Both halves of the weight in one launch.
struct ReduceWeights {
  ReduceWeight half[2];
  int C = 0, Cp = 0, taps = 1;
  int all_channels = 0;  // Cin + C
  int chunk = 32;        // input channels that a block takes
  void* grad = nullptr;  // (4C, all_channels, taps)
  DType type = DType::float32;

  SNNLSTM_BOTH int pitch() const { return taps | 1; }  // of a channel in shared memory
  SNNLSTM_BOTH int chunks(int k) const { return (half[k].channels + chunk - 1) / chunk; }
};

// A block adds the parts of one of 4C rows, for a chunk of input channels of x or of mem. The sums
// pass through shared memory, (chunk, pitch), since the parts have the channels innermost and the
// gradient has the taps.
template <class R>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_weight(const __grid_constant__ ReduceWeights p) {
  R* sums = &shared_memory<R>();
  const int row = int(blockIdx.x) % (4 * p.C);
  int chunk = int(blockIdx.x) / (4 * p.C);
  const ReduceWeight& h = job_of(p.half, p.chunks(0), chunk);
  const int c0 = chunk * p.chunk;
  const int channels = h.channels - c0 < p.chunk ? h.channels - c0 : p.chunk;
  const int gate = row / p.C, c = row % p.C;
  const R* parts = static_cast<const R*>(h.parts) + int64_t(gate * p.Cp + c) * h.part_columns + c0;
  const int64_t part = int64_t(h.part_rows) * h.part_columns;
  for (int i = int(threadIdx.x); i < p.taps * p.chunk; i += kReduceThreads) {
    const int tap = i / p.chunk, ci = i % p.chunk;
    const int tap_stride = fault(Fault::wrong_stride) ? h.channels : h.tap_stride;
    if (ci >= channels) continue;
    R sum = 0;
#pragma unroll 4
    for (int k = fault(Fault::wrong_split_k) ? 1 : 0; k < h.splits; ++k)
      sum += parts[k * part + tap * tap_stride + ci];
    sums[ci * p.pitch() + tap] = sum;
  }
  __syncthreads();
  const int64_t out = (int64_t(row) * p.all_channels + h.first_channel + c0) * p.taps;
  for (int i = int(threadIdx.x); i < channels * p.taps; i += kReduceThreads)
    write(p.grad, p.type, out + i, sums[i / p.taps * p.pitch() + i % p.taps]);
}

// ---- sums of columns ----------------------------------------------------------------------------

// The gradient of the bias is the sum of d_gates over pixels. sum_gates() writes parts of it, which
// reduce_sums() adds.
struct SumGates {
  const void* d_gates = nullptr;  // (pixels, columns), contiguous
  DType type = DType::float32;
  int64_t pixels = 0, share = 0;  // in all steps; in a part
  int columns = 0;                // 4 Cp
  void* parts = nullptr;          // (splits, columns) in the compute type
};

// A thread takes 4 columns of every 32nd pixel.
constexpr int kSumThreads = 256, kSumColumns = 32;

template <class R>
struct SumShared {
  R sum[kSumThreads / 8][kSumColumns];
};

// grid: (columns / 32, splits)
template <class R>
__global__ void __launch_bounds__(kSumThreads) sum_gates(const __grid_constant__ SumGates p) {
  auto& shared = shared_memory<SumShared<R>>();
  constexpr int kRows = kSumThreads / 8;
  const int row = int(threadIdx.x) / 8, column = int(threadIdx.x) % 8 * 4;
  const int64_t begin = blockIdx.y * p.share;
  const int64_t end = begin + p.share < p.pixels ? begin + p.share : p.pixels;
  const int first = int(blockIdx.x) * kSumColumns + column;
  R sum[4] = {};
#pragma unroll 4
  for (int64_t i = begin + row; i < end; i += kRows) {
    R v[4];
    read_vector<R>(p.d_gates, p.type, i * p.columns + first, v);
    unrolled<4>([&](int k) { sum[k] += v[k]; });
  }
  store_vector(&shared.sum[row][column], sum);
  if (!fault(Fault::missing_barrier_read, 6)) __syncthreads();
  const int own = int(threadIdx.x);
  if (own >= kSumColumns) return;
  R total = 0;
#pragma unroll
  for (int i = fault(Fault::wrong_split_k, 1) ? 1 : 0; i < kRows; ++i) total += shared.sum[i][own];
  static_cast<R*>(p.parts)[int64_t(blockIdx.y) * p.columns + blockIdx.x * kSumColumns + own] =
      total;
}

// out[k * columns + c] = sum over blocks b of parts[b][k][c].
struct ReduceSums {
  const void* parts = nullptr;  // (blocks, rows, pitch) in the compute type
  int64_t blocks = 0;
  int rows = 1, pitch = 0, columns = 0;
  void* out = nullptr;
  DType type = DType::float32;
};

template <class R>
struct ReduceShared {
  R sum[kReduceThreads / 32][32];
};

// grid: (columns / 32, rows)
template <class R>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_sums(const __grid_constant__ ReduceSums p) {
  auto& shared = shared_memory<ReduceShared<R>>();
  constexpr int kRows = kReduceThreads / 32;
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32;
  const int c = int(blockIdx.x) * 32 + lane, k = int(blockIdx.y);
  const R* from = static_cast<const R*>(p.parts) + int64_t(k) * p.pitch + c;
  R sum = 0;
  if (c < p.columns)
    for (int64_t b = row; b < p.blocks; b += kRows) sum += from[b * p.rows * p.pitch];
  shared.sum[row][lane] = sum;
  __syncthreads();
  if (row > 0 || c >= p.columns) return;
  for (int i = 1; i < kRows; ++i) sum += shared.sum[i][lane];
  write(p.out, p.type, k * p.columns + c, sum);
}

}  // namespace snnlstm::cuda
