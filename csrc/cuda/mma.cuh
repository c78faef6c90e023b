// Implicit GEMM on tensor cores: M = pixels of a tile, N = columns, K = taps x channels.
//
// A block keeps the tile's neighbourhood in shared memory, 64 bytes of channels at a time (a chunk),
// and walks over all taps of the chunk by shifting the rows that it reads: no im2col, every source
// pixel is fetched once per block. Weights come in the order in which the tensor cores take them
// (a unit: one tap, one k-step of 8 words), as one stream through a ring of stages.
//
//   neighbourhood, 2 buffers                    weights, kStages stages of a few units
//     pixel 0 | 4 groups of 16 bytes              unit: [warp column][pair of n-tiles][lane][16 B]
//     pixel 1 | 4 groups                          a lane's 16 bytes are the B fragments of a pair
//     (16 bytes of padding)
//     pixel 2 | ...
//
// A pixel's row starts at 64 p + 16 (p / 2) bytes: then both ldmatrix, which reads every other pixel
// (below), and the stores, which write neighbours, touch all banks once.
//
// A warp computes 32 pixels x NT n-tiles of 8 columns. Row r of an m16 tile is pixel 2 r for r < 8
// and 2 (r - 8) + 1 above, so that a thread's rows g and g + 8 are the neighbours 2g and 2g + 1.
// Where n-tiles come in pairs (a, b) of 16 channels, columns 2t, 2t + 1 of a are channels 4t, 4t + 1
// and of b 4t + 2, 4t + 3: a thread holds 2 pixels x 4 neighbouring channels.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace snnlstm::cuda {

struct tf32x3 {};  // float32 as the sum of two tf32 numbers, multiplied in three parts

template <class Op>
struct Operand {
  using Element = Op;  // as it lies in shared memory
  using Mma = Op;
};
template <>
struct Operand<tf32> {
  using Element = float;  // rounded when it is read
  using Mma = tf32;
};
template <>
struct Operand<tf32x3> {
  using Element = float;
  using Mma = tf32;
};

// How a segment's source comes into shared memory.
enum class Feed : int {
  async,    // 16 bytes of channels, as they are
  vectors,  // the same, converted on the way
  gather,   // element by element: contiguous images, odd channel counts, anything
  patches,  // few channels: K = (tap, channel) laid out for each pixel, one tap
};

namespace mma_tile {
constexpr int kWarpPixels = 32;
constexpr int kStages = 4;
constexpr int kGroups = 4;         // 16-byte groups of a chunk
constexpr int kGroupBytes = 16;
constexpr int kPairBytes = 512;    // B fragments of two n-tiles, one k-step

// Where pixel p's row of groups starts, in bytes.
SNNLSTM_BOTH int row_offset(int p) { return 64 * p + 16 * (p >> 1); }
}  // namespace mma_tile

struct MmaSegment {
  Segment s;  // s.weight: unused
  Feed feed = Feed::gather;
  int taps = 1, taps_w = 1;      // of the walk through shared memory: 1 with patches
  int chunks = 0, tail_steps = 0;  // k-steps (1 or 2) of the last chunk
  int halo_h = 0, halo_w = 0;    // the neighbourhood
  int pitch = 0;                 // pixels from one of its rows to the next, in shared memory
  int step_h = 1, step_w = 1;    // neighbourhood pixels from a tile pixel to the next
  SmallDivisor by_halo_w;
  // gather: the order in which threads take pixels, so that a warp starts at a sector
  bool whole_rows = false;       // the neighbourhood's rows are the image's: runs pass row ends
  int align = 8;                 // elements of a sector
  SmallDivisor by_run, by_col;        // threads of a group of channels, of a row
  int turns = 1;                 // of each thread, for one chunk, in one stage of the weights
  SmallDivisor by_channels, by_taps_w;  // patches

  SNNLSTM_BOTH int steps(int chunk) const { return chunk + 1 < chunks ? 2 : tail_steps; }
};

struct MmaConv {
  MmaSegment segment[2];
  int segments = 0;
  int units = 0;                 // of all segments
  const void* weight = nullptr;  // first unit of the first column block
  int64_t weight_pitch = 0;      // bytes from one column block to the next
  int warp_columns = 1;
  int unit_bytes = 0, stage_units = 1;
  int buffer_bytes = 0;          // of one neighbourhood buffer

  SNNLSTM_BOTH int stage_bytes() const { return stage_units * unit_bytes; }
  SNNLSTM_BOTH int shared_bytes() const {
    return 2 * buffer_bytes + mma_tile::kStages * stage_bytes() + 64;
  }
};

// S: type of the sources. NT: n-tiles of a warp.
template <class Op, class S, int NT>
class MmaGemm {
 public:
  using Element = typename Operand<Op>::Element;
  using Mma = typename Operand<Op>::Mma;
  static constexpr int kPerGroup = mma_tile::kGroupBytes / sizeof(Element);
  static constexpr int kPerChunk = mma_tile::kGroups * kPerGroup;
  using Accumulators = float[2][NT][4];

  SNNLSTM_DEVICE MmaGemm(const MmaConv& p, unsigned char* shared, const Tiling& tiling,
                         const Block& block)
      : p_(p),
        shared_(shared),
        stages_(shared + 2 * p.buffer_bytes),
        tiling_(tiling),
        block_(block),
        weight_(static_cast<const unsigned char*>(p.weight) + block.column * p.weight_pitch) {
    const int warp = int(threadIdx.x) / 32;
    warp_column_ = warp % p.warp_columns;
    warp_row_ = warp / p.warp_columns;
  }

  // First of the 2 neighbouring pixels that the thread holds in m16 tile mi.
  SNNLSTM_DEVICE int pixel(int mi) const {
    return warp_row_ * mma_tile::kWarpPixels + mi * 16 + 2 * (int(threadIdx.x) % 32 / 4);
  }
  SNNLSTM_DEVICE int warp_column() const { return warp_column_; }
  SNNLSTM_DEVICE static int quad() { return int(threadIdx.x) % 4; }

  SNNLSTM_DEVICE void run(Accumulators& acc) {
    // 64 zero bytes behind the stages, for rows that have no source
    if (threadIdx.x < 4) store(zeros() + 16 * threadIdx.x, make_uint4(0, 0, 0, 0));
    Cursor at{0, 0}, load_at{0, 0};
    bool more = p_.segments > 0;
#pragma unroll 1
    for (int buffer = 0; buffer < 2 && more; ++buffer) {  // the first two chunks
      const MmaSegment& seg = p_.segment[load_at.segment];
      if (seg.feed == Feed::patches)
        lay_out(seg, load_at.chunk, buffer);
      else
        start_load(load_at, buffer);
      load_now(load_at, buffer);
      more = advance(load_at);
    }
    for (int k = 0; k < mma_tile::kStages - 1; ++k) copy_stage();
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[mi][nt][r] = 0;

    // Chunk 0 fetches nothing; while chunk k is computed, chunk k + 1 is on its way.
    bool working = p_.segments > 0;
#pragma unroll 1
    for (int buffer = 0; working; buffer ^= 1) {
      const MmaSegment& seg = p_.segment[at.segment];
      const int steps = seg.steps(at.chunk);
      begin_chunk();
      loading_ = unit_ > 0 && more;
      if (loading_) start_load(load_at, buffer ^ 1);
#pragma unroll 1
      for (int tap = 0; tap < seg.taps; ++tap) {
        int row[2];
        locate_rows(seg, tap, buffer, row);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          if (unit_ % p_.stage_units == 0) next_stage(load_at, buffer ^ 1);
          multiply(row, step, acc);
          ++unit_;
        }
      }
      if (loading_) put(in_flight_, buffer ^ 1), more = advance(load_at);
      working = advance(at);
    }
    cp_async_wait<0>();
    __syncthreads();  // shared memory is the caller's again
  }

 private:
  struct Cursor {
    int segment, chunk;
  };
  SNNLSTM_DEVICE bool advance(Cursor& c) const {
    if (++c.chunk < p_.segment[c.segment].chunks) return true;
    c.chunk = 0;
    return ++c.segment < p_.segments;
  }

  SNNLSTM_DEVICE unsigned char* zeros() const {
    return stages_ + mma_tile::kStages * p_.stage_bytes();
  }
  SNNLSTM_DEVICE unsigned char* buffer_at(int buffer) const {
    return shared_ + buffer * p_.buffer_bytes;
  }

  // ---- weights -----------------------------------------------------------------------------------

  // The next stage of the stream, as one group of copies (which takes along whatever else this
  // thread has begun to copy).
  SNNLSTM_DEVICE void copy_stage() {
    const int from = copied_ * p_.stage_units;
    const int bytes = min(p_.stage_units, p_.units - from) * p_.unit_bytes;
    unsigned char* to = stages_ + copied_ % mma_tile::kStages * p_.stage_bytes();
    const unsigned char* source = weight_ + int64_t(from) * p_.unit_bytes;
    for (int i = int(threadIdx.x) * 16; i < bytes; i += int(blockDim.x) * 16)
      cp_async<16>(to + i, source + i);
    cp_async_commit();
    ++copied_;
  }

  SNNLSTM_DEVICE void next_stage(const Cursor& load_at, int buffer) {
    if (!fault(Fault::missing_wait, 1)) cp_async_wait<mma_tile::kStages - 2>();
    if (!fault(Fault::missing_barrier_read, 1)) __syncthreads();
    copy_stage();
    ++stages_since_load_;
    if (loading_) continue_load(load_at, buffer);
  }

  // ---- the neighbourhood -------------------------------------------------------------------------

  // Source coordinates of the neighbourhood's first pixel.
  SNNLSTM_DEVICE static int origin(int tile, int step, int pad, const SmallDivisor& up) {
    const int first = tile * step - pad;
    return first >= 0 ? int(up.divide(unsigned(first))) : -int(up.divide(unsigned(-first - 1))) - 1;
  }
  SNNLSTM_DEVICE int origin_h(const Segment& s) const {
    return origin(block_.y0, s.step_h, s.pad_h, s.up_h);
  }
  SNNLSTM_DEVICE int origin_w(const Segment& s) const {
    return origin(block_.x0, s.step_w, s.pad_w, s.up_w);
  }

  SNNLSTM_DEVICE int groups(const MmaSegment& seg, int chunk) const { return 2 * seg.steps(chunk); }

  // Number of thread's turns that a chunk needs.
  SNNLSTM_DEVICE int items(const MmaSegment& seg, int chunk) const {
    return groups(seg, chunk) * (seg.feed == Feed::async || seg.feed == Feed::vectors
                                     ? seg.halo_h * seg.halo_w
                                     : int(seg.by_run.value));
  }

  // One turn: 16 bytes of one pixel, on their way from global to shared memory.
  struct Item {
    int target = -1;  // bytes from the buffer's start; -1: nothing to do
    RealOf<S> value[kPerGroup];
  };

  SNNLSTM_DEVICE void fetch(const MmaSegment& seg, int chunk, int number, Item& item) const {
    const Segment& s = seg.s;
    const S* image = image_of<const S>(s.src, block_.t, block_.n);
    item.target = -1;
    unsigned rest = unsigned(number);
    if (seg.feed == Feed::vectors) {
      const int lanes = groups(seg, chunk);
      const int group = number & (lanes - 1);
      unsigned row = unsigned(number) / unsigned(lanes);
      const int col = int(seg.by_halo_w.split(row));
      const int y = origin_h(s) + int(row), x = origin_w(s) + col;
      const int c = chunk * kPerChunk + group * kPerGroup;
      if (int(row) >= seg.halo_h || !inside(y, s.height) || !inside(x, s.width)) return;
      item.target = mma_tile::row_offset(int(row) * seg.pitch + col) + group * 16;
#pragma unroll
      for (int k = 0; k < kPerGroup; k += 4) {
        RealOf<S> v[4] = {0, 0, 0, 0};
        if (c + k < s.channels) load_vector<S>(image + offset(s.src, c + k, y, x), v);
#pragma unroll
        for (int e = 0; e < 4; ++e) item.value[k + e] = v[e];
      }
    } else {
      const int top = origin_h(s), left = origin_w(s);
      const int run = int(seg.by_run.split(rest)), group = int(rest);
      const int mask = seg.align - 1;
      const int skew = seg.whole_rows ? (top * s.width) & mask : 0;
      const int begin = seg.whole_rows ? 0 : left & ~mask;
      if (run < skew || group >= groups(seg, chunk)) return;
      unsigned row = unsigned(run - skew);
      const int x = begin + int(seg.by_col.split(row)), y = top + int(row);
      const int col = x - left;
      if (int(row) >= seg.halo_h || !inside(col, seg.halo_w) || !inside(y, s.height) ||
          !inside(x, s.width))
        return;
      item.target = mma_tile::row_offset(int(row) * seg.pitch + col) + group * 16;
      const int c = chunk * kPerChunk + group * kPerGroup;
      const S* from = image + offset(s.src, c, y, x);
#pragma unroll
      for (int k = 0; k < kPerGroup; ++k)
        item.value[k] = c + k < s.channels ? to_real(from[k * s.src.c]) : RealOf<S>(0);
    }
  }

  // Patches are two chunks at most, and laid out at once.
  SNNLSTM_DEVICE void lay_out(const MmaSegment& seg, int chunk, int buffer) const {
    const Segment& s = seg.s;
    const S* image = image_of<const S>(s.src, block_.t, block_.n);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < items(seg, chunk); i += int(blockDim.x)) {
      unsigned rest = unsigned(i);
      const int pixel = int(seg.by_run.split(rest)), group = int(rest);
      unsigned row = unsigned(pixel);
      const int col = int(tiling_.by_w.split(row));
      const int top = (block_.y0 + int(row)) * s.step_h - s.pad_h;
      const int left = (block_.x0 + col) * s.step_w - s.pad_w;
      unsigned tap = unsigned(chunk * kPerChunk + group * kPerGroup);
      int c = int(seg.by_channels.split(tap));
      int tap_w = int(seg.by_taps_w.split(tap)), tap_h = int(tap);
      RealOf<S> v[kPerGroup];
#pragma unroll
      for (int k = 0; k < kPerGroup; ++k) {
        const int y = top + tap_h * s.dilation_h, x = left + tap_w * s.dilation_w;
        const bool real = tap_h < s.taps_h && inside(y, s.height) && inside(x, s.width);
        v[k] = real ? to_real(image[offset(s.src, c, y, x)]) : RealOf<S>(0);
        if (++c == s.channels) c = 0, ++tap_w;
        if (tap_w == s.taps_w) tap_w = 0, ++tap_h;
      }
      store_group(buffer_at(buffer) + mma_tile::row_offset(pixel) + group * 16, v);
    }
  }

  SNNLSTM_DEVICE void put(const Item& item, int buffer) const {
    if (item.target < 0) return;
    store_group(buffer_at(buffer) + item.target, item.value);
  }

  SNNLSTM_DEVICE static void store_group(unsigned char* to, const RealOf<S> (&v)[kPerGroup]) {
    if constexpr (kPerGroup == 8)
      store(to, make_uint4(pack<Element>(v[0], v[1]), pack<Element>(v[2], v[3]),
                           pack<Element>(v[4], v[5]), pack<Element>(v[6], v[7])));
    else
      store(to, make_float4(v[0], v[1], v[2], v[3]));
  }

  // Turns first, first + threads, ...: Count of them, all loads before the first store.
  template <int Count>
  SNNLSTM_DEVICE void transfer(const MmaSegment& seg, int chunk, int first, int buffer) const {
    Item item[Count];
#pragma unroll
    for (int k = 0; k < Count; ++k) fetch(seg, chunk, first + k * int(blockDim.x), item[k]);
#pragma unroll
    for (int k = 0; k < Count; ++k) put(item[k], buffer);
  }

  SNNLSTM_DEVICE void copy_async(const MmaSegment& seg, int chunk, int buffer) const {
    if constexpr (sizeof(S) == sizeof(Element)) {
      const Segment& s = seg.s;
      const S* image = image_of<const S>(s.src, block_.t, block_.n);
      const int lanes = groups(seg, chunk), count = items(seg, chunk);
      const int top = origin_h(s), left = origin_w(s);
      for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
        const int group = i & (lanes - 1);
        unsigned row = unsigned(i) / unsigned(lanes);
        const int col = int(seg.by_halo_w.split(row));
        const int y = top + int(row), x = left + col, c = chunk * kPerChunk + group * kPerGroup;
        const bool real = inside(y, s.height) && inside(x, s.width) && c < s.channels;
        const int shift = fault(Fault::wrong_halo, 1) && x + 1 < s.width ? 1 : 0;
        cp_async<16>(buffer_at(buffer) +
                         mma_tile::row_offset(int(row) * seg.pitch + col) + group * 16,
                     real ? image + offset(s.src, c, y, x + shift) : image, real ? 16 : 0);
      }
    }
  }

  // Zeros around the image. They stay while a segment's chunks pass through the buffer; copy_async
  // writes its own.
  SNNLSTM_DEVICE void fill_border(const MmaSegment& seg, int buffer) const {
    if (fault(Fault::missing_zero_fill)) return;
    const Segment& s = seg.s;
    const int top = origin_h(s), left = origin_w(s);
    for (int i = int(threadIdx.x); i < seg.halo_h * seg.halo_w; i += int(blockDim.x)) {
      unsigned row = unsigned(i);
      const int col = int(seg.by_halo_w.split(row));
      const int y = top + int(row), x = left + col;
      if (inside(y, s.height) && inside(x, s.width)) continue;
      unsigned char* to = buffer_at(buffer) + mma_tile::row_offset(int(row) * seg.pitch + col);
#pragma unroll
      for (int g = 0; g < mma_tile::kGroups; ++g) store(to + 16 * g, make_uint4(0, 0, 0, 0));
    }
  }

  SNNLSTM_DEVICE void start_load(const Cursor& at, int buffer) {
    const MmaSegment& seg = p_.segment[at.segment];
    in_flight_.target = -1;
    next_item_ = int(threadIdx.x), items_ = 0, stages_since_load_ = 0;
    if (seg.feed == Feed::async) {
      copy_async(seg, at.chunk, buffer);
    } else {
      if (at.chunk < 2) fill_border(seg, buffer);
      items_ = items(seg, at.chunk);
    }
  }

  SNNLSTM_DEVICE void load_now(const Cursor& at, int buffer) {
#pragma unroll 1
    for (; next_item_ < items_; next_item_ += 3 * int(blockDim.x))
      transfer<3>(p_.segment[at.segment], at.chunk, next_item_, buffer);
  }

  // Turns begin, and the ones before them end: the last one's loads have the time of a stage. Each
  // chunk lasts at least one stage.
  SNNLSTM_DEVICE void continue_load(const Cursor& at, int buffer) {
    const MmaSegment& seg = p_.segment[at.segment];
#pragma unroll 1
    for (int k = 0; k < seg.turns; ++k) {
      put(in_flight_, buffer);
      in_flight_.target = -1;
      if (next_item_ < items_) fetch(seg, at.chunk, next_item_, in_flight_);
      next_item_ += int(blockDim.x);
    }
  }

  // After this the chunk's data is there for all threads, and the other buffer is free.
  SNNLSTM_DEVICE void begin_chunk() {
    if (!fault(Fault::missing_wait, 2)) {
      if (unit_ == 0) {
        cp_async_wait<mma_tile::kStages - 2>();
      } else if (stages_since_load_ < mma_tile::kStages) {
        // Short chunks; long ones have waited for their copies at their stages.
        cp_async_commit();
        cp_async_wait<0>();
      }
    }
    if (!fault(Fault::missing_barrier_overwrite, 1)) __syncthreads();
  }

  // ---- multiplication ----------------------------------------------------------------------------

  // This lane's row for ldmatrix, in each m16 tile: the shared memory of its pixel's neighbour at
  // the tap.
  SNNLSTM_DEVICE void locate_rows(const MmaSegment& seg, int tap, int buffer, int (&row)[2]) const {
    const Segment& s = seg.s;
    const int lane = int(threadIdx.x) % 32;
    const int tap_h = tap / seg.taps_w, tap_w = tap - tap_h * seg.taps_w;
    const bool up = s.up_h.value > 1 || s.up_w.value > 1;
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      const int odd = fault(Fault::wrong_fragment_row) ? 0 : lane >> 3 & 1;
      unsigned y = unsigned(warp_row_ * mma_tile::kWarpPixels + mi * 16 + 2 * (lane % 8) + odd);
      int x = int(tiling_.by_w.split(y));
      if (int(y) >= tiling_.h) y = 0, x = 0;
      int p = (int(y) * seg.step_h + tap_h * s.dilation_h) * seg.pitch + x * seg.step_w +
              tap_w * s.dilation_w;
      if (fault(Fault::wrong_halo, 2)) p += 1;
      row[mi] = buffer * p_.buffer_bytes + mma_tile::row_offset(p) + (lane >> 4) * 16;
      if (up) {
        const int v = block_.y0 + int(y) - s.pad_h + tap_h * s.dilation_h;
        const int u = block_.x0 + x - s.pad_w + tap_w * s.dilation_w;
        unsigned source_y = unsigned(v), source_x = unsigned(u);
        const bool real = v >= 0 && u >= 0 && s.up_h.split(source_y) == 0 &&
                          s.up_w.split(source_x) == 0;
        p = (int(source_y) - origin_h(s)) * seg.pitch + int(source_x) - origin_w(s);
        row[mi] = real ? buffer * p_.buffer_bytes + mma_tile::row_offset(p) + (lane >> 4) * 16
                       : int(zeros() - shared_);
      }
    }
  }

  SNNLSTM_DEVICE static uint32_t high(uint32_t bits) {
    return from_float<tf32>(detail::float_of(bits)).bits;
  }
  SNNLSTM_DEVICE static uint32_t low(uint32_t bits, uint32_t high) {
    const float rest = detail::float_of(bits) - detail::float_of(high);
    return rest == rest ? from_float<tf32>(rest).bits : 0;  // infinity - infinity
  }

  SNNLSTM_DEVICE void multiply(const int (&row)[2], int step, Accumulators& acc) const {
    uint32_t a[2][4];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) ldmatrix(a[mi], shared_ + row[mi] + step * 32);
    uint32_t rest[2][4];
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t h = high(a[mi][r]);
          if constexpr (std::is_same_v<Op, tf32x3>) rest[mi][r] = low(a[mi][r], h);
          a[mi][r] = h;
        }
    }
    const unsigned char* b = stages_ +
                             unit_ / p_.stage_units % mma_tile::kStages * p_.stage_bytes() +
                             unit_ % p_.stage_units * p_.unit_bytes +
                             warp_column_ * (NT / 2 * mma_tile::kPairBytes) +
                             int(threadIdx.x) % 32 * 16;
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair) {
      const uint4 w = load<uint4>(b + pair * mma_tile::kPairBytes);
      const uint32_t raw[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if constexpr (std::is_same_v<Op, tf32x3>) {
          const uint32_t h[2] = {high(raw[k][0]), high(raw[k][1])};
          const uint32_t l[2] = {low(raw[k][0], h[0]), low(raw[k][1], h[1])};
#pragma unroll
          for (int mi = 0; mi < 2; ++mi) {
            mma<Mma>(acc[mi][2 * pair + k], rest[mi], h);
            mma<Mma>(acc[mi][2 * pair + k], a[mi], l);
            mma<Mma>(acc[mi][2 * pair + k], a[mi], h);
          }
        } else {
#pragma unroll
          for (int mi = 0; mi < 2; ++mi) mma<Mma>(acc[mi][2 * pair + k], a[mi], raw[k]);
        }
      }
    }
  }

  const MmaConv& p_;
  unsigned char *shared_, *stages_;
  const Tiling& tiling_;
  const Block& block_;
  const unsigned char* weight_;
  int warp_column_, warp_row_;
  int unit_ = 0, copied_ = 0;
  bool loading_ = false;
  int next_item_ = 0, items_ = 0, stages_since_load_ = 0;  // of the load that is under way
  Item in_flight_;
};

}  // namespace snnlstm::cuda
