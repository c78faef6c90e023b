// Loads a convolution's source into shared memory for the tensor cores: the neighbourhood of a
// tile, 64 bytes of channels (a chunk) at a time.
//
//     pixel 0 | 4 groups of 16 bytes
//     pixel 1 | 4 groups of 16 bytes
//     16 bytes of padding
//     pixel 2 | ...
//
// So the row of pixel p starts at 64 p + 16 (p / 2) bytes, and three kinds of access touch every
// bank once: ldmatrix of every other pixel (mma.cuh), reads of 8 neighbours
// (weight_gradient_mma.cuh), and stores of neighbours. Rows and columns around the image are zeros.
#pragma once

#include "../gemm.h"
#include "tile.cuh"

namespace snnlstm::cuda {

// Whether threads carry in registers what cp_async() copies on other GPUs.
template <class Element>
constexpr bool kCarries = std::is_same_v<Element, fp16_sm75>;

// Element: of shared memory, float (which tf32 rounds when it is read), tf32x3, fp16, bf16 or
// fp16_sm75. AnyCopy: false if all sources are our own images (GlobalCopy::cp_async). Chunks: the
// number of chunks that are loaded at once, to buffers side by side.
//
// Users call start(), then advance() now and then between their products, and finish().
template <class Element, bool AnyCopy, int Chunks = 1>
class MmaSource {
 public:
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kPerGroup = mma_tile::kGroupBytes / sizeof(Element);
  static constexpr int kPerChunk = mma_tile::kGroups * kPerGroup;
  static constexpr bool kAdvances = AnyCopy || kCarries<Element>;

  SNNLSTM_DEVICE explicit MmaSource(const Tiling& tiling) : tiling_(tiling) {}

  // Sets the tile whose source is loaded. Its t may differ from the block's.
  SNNLSTM_DEVICE void move_to(const BlockPlace& at) { at_ = at; }

  // Returns a source coordinate of the neighbourhood's first pixel.
  SNNLSTM_DEVICE static int origin(int tile, int step, int pad, const SmallDivisor& dgrad_stride) {
    const int first = tile * step - pad;
    return first >= 0 ? int(dgrad_stride.divide(unsigned(first)))
                      : -int(dgrad_stride.divide(unsigned(-first - 1))) - 1;
  }
  SNNLSTM_DEVICE int origin_h(const Segment& s) const {
    return origin(at_.y0, s.step_h, s.pad_h, s.dgrad_stride_h);
  }
  SNNLSTM_DEVICE int origin_w(const Segment& s) const {
    const int column = fault(Fault::first_tile_column) ? 0 : at_.x0;
    return origin(column, s.step_w, s.pad_w, s.dgrad_stride_w);
  }

  // Begins to load the chunks from `chunk` on, by cp_async if possible, else in calls of advance()
  // and then finish(). border: the zeros around the image are written, too; they stay while other
  // chunks of the same tile are loaded into the buffer. pitch: bytes from one buffer to the next.
  SNNLSTM_DEVICE void start(const MmaSegment& seg, int chunk, unsigned char* buffer, bool border,
                            int pitch = 0) {
    chunk_ = chunk;
    last_ = chunk + Chunks - 1;
    buffer_ = buffer;
    pitch_ = pitch;
    in_flight_.target = -1;
    next_item_ = int(threadIdx.x);
    items_ = 0;
    top_ = origin_h(seg.s);
    left_ = origin_w(seg.s);
    if (kCarries<Element> || (AnyCopy && seg.copy != GlobalCopy::cp_async)) {
      if (AnyCopy && seg.copy == GlobalCopy::im2col) return;
      items_ = items(seg, chunk);
      if (!border || (kCarries<Element> && seg.copy == GlobalCopy::cp_async)) return;
      unrolled<Chunks>([&](int k) { fill_border(seg, buffer + k * pitch); });
    } else {
      unrolled<Chunks>([&](int k) { copy_async(seg, chunk + k, buffer + k * pitch); });
    }
  }

  // Completes the loads of the last call and begins the next, which have the time between calls.
  SNNLSTM_DEVICE void advance(const MmaSegment& seg) {
    if constexpr (kAdvances) {
#pragma unroll 1
      for (int k = 0; k < seg.accesses; ++k) {
        put(seg, in_flight_, buffer_);
        in_flight_.target = -1;
        if (next_item_ >= items_) next_chunk(seg);
        if (next_item_ < items_) fetch(seg, chunk_, next_item_, in_flight_);
        next_item_ += int(blockDim.x);
      }
    }
  }

  // Completes the loads, and loads the rest at once, Count elements at a time. im2col always loads
  // this way.
  template <int Count>
  SNNLSTM_DEVICE void finish(const MmaSegment& seg) {
    if constexpr (kAdvances) {
      if (AnyCopy && seg.copy == GlobalCopy::im2col) {
        unrolled<Chunks>([&](int k) { lay_out(seg, chunk_ + k, buffer_ + k * pitch_); });
        return;
      }
      put(seg, in_flight_, buffer_);
      in_flight_.target = -1;
#pragma unroll 1
      for (; next_item_ < items_ || next_chunk(seg); next_item_ += Count * int(blockDim.x)) {
        Item item[Count];
        unrolled<Count>(
            [&](int k) { fetch(seg, chunk_, next_item_ + k * int(blockDim.x), item[k]); });
        unrolled<Count>([&](int k) { put(seg, item[k], buffer_); });
      }
    }
  }

 private:
  // Returns the chunk's 16-byte groups.
  SNNLSTM_DEVICE int groups(const MmaSegment& seg, int chunk) const { return 2 * seg.steps(chunk); }

  // Returns the number of accesses to a chunk, by all threads together.
  SNNLSTM_DEVICE int items(const MmaSegment& seg, int chunk) const {
    const int pixels = seg.halo_h * seg.halo_w;
    return groups(seg, chunk) * (seg.copy == GlobalCopy::cp_async     ? pixels
                                 : seg.copy == GlobalCopy::vectorized ? kPerGroup / 4 * pixels
                                                                      : int(seg.by_run.value));
  }

  // Moves on to the next chunk, if there is one.
  SNNLSTM_DEVICE bool next_chunk(const MmaSegment& seg) {
    if (Chunks == 1 || items_ == 0 || chunk_ == last_) return false;
    ++chunk_;
    buffer_ += pitch_;
    next_item_ = int(threadIdx.x);
    items_ = items(seg, chunk_);
    return next_item_ < items_;
  }

  // What one access loads: 16 bytes of one pixel, or 4 channels for GlobalCopy::vectorized. What
  // cp_async() would copy has its bits in the first 4 values.
  struct Item {
    int target = -1;  // bytes from the buffer's start; -1: nothing to do
    float value[kPerGroup];
  };

  SNNLSTM_DEVICE void fetch(const MmaSegment& seg, int chunk, int number, Item& item) const {
    const Segment& s = seg.s;
    const void* image = image_of(s.src, at_.t, at_.n);
    item.target = -1;
    unsigned rest = unsigned(number);
    if (kCarries<Element> && (!AnyCopy || seg.copy == GlobalCopy::cp_async)) {
      if (number >= items_) return;
      const Group at = group_of(seg, chunk, number);
      item.target = at.target;
      const auto v = at.real ? load<float4>(static_cast<const Element*>(image) + at.from)
                             : make_float4(0, 0, 0, 0);
      item.value[0] = v.x;
      item.value[1] = v.y;
      item.value[2] = v.z;
      item.value[3] = v.w;
    } else if (seg.copy == GlobalCopy::vectorized) {  // a warp's loads lie side by side
      const int lanes = (kPerGroup / 4) * groups(seg, chunk);
      const int part = number & (lanes - 1);
      unsigned row = unsigned(number) >> (seg.steps(chunk) + kPerGroup / 8);
      const int col = int(seg.by_halo_w.split(row));
      const int y = top_ + int(row), x = left_ + col;
      const int c = chunk * kPerChunk + part * 4;
      if (int(row) >= seg.halo_h || !inside(y, s.height) || !inside(x, s.width)) return;
      item.target = mma_tile::row_offset(int(row) * seg.pitch + seg.row_padding + col) +
                    part * 4 * int(sizeof(Element));
      float v[4] = {0, 0, 0, 0};
      if (c < s.channels) read_vector<float>(image, s.src.type, offset(s.src, c, y, x), v);
      unrolled<4>([&](int e) { item.value[e] = v[e]; });
    } else {
      const int run = int(seg.by_run.split(rest)), group = int(rest);
      const int mask = seg.align - 1;
      const int skew = seg.whole_rows ? (top_ * s.width) & mask : 0;
      const int begin = seg.whole_rows ? 0 : left_ & ~mask;
      if (run < skew || group >= groups(seg, chunk)) return;
      unsigned row = unsigned(run - skew);
      const int x = begin + int(seg.by_col.split(row)), y = top_ + int(row);
      const int col = x - left_;
      if (int(row) >= seg.halo_h || !inside(col, seg.halo_w) || !inside(y, s.height) ||
          !inside(x, s.width))
        return;
      item.target = mma_tile::row_offset(int(row) * seg.pitch + seg.row_padding + col) + group * 16;
      const int c = chunk * kPerChunk + group * kPerGroup;
      const int from = offset(s.src, c, y, x);
      with_stored<float>(s.src.type, [&](auto of) {
        const auto* first = static_cast<const decltype(of)*>(image) + from;
        unrolled<kPerGroup>([&](int k) {
          float v[1] = {0};
          if (c + k < s.channels) load_vector(first + k * s.src.c, v);
          item.value[k] = v[0];
        });
      });
    }
  }

  // Lays a chunk out as im2col does. There are at most two chunks.
  SNNLSTM_DEVICE void lay_out(const MmaSegment& seg, int chunk, unsigned char* buffer) const {
    const Segment& s = seg.s;
    const void* image = image_of(s.src, at_.t, at_.n);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < items(seg, chunk); i += int(blockDim.x)) {
      unsigned rest = unsigned(i);
      const int pixel = int(seg.by_run.split(rest)), group = int(rest);
      unsigned row = unsigned(pixel);
      const int col = int(tiling_.by_w.split(row));
      const int top = (at_.y0 + int(row)) * s.step_h - s.pad_h;
      const int shift = fault(Fault::wrong_im2col_halo) ? 1 : 0;
      const int left = (at_.x0 + col) * s.step_w - s.pad_w + shift;
      unsigned tap = unsigned(chunk * kPerChunk + group * kPerGroup);
      int c = int(seg.by_channels.split(tap));
      int tap_w = int(seg.by_taps_w.split(tap)), tap_h = int(tap);
      float v[kPerGroup];
      unrolled<kPerGroup>([&](int k) {
        const int y = top + tap_h * s.dilation_h, x = left + tap_w * s.dilation_w;
        const bool real = tap_h < s.taps_h && inside(y, s.height) && inside(x, s.width);
        v[k] = real ? read<float>(image, s.src.type, offset(s.src, c, y, x)) : 0;
        if (++c == s.channels) {
          c = 0;
          ++tap_w;
        }
        if (tap_w == s.taps_w) {
          tap_w = 0;
          ++tap_h;
        }
      });
      store_group(buffer + mma_tile::row_offset(pixel) + group * 16, v);
    }
  }

  SNNLSTM_DEVICE void put(const MmaSegment& seg, const Item& item, unsigned char* buffer) const {
    if (item.target < 0) return;
    unsigned char* to = buffer + item.target;
    const auto& v = item.value;
    if (kCarries<Element> && (!AnyCopy || seg.copy == GlobalCopy::cp_async)) {
      store(to, make_float4(v[0], v[1], v[2], v[3]));
    } else if (kHalf && seg.copy == GlobalCopy::vectorized) {
      store(to, make_uint2(packed(v[0], v[1]), packed(v[2], v[3])));
    } else {
      store_group(to, v);
    }
  }

  SNNLSTM_DEVICE void store_group(unsigned char* to, const float (&v)[kPerGroup]) const {
    if constexpr (kHalf)
      store(to, make_uint4(packed(v[0], v[1]), packed(v[2], v[3]), packed(v[4], v[5]),
                           packed(v[6], v[7])));
    else
      store(to, make_float4(v[0], v[1], v[2], v[3]));
  }
  SNNLSTM_DEVICE static uint32_t packed(float lo, float hi) {
    if constexpr (kHalf)
      return pack<Element>(lo, hi);
    else
      return 0;  // unused
  }

  SNNLSTM_DEVICE void copy_async(const MmaSegment& seg, int chunk, unsigned char* buffer) const {
    const auto* image = static_cast<const Element*>(image_of(seg.s.src, at_.t, at_.n));
    const int count = items(seg, chunk);
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      const Group at = group_of(seg, chunk, i);
      cp_async(buffer + at.target, image + at.from, at.real);
    }
  }

  // The target, in bytes, and the source, in elements of the image, of a group of 16 bytes for
  // cp_async(). real: false if the group lies outside the image or after the last channel.
  struct Group {
    int target, from;
    bool real;
  };
  SNNLSTM_DEVICE Group group_of(const MmaSegment& seg, int chunk, int number) const {
    const Segment& s = seg.s;
    const int group = number & (groups(seg, chunk) - 1);
    unsigned row = unsigned(number) >> seg.steps(chunk);
    const int col = int(seg.by_halo_w.split(row));
    const int y = top_ + int(row), x = left_ + col;
    const bool first = AnyCopy && Chunks == 1 && fault(Fault::first_chunk);  // forward
    const int c = (first ? 0 : chunk) * kPerChunk + group * kPerGroup;
    const bool real = inside(y, s.height) && inside(x, s.width) && c < s.channels;
    const int shift = fault(Fault::wrong_source_halo) && x + 1 < s.width ? 1 : 0;
    return {mma_tile::row_offset(int(row) * seg.pitch + seg.row_padding + col) + group * 16,
            real ? offset(s.src, c, y, x + shift) : 0, real};
  }

  // Writes the zeros around the image. (copy_async() writes its own.)
  SNNLSTM_DEVICE void fill_border(const MmaSegment& seg, unsigned char* buffer) const {
    if (fault(Fault::no_border_zeros)) return;
    const Segment& s = seg.s;
    for (int i = int(threadIdx.x); i < seg.halo_h * seg.halo_w; i += int(blockDim.x)) {
      unsigned row = unsigned(i);
      const int col = int(seg.by_halo_w.split(row));
      const int y = top_ + int(row), x = left_ + col;
      if (inside(y, s.height) && inside(x, s.width)) continue;
      unsigned char* to =
          buffer + mma_tile::row_offset(int(row) * seg.pitch + seg.row_padding + col);
      unrolled<mma_tile::kGroups>([&](int g) { store(to + 16 * g, make_uint4(0, 0, 0, 0)); });
    }
  }

  const Tiling& tiling_;
  BlockPlace at_;
  int chunk_ = 0, last_ = 0, next_item_ = 0, items_ = 0, pitch_ = 0;  // of the load under way
  int top_ = 0, left_ = 0;  // the first pixel of its neighbourhood, in the source
  unsigned char* buffer_ = nullptr;
  Item in_flight_;
};

}  // namespace snnlstm::cuda
