// Loads the operands of a convolution into shared memory: the neighbourhood of a tile, a chunk of
// channels at a time (mma_source.cuh), and the weights, a stream of units, through a ring of
// stages. A block's loop is
//
//   for (pipeline.start(); pipeline.working(); pipeline.end_chunk()) {
//     pipeline.begin_chunk();
//     // for each tap of pipeline.segment(), and each of pipeline.steps():
//     //   begin_step(); multiply chunk() by the unit at weights(); end_step(bytes of the unit);
//   }
//   pipeline.finish();
//
// and all threads run it. The next chunk is loaded while one is multiplied.
//
// The previous launch may write the last segment's source, so the first read of that source waits
// for the launch. Everything else is loaded before.
//
//   neighbourhood, 2 buffers       weights, kStages stages of a few units
//     pixel | 4 groups of 16 B       unit: [warp column][pair of n-tiles][lane][16 bytes]
//     ...                            a lane's 16 bytes are the B fragments of a pair
#pragma once

#include "mma_source.cuh"

namespace snnlstm::cuda {

// Element, AnyCopy: see MmaSource.
template <class Element, bool AnyCopy>
class MmaPipeline {
 public:
  SNNLSTM_DEVICE MmaPipeline(const MmaConv& p, unsigned char* shared, const Tiling& tiling,
                             const BlockPlace& block)
      : p_(p),
        shared_(shared),
        stages_(shared + 2 * p.buffer_bytes),
        weight_(static_cast<const unsigned char*>(p.weight) + block.column * p.weight_pitch),
        source_(tiling) {
    source_.move_to(block);
  }

  // Begins to load the first two chunks and the first stages.
  SNNLSTM_DEVICE void start() {
    // Pixels without a source read these 64 bytes after the stages.
    if (threadIdx.x < 4) store(zeros() + 16 * threadIdx.x, make_uint4(0, 0, 0, 0));
    working_ = more_ = p_.segments > 0;
    copy_stage();
#pragma unroll 1
    for (int buffer = 0; buffer < 2 && more_; ++buffer) {
      load_chunk(buffer, true);
      source_.template finish<3>(next());
      more_ = advance(loaded_);
    }
    cp_async_commit();
    for (int k = 1; k < mma_gemm::kStages - 1; ++k) copy_stage(), cp_async_commit();
  }
  SNNLSTM_DEVICE bool working() const { return working_; }

  // Waits until all threads may read the chunk and none reads the other buffer, and begins to load
  // the next chunk there. (start() has begun to load the second chunk.)
  SNNLSTM_DEVICE void begin_chunk() {
    if (!fault(Fault::no_chunk_wait)) {
      if (first_) {
        cp_async_wait<mma_gemm::kStages - 2>();
      } else if (stages_since_load_ < mma_gemm::kStages) {
        // The chunk was short. Longer ones have waited for these copies at their stages.
        cp_async_commit();
        cp_async_wait<0>();
      }
    }
    if (!fault(Fault::no_chunk_barrier)) __syncthreads();
    loading_ = !first_ && more_;
    stages_since_load_ = loading_ ? 0 : mma_gemm::kStages;
    if (loading_) {
      load_chunk(buffer_ ^ 1, loaded_.chunk < 2);
      __syncwarp();  // lanes have diverged
    }
  }
  SNNLSTM_DEVICE void end_chunk() {
    if (loading_) {
      source_.template finish<1>(next());
      more_ = advance(loaded_);
    }
    working_ = advance(at_);
    buffer_ ^= 1;
    first_ = false;
  }

  SNNLSTM_DEVICE void begin_step() {
    if (weights_at_ == stage_end_) next_stage();
  }
  SNNLSTM_DEVICE void end_step(int bytes) { weights_at_ += bytes; }

  // Waits until no copy is under way and no thread reads, so that the caller may use the shared
  // memory. The previous launch is complete, too, even if there was nothing to load.
  SNNLSTM_DEVICE void finish() const {
    wait_for_launch_before();
    cp_async_wait<0>();
    __syncthreads();
  }

  // The chunk's segment, its k-steps for a tap, and where it lies.
  SNNLSTM_DEVICE const MmaSegment& segment() const { return segment_of(at_); }
  SNNLSTM_DEVICE int steps() const { return segment().steps(at_.chunk); }
  SNNLSTM_DEVICE const unsigned char* chunk() const { return buffer_at(buffer_); }
  SNNLSTM_DEVICE const MmaSource<Element, AnyCopy>& source() const { return source_; }
  // The ring of weights, and the bytes from there to the step's unit.
  SNNLSTM_DEVICE const unsigned char* stages() const { return stages_; }
  SNNLSTM_DEVICE int weights() const { return weights_at_; }
  SNNLSTM_DEVICE unsigned char* zeros() const {
    return stages_ + mma_gemm::kStages * p_.stage_bytes();
  }
  // MmaGemm's four numbers for each tap, of the chunk's segment or of segment k.
  SNNLSTM_DEVICE int* table() const { return table(at_.segment); }
  SNNLSTM_DEVICE int* table(int k) const {
    return reinterpret_cast<int*>(zeros() + 64) + (k > 0 ? 4 * p_.segment[0].taps : 0);
  }

 private:
  struct Cursor {
    int segment = 0, chunk = 0;
  };

  // The number of a single segment is known at compile time, so that constant memory, where the
  // segments lie, becomes an operand.
  static constexpr bool kOneSegment = !AnyCopy;
  SNNLSTM_DEVICE const MmaSegment& segment_of(const Cursor& c) const {
    return p_.segment[kOneSegment ? 0 : c.segment];
  }
  SNNLSTM_DEVICE bool advance(Cursor& c) const {
    if (++c.chunk < segment_of(c).chunks) return true;
    if (kOneSegment) return false;
    c.chunk = 0;
    return ++c.segment < p_.segments;
  }
  // Returns the segment of the chunk that is being loaded.
  SNNLSTM_DEVICE const MmaSegment& next() const { return segment_of(more_ ? loaded_ : Cursor()); }
  SNNLSTM_DEVICE unsigned char* buffer_at(int buffer) const {
    return shared_ + buffer * p_.buffer_bytes;
  }

  // Begins to load the next chunk to a buffer.
  SNNLSTM_DEVICE void load_chunk(int buffer, bool border) {
    const bool first_of_last = loaded_.segment + 1 == p_.segments && loaded_.chunk == 0;
    if (first_of_last && !fault(Fault::no_launch_wait_mma)) wait_for_launch_before();
    source_.start(next(), loaded_.chunk, buffer_at(buffer), border);
  }

  // Begins to copy the next stage. A thread that carries stores its stage, and then loads the next
  // one.
  SNNLSTM_DEVICE void copy_stage() {
    const int from = copied_ * p_.stage_units;
    const int bytes = min(p_.stage_units, p_.units - from) * p_.unit_bytes;
    unsigned char* to = stages_ + copied_ % mma_gemm::kStages * p_.stage_bytes();
    const unsigned char* source = weight_ + int64_t(from) * p_.unit_bytes;
    if constexpr (kCarries<Element>) {
      if (copied_ > 0) lay_down();
      carried_to_ = to;
      carried_bytes_ = bytes;
      unrolled<mma_gemm::kCarried>([&](int k) {
        if (piece(k) < bytes) carried_[k] = load<uint4>(source + piece(k));
      });
    } else {
      const int step = 16 * int(blockDim.x);
      to += piece(0);
      source += piece(0);
      for (int i = piece(0); i < bytes; i += step, to += step, source += step) cp_async(to, source);
    }
    ++copied_;
  }

  // Returns the place of the k-th piece of a stage that the thread carries.
  SNNLSTM_DEVICE static int piece(int k) { return 16 * (k * int(blockDim.x) + int(threadIdx.x)); }
  SNNLSTM_DEVICE void lay_down() const {
    const int late = fault(Fault::lost_carried_pieces) ? 16 : 0;
    unrolled<mma_gemm::kCarried>([&](int k) {
      if (piece(k) < carried_bytes_ - late) store(carried_to_ + piece(k), carried_[k]);
    });
  }

  SNNLSTM_DEVICE void next_stage() {
    if (!fault(Fault::no_stage_wait)) cp_async_wait<mma_gemm::kStages - 2>();
    if (!fault(Fault::no_stage_barrier)) __syncthreads();
    copy_stage();
    cp_async_commit();
    if (weights_at_ == mma_gemm::kStages * p_.stage_bytes()) weights_at_ = 0;
    stage_end_ = weights_at_ + p_.stage_bytes();
    ++stages_since_load_;
    if (loading_) {
      source_.advance(next());
      __syncwarp();  // lanes have diverged
    }
  }

  const MmaConv& p_;
  unsigned char *shared_, *stages_;
  const unsigned char* weight_;
  Cursor at_, loaded_;  // the chunk being multiplied; the first chunk not yet loading
  int buffer_ = 0;
  bool first_ = true, more_ = false, working_ = false, loading_ = false;
  int copied_ = 0;      // stages so far
  int weights_at_ = 0;  // the next unit in the ring, in bytes
  int stage_end_ = 0;   // end of that unit's stage
  int stages_since_load_ = 0;
  // The stage that the thread carries: its place and its length.
  uint4 carried_[kCarries<Element> ? mma_gemm::kCarried : 1];
  unsigned char* carried_to_ = nullptr;
  int carried_bytes_ = 0;
  MmaSource<Element, AnyCopy> source_;
};

}  // namespace snnlstm::cuda
