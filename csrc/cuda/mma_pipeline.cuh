// What a convolution multiplies on its way through shared memory: the neighbourhood of a tile, a
// chunk of channels at a time (mma_source.cuh), and the weights, as one stream of units through a
// ring of stages. The pipeline owns both; a block's loop is
//
//   for (pipeline.start(); pipeline.working(); pipeline.end_chunk()) {
//     pipeline.begin_chunk();
//     // for each tap of pipeline.segment(), and each of its pipeline.steps():
//     //   begin_step(); multiply what lies in chunk() by the unit at weights(); end_step(its
//     bytes);
//   }
//   pipeline.finish();
//
// and all threads run it. While one chunk is multiplied the next one is on its way.
//
//   neighbourhood, 2 buffers       weights, kStages stages of a few units
//     pixel | 4 groups of 16 B       unit: [warp column][pair of n-tiles][lane][16 bytes]
//     ...                            a lane's 16 bytes are the B fragments of a pair
#pragma once

#include "mma_source.cuh"

namespace snnlstm::cuda {

namespace mma_gemm {
constexpr int kStages = 4;
}

struct MmaConv {
  Multiply multiply = Multiply::tf32;
  MmaSegment segment[2];
  int segments = 0;
  int units = 0;                 // of all segments
  const void* weight = nullptr;  // first unit of the first column block
  int64_t weight_pitch = 0;      // bytes from one column block to the next
  int warp_columns = 1;
  int k_groups = 1;  // of warps, 1 or 2: the second takes the odd k-steps (only without AnyFeed)
  int unit_bytes = 0, stage_units = 1;
  int buffer_bytes = 0;  // of one neighbourhood buffer

  SNNLSTM_BOTH int stage_bytes() const { return stage_units * unit_bytes; }
  SNNLSTM_BOTH int shared_bytes() const {
    int taps = 0;
    for (int k = 0; k < segments; ++k) taps += segment[k].taps;
    return 2 * buffer_bytes + mma_gemm::kStages * stage_bytes() + 64 + 16 * taps;
  }
};

// Element, AnyFeed: see MmaSource.
template <class Element, bool AnyFeed>
class MmaPipeline {
 public:
  SNNLSTM_DEVICE MmaPipeline(const MmaConv& p, unsigned char* shared, const Tiling& tiling,
                             const Block& block)
      : p_(p),
        shared_(shared),
        stages_(shared + 2 * p.buffer_bytes),
        weight_(static_cast<const unsigned char*>(p.weight) + block.column * p.weight_pitch),
        source_(p.multiply, tiling) {
    source_.move_to(block);
  }

  // Begins to load the first two chunks and the first stages.
  SNNLSTM_DEVICE void start() {
    // 64 zero bytes behind the stages, for rows that have no source
    if (threadIdx.x < 4) store(zeros() + 16 * threadIdx.x, make_uint4(0, 0, 0, 0));
    working_ = more_ = p_.segments > 0;
#pragma unroll 1
    for (int buffer = 0; buffer < 2 && more_; ++buffer) {
      const MmaSegment& seg = p_.segment[loaded_.segment];
      source_.start(seg, loaded_.chunk, buffer_at(buffer), true);
      source_.template finish<3>(seg);
      more_ = advance(loaded_);
    }
    for (int k = 0; k < mma_gemm::kStages - 1; ++k) copy_stage();
  }
  SNNLSTM_DEVICE bool working() const { return working_; }

  // After this the chunk's data is there for all threads, and the other buffer is free: the next
  // chunk begins to come there, but for the second, which is there already.
  SNNLSTM_DEVICE void begin_chunk() {
    if (!fault(Fault::missing_wait, 2)) {
      if (first_) {
        cp_async_wait<mma_gemm::kStages - 2>();
      } else if (stages_since_load_ < mma_gemm::kStages) {
        // Short chunks; long ones have waited for their copies at their stages.
        cp_async_commit();
        cp_async_wait<0>();
      }
    }
    if (!fault(Fault::missing_barrier_overwrite, 1)) __syncthreads();
    loading_ = !first_ && more_;
    stages_since_load_ = loading_ ? 0 : mma_gemm::kStages;
    if (loading_) source_.start(next(), loaded_.chunk, buffer_at(buffer_ ^ 1), loaded_.chunk < 2);
  }
  SNNLSTM_DEVICE void end_chunk() {
    if (loading_) {
      source_.end(next());  // and what there was no turn for:
      source_.template finish<1>(next());
      more_ = advance(loaded_);
    }
    working_ = advance(at_);
    buffer_ ^= 1, first_ = false;
  }

  SNNLSTM_DEVICE void begin_step() {
    if (weights_at_ == stage_end_) next_stage();
  }
  SNNLSTM_DEVICE void end_step(int bytes) { weights_at_ += bytes; }

  // Waits until nothing is on its way any more: shared memory is the caller's again.
  SNNLSTM_DEVICE void finish() const {
    cp_async_wait<0>();
    __syncthreads();
  }

  // The chunk's segment and number of k-steps for a tap, and where it lies.
  SNNLSTM_DEVICE const MmaSegment& segment() const { return p_.segment[at_.segment]; }
  SNNLSTM_DEVICE int steps() const { return segment().steps(at_.chunk); }
  SNNLSTM_DEVICE const unsigned char* chunk() const { return buffer_at(buffer_); }
  SNNLSTM_DEVICE const MmaSource<Element, AnyFeed>& source() const { return source_; }
  // The ring of weights, and bytes from there to the step's unit.
  SNNLSTM_DEVICE const unsigned char* stages() const { return stages_; }
  SNNLSTM_DEVICE int weights() const { return weights_at_; }
  SNNLSTM_DEVICE unsigned char* zeros() const {
    return stages_ + mma_gemm::kStages * p_.stage_bytes();
  }
  // Four numbers for each tap of a segment, the chunk's own or number k; see MmaGemm.
  SNNLSTM_DEVICE int* table() const { return table(at_.segment); }
  SNNLSTM_DEVICE int* table(int k) const {
    return reinterpret_cast<int*>(zeros() + 64) + (k > 0 ? 4 * p_.segment[0].taps : 0);
  }

 private:
  struct Cursor {
    int segment = 0, chunk = 0;
  };

  SNNLSTM_DEVICE bool advance(Cursor& c) const {
    if (++c.chunk < p_.segment[c.segment].chunks) return true;
    c.chunk = 0;
    return ++c.segment < p_.segments;
  }
  // The segment of the chunk that is on its way.
  SNNLSTM_DEVICE const MmaSegment& next() const { return p_.segment[more_ ? loaded_.segment : 0]; }
  SNNLSTM_DEVICE unsigned char* buffer_at(int buffer) const {
    return shared_ + buffer * p_.buffer_bytes;
  }

  // Copies the next stage of the stream as one group, which takes along whatever else this thread
  // has begun to copy.
  SNNLSTM_DEVICE void copy_stage() {
    const int from = copied_ * p_.stage_units;
    const int bytes = min(p_.stage_units, p_.units - from) * p_.unit_bytes;
    unsigned char* to = stages_ + copied_ % mma_gemm::kStages * p_.stage_bytes();
    const unsigned char* source = weight_ + int64_t(from) * p_.unit_bytes;
    for (int i = int(threadIdx.x) * 16; i < bytes; i += int(blockDim.x) * 16)
      cp_async<16>(to + i, source + i);
    cp_async_commit();
    ++copied_;
  }

  SNNLSTM_DEVICE void next_stage() {
    if (!fault(Fault::missing_wait, 1)) cp_async_wait<mma_gemm::kStages - 2>();
    if (!fault(Fault::missing_barrier_read, 1)) __syncthreads();
    copy_stage();
    if (weights_at_ == mma_gemm::kStages * p_.stage_bytes()) weights_at_ = 0;
    stage_end_ = weights_at_ + p_.stage_bytes();
    ++stages_since_load_;
    if (loading_) {
      source_.turn(next());
      __syncwarp();  // lanes have gone different ways
    }
  }

  const MmaConv& p_;
  unsigned char *shared_, *stages_;
  const unsigned char* weight_;
  Cursor at_, loaded_;  // the chunk that is multiplied, and the first that has not begun to come
  int buffer_ = 0;
  bool first_ = true, more_ = false, working_ = false, loading_ = false;
  int copied_ = 0;      // stages of the stream, so far
  int weights_at_ = 0;  // the next unit in the ring, in bytes
  int stage_end_ = 0;   // of the stage that it is in
  int stages_since_load_ = 0;
  MmaSource<Element, AnyFeed> source_;
};

}  // namespace snnlstm::cuda
