// The weight gradient of one of the two convolutions, over all time steps at once:
//   dW[(gate, c)][tap][ci] = sum over t, n, y, x of d_gates[t, n, y, x, gate, c] * in[.. + tap, ci]
// This is a GEMM whose K counts the pixels of the whole sequence. K is split: each block writes a
// part of the sum, and a second kernel adds the parts in order, so that results are reproducible.
//   parts  (splits, rows, columns): rows (gate, c) of 4 Cp, columns (tap, ci), each filled up to
//          the kernel's tiles
#pragma once

#include "fma.cuh"

namespace snnlstm::cuda {

struct WeightGradientJob {
  Segment in;      // what was convolved; in.src has all t, or if `later` is present t = 0
  Tensor later;    // the source for t = 1, 2, ... (mem after each step)
  Tensor d_gates;  // (T, N, Ho, Wo, 4, Cp), contiguous
  Tiling tiling;   // of all T * N images; fma: tiles of one pixel
  int Ho = 0, Wo = 0;
  int rows = 0, columns = 0;  // 4 Cp; taps * channels
  int64_t share = 0;          // of a split: pixels (fma) or tiles (mma)
  int64_t total = 0;          // pixels, or tiles
  void* parts = nullptr;
  int part_rows = 0, part_columns = 0;
  const int64_t* lengths = nullptr;  // (N,) steps of each sample, or null

  SNNLSTM_DEVICE const Tensor& source(int t) const {
    return t > 0 && later.present() ? later : in.src;
  }
  SNNLSTM_DEVICE int source_time(int t) const { return t > 0 && later.present() ? t - 1 : t; }
};

// ---- the gradient of the bias -------------------------------------------------------------------

// The gradient of the bias is the sum of d_gates over pixels. The blocks after those of the weight
// write parts of it, each for 32 columns.
struct SumGates {
  const void* d_gates = nullptr;  // (pixels, columns), contiguous
  DType type = DType::float32;
  int64_t pixels = 0, share = 0;        // in all steps; in a part
  int columns = 0;                      // 4 Cp
  int splits = 0;                       // 0: the sums are not needed
  void* parts = nullptr;                // (splits, columns) in the compute type
  const int64_t* lengths = nullptr;     // (batch,) steps of each sample, or null
  int64_t batch = 1, image_pixels = 1;  // images of a step; pixels of an image

  SNNLSTM_BOTH int blocks() const { return splits * (columns / 32); }
};

template <class R>
struct SumShared {
  R sum[kThreads / 8][32];
};

// A thread takes 4 columns of every 16th pixel.
template <class R>
SNNLSTM_DEVICE void sum_gates(const SumGates& p, int index) {
  auto& shared = shared_memory<SumShared<R>>();
  constexpr int rows = kThreads / 8;
  const int row = int(threadIdx.x) / 8, column = int(threadIdx.x) % 8 * 4;
  const int split = index / (p.columns / 32), first = index % (p.columns / 32) * 32;
  const int64_t begin = split * p.share;
  const int64_t end = begin + p.share < p.pixels ? begin + p.share : p.pixels;
  R sum[4] = {};
#pragma unroll 4
  for (int64_t i = begin + row; i < end; i += rows) {
    if (p.lengths != nullptr) {
      const int64_t image = i / p.image_pixels;
      if (p.lengths[image % p.batch] <= image / p.batch) continue;
    }
    R v[4];
    read_vector<R>(p.d_gates, p.type, i * p.columns + first + column, v);
    unrolled<4>([&](int k) { sum[k] += v[k]; });
  }
  store_vector(&shared.sum[row][column], sum);
  if (!fault(Fault::no_bias_barrier)) __syncthreads();
  const int lane = int(threadIdx.x);
  if (lane >= 32) return;
  R total = 0;
  for (int i = fault(Fault::lost_bias_row) ? 1 : 0; i < rows; ++i) total += shared.sum[i][lane];
  static_cast<R*>(p.parts)[int64_t(split) * p.columns + first + lane] = total;
}

// ---- without tensor cores -----------------------------------------------------------------------
//
// A launch sums both halves, whose columns lie side by side in the parts: (tap, ci) of x, then of
// mem. A block takes 16 pixels of the sequence at a time. It has 32 rows and 128 columns of the
// gradient, where fma::multiply() has columns and pixels.

namespace fma {
// A pixel of the sequence: its place in both sources at tap 0, 0 and channel 0, if there were no
// padding; its row and column (kNowhere if there is no such pixel); whether it has t > 0.
struct alignas(16) SourcePixel {
  const char* source[2];
  int y, x, later, unused;
};

template <class R>
struct WeightGradientShared {
  R a[2][kDepth][kTilePixels];  // sources
  R b[2][kDepth][kColumns];     // d_gates
  SourcePixel where[2][kDepth];
};
}  // namespace fma

template <class R>
class WeightGradientFma {
 public:
  SNNLSTM_DEVICE WeightGradientFma(const Jobs<WeightGradientJob>& p)
      : p_(p),
        job_(p.job[0]),
        shared_(shared_memory<fma::WeightGradientShared<R>>()),
        tid_(int(threadIdx.x)) {
    row_ = first_row();
    int column = first_column() + tid_;
    half_ = column < job_.columns ? 0 : 1;
    if (half_ == 1) column -= job_.columns;
    const WeightGradientJob& job = p.job[half_];
    const Segment& s = job.in;
    has_column_ = column < job.columns;
    const int tap = column / s.channels, channel = column % s.channels;
    shift_y_ = tap / s.taps_w * s.dilation_h - s.pad_h;
    shift_x_ = tap % s.taps_w * s.dilation_w - s.pad_w;
    const auto shift = [&](const Tensor& a) {
      return unsigned(channel) * unsigned(a.c) + unsigned(shift_y_) * unsigned(a.h) +
             unsigned(shift_x_) * unsigned(a.w);
    };
    shift_ = int(shift(s.src));
    shift_later_ = int(shift(job.later));
    const auto is_float = [](const WeightGradientJob& half) {
      return half.in.src.type == DType::float32 &&
             (!half.later.present() || half.later.type == DType::float32);
    };
    floats_ = is_float(p.job[0]) && is_float(p.job[1]);

    begin_ = split() * job_.share;
    end_ = begin_ + job_.share < job_.total ? begin_ + job_.share : job_.total;
    const int64_t first = begin_ + tid_, size = int64_t(job_.Ho) * job_.Wo;
    const int64_t image = first / size;
    pixel_ = int(first % size);
    n_ = int(image % job_.tiling.batch);
    t_ = int(image / job_.tiling.batch);
  }

  SNNLSTM_DEVICE void run() {
    const int chunks = begin_ < end_ ? int((end_ - begin_ + fma::kDepth - 1) / fma::kDepth) : 0;
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
        fma::multiply(shared_.a[chunk & 1], shared_.b[chunk & 1], acc);
        if ((chunk & 63) == 63) fold();
        locate(chunk + 2);
      }
      if (more) put((chunk + 1) & 1);
    }
    fold();
    R* part = static_cast<R*>(job_.parts) + int64_t(split()) * job_.part_rows * job_.part_columns;
    const int row = first_row() + fma::column_of(), column = first_column();
    unrolled<4, 4>([&](int i, int c) {
      const R pair[2] = {total[i][0][c], total[i][1][c]};
      store_vector(part + int64_t(row + c) * job_.part_columns + column + fma::pixel_of(i), pair);
    });
  }

 private:
  static constexpr int kQuads = fma::kColumns / 4;  // of a row of B: a thread has one in all rows
  static constexpr int kNowhere = -(1 << 30);

  // The block's place. Columns count fastest, then rows, then splits.
  SNNLSTM_DEVICE int column_blocks() const { return job_.part_columns / kTilePixels; }
  SNNLSTM_DEVICE int row_blocks() const { return job_.part_rows / fma::kColumns; }
  SNNLSTM_DEVICE int first_column() const {
    return int(blockIdx.x) % column_blocks() * kTilePixels;
  }
  SNNLSTM_DEVICE int first_row() const {
    return int(blockIdx.x) / column_blocks() % row_blocks() * fma::kColumns;
  }
  SNNLSTM_DEVICE int split() const { return int(blockIdx.x) / column_blocks() / row_blocks(); }

  // Writes `where` for a chunk; chunks come in order.
  SNNLSTM_DEVICE void locate(int chunk) {
    if (tid_ >= fma::kDepth) return;
    const int image_pixels = job_.Ho * job_.Wo, images = n_ + pixel_ / image_pixels;
    pixel_ %= image_pixels;
    n_ = images % job_.tiling.batch;
    t_ += images / job_.tiling.batch;
    const int y = pixel_ / job_.Wo, x = pixel_ % job_.Wo;
    fma::SourcePixel& at = shared_.where[chunk & 1][tid_];
    const bool real = begin_ + int64_t(chunk) * fma::kDepth + tid_ < end_ &&
                      (job_.lengths == nullptr || job_.lengths[n_] > t_);
    store(&at.y, make_int4(real ? y : kNowhere, x, t_ > 0 ? 1 : 0, 0));
    unrolled<2>([&](int half) {
      const WeightGradientJob& job = p_.job[half];
      const Tensor& a = job.source(t_);
      const auto* image_of_t = static_cast<const char*>(image_of(a, job.source_time(t_), n_));
      const unsigned from = unsigned(y) * unsigned(job.in.step_h) * unsigned(a.h) +
                            unsigned(x) * unsigned(job.in.step_w) * unsigned(a.w);
      store(&at.source[half], image_of_t + int64_t(from) * bytes_of(a.type));
    });
    pixel_ += fma::kDepth;
  }

  SNNLSTM_DEVICE void fetch(int chunk) {
    if (sizeof(R) == 4 && floats_)
      fetch_sources(chunk, [](const char* at, int shift, DType) {
        return R(reinterpret_cast<const float*>(at)[shift]);
      });
    else
      fetch_sources(chunk,
                    [](const char* at, int shift, DType type) { return read<R>(at, type, shift); });
    const int row = row_ + tid_ % kQuads * 4;
    const int64_t pixel = begin_ + int64_t(chunk) * fma::kDepth + tid_ / kQuads;
    clear<4>(gates_);
    const int y = load<int4>(&shared_.where[chunk & 1][tid_ / kQuads].y).x;
    if (pixel < end_ && y != kNowhere && row < job_.rows)
      read_vector<R>(job_.d_gates.data, job_.d_gates.type, pixel * job_.rows + row, gates_);
  }

  // read_one(address, elements after it, type)
  template <class ReadOne>
  SNNLSTM_DEVICE void fetch_sources(int chunk, ReadOne&& read_one) {
    const WeightGradientJob& job = p_.job[half_];
    const Segment& s = job.in;
    const bool has_later = job.later.present();
    unrolled<fma::kDepth>([&](int k) {
      const fma::SourcePixel& pixel = shared_.where[chunk & 1][k];
      const int4 at = load<int4>(&pixel.y);
      const char* source = load<const char*>(&pixel.source[half_]);
      const bool later = has_later && at.z != 0;
      const bool real = has_column_ && at.x != kNowhere &&
                        inside(at.x * s.step_h + shift_y_, s.height) &&
                        inside(at.y * s.step_w + shift_x_, s.width);
      sources_[k] = 0;
      if (real)
        sources_[k] =
            read_one(source, later ? shift_later_ : shift_, later ? job.later.type : s.src.type);
    });
  }

  SNNLSTM_DEVICE void put(int buffer) {
    unrolled<fma::kDepth>([&](int k) { shared_.a[buffer][k][tid_] = sources_[k]; });
    store_vector(&shared_.b[buffer][tid_ / kQuads][tid_ % kQuads * 4], gates_);
  }

  const Jobs<WeightGradientJob>& p_;
  const WeightGradientJob& job_;  // d_gates, parts and shares are the same in both jobs
  fma::WeightGradientShared<R>& shared_;
  int tid_, row_;  // the block's first row
  int half_, shift_y_, shift_x_;
  int shift_, shift_later_;  // elements from a pixel to the thread's tap and channel
  bool has_column_, floats_;
  int64_t begin_, end_;
  int pixel_, n_, t_;  // of the next chunk: the thread's pixel of an image, its sample and time
  R sources_[fma::kDepth], gates_[4];
};

struct WeightGradientsFma : Jobs<WeightGradientJob> {
  int blocks = 0;  // of the weight
  SumGates bias;
};

template <class R>
__global__ void __launch_bounds__(kThreads, fma::kBlocks<R>)
    weight_gradient_fma(const __grid_constant__ WeightGradientsFma p) {
  if (int(blockIdx.x) < p.blocks)
    WeightGradientFma<R>(p).run();
  else
    sum_gates<R>(p.bias, int(blockIdx.x) - p.blocks);
}

}  // namespace snnlstm::cuda
