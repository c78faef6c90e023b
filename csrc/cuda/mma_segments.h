// The sources of a convolution on tensor cores: how far a tile's neighbourhood reaches, how it is
// read, and how the walk through K is cut into chunks and stages. mma.cuh has the kernels' side.
#pragma once

#include <algorithm>

#include "images.h"
#include "mma.cuh"

namespace snnlstm::cuda {

// Sizes that follow from what the tensor cores multiply.
struct MmaType {
  Multiply multiply;
  int element;  // bytes of a number in shared memory

  explicit MmaType(Multiply m) : multiply(m), element(is_half(m) ? 2 : 4) {}
  DType type() const { return is_half(multiply) ? half_type(multiply) : DType::float32; }
  int pair_bytes() const {  // of a unit of the packed weight, see MmaGemm
    return (multiply == Multiply::tf32x3 ? 2 : 1) * mma_gemm::kPairBytes;
  }
  int per_group() const { return mma_tile::kGroupBytes / element; }
  int per_step() const { return 2 * per_group(); }
  int per_chunk() const { return mma_tile::kGroups * per_group(); }
};

// How the walk goes through a segment's K: chunks of channels; in a chunk taps; in a tap k-steps.
struct MmaDepth {
  bool patches = false;
  int64_t channels = 0, taps = 1, chunks = 0;  // of the walk; patches make taps channels
  int tail_steps = 0;

  MmaDepth() = default;
  // may_patch: lay out (tap, channel) side by side if that makes fewer units.
  MmaDepth(const MmaType& type, const Segment& segment, bool may_patch = false) {
    const int64_t taps_of = segment.taps(), channels_of = segment.channels;
    const auto steps = [&](int64_t k) { return ceil_div(k, type.per_step()); };
    patches = may_patch && channels_of <= 4 && taps_of * channels_of <= 2 * type.per_chunk() &&
              steps(taps_of * channels_of) < taps_of * steps(channels_of);
    channels = patches ? taps_of * channels_of : channels_of;
    taps = patches ? 1 : taps_of;
    chunks = ceil_div(channels, type.per_chunk());
    tail_steps = int(steps(channels - (chunks - 1) * type.per_chunk()));
  }
  int64_t units() const { return taps * (2 * (chunks - 1) + tail_steps); }
};

// Returns how the source is read fastest.
inline Feed feed_of(const Segment& s, const MmaType& type, const MmaDepth& depth) {
  if (depth.patches) return Feed::patches;
  const int unit = s.src.type == type.type() ? type.per_group() : 4;
  const Tensor& a = s.src;
  const bool dense = a.c == 1 && s.channels % unit == 0 && a.w % unit == 0 && a.h % unit == 0 &&
                     a.n % unit == 0 && a.t % unit == 0 &&
                     reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
  if (!dense) return Feed::gather;
  return s.src.type == type.type() ? Feed::async : Feed::vectors;
}

// A neighbourhood has 64 bytes for each pixel: with a longer side it fits in no shared memory.
constexpr int64_t kLongestSide = 4096;

inline MmaSegment mma_segment(const Segment& s, const MmaType& type, const MmaDepth& depth,
                              const Tiling& tiling) {
  MmaSegment m;
  m.s = s;
  m.feed = feed_of(s, type, depth);
  m.taps = int(depth.taps), m.taps_w = depth.patches ? 1 : s.taps_w;
  m.chunks = int(depth.chunks), m.tail_steps = depth.tail_steps;
  if (depth.patches) {
    m.halo_h = tiling.h, m.halo_w = m.pitch = tiling.w;
    m.by_run = SmallDivisor(tiling.h * tiling.w);
    m.by_channels = SmallDivisor(s.channels), m.by_taps_w = SmallDivisor(s.taps_w);
    m.by_halo_w = SmallDivisor(m.halo_w);
    return m;
  }
  const auto reach = [](int64_t tile, int64_t step, int64_t taps, int64_t dilation, int64_t up) {
    const int64_t pixels = up > 1 ? (tile - 1 + (taps - 1) * dilation) / up + 2
                                  : (tile - 1) * step + (taps - 1) * dilation + 1;
    return int(std::min(pixels, kLongestSide));
  };
  m.halo_h = reach(tiling.h, s.step_h, s.taps_h, s.dilation_h, int(s.up_h.value));
  m.halo_w = reach(tiling.w, s.step_w, s.taps_w, s.dilation_w, int(s.up_w.value));
  m.by_halo_w = SmallDivisor(m.halo_w);
  m.step_h = s.step_h, m.step_w = s.step_w;
  const bool plain = s.step_w == 1 && s.up_w.value == 1;
  // Gathered pixels are stored 8 at a time from an even column on, which must be an even pixel.
  m.lead = plain && m.feed == Feed::gather ? s.pad_w & 1 : 0;
  m.pitch = int(round_up(m.halo_w + 1, 2));  // the same for all feeds
  // An m16 tile may go over the end of a row. With this pitch the next row lies on the banks on
  // which the row would have gone on.
  if (tiling.w % 16 != 0 && plain) {
    const int wanted = m.pitch + (tiling.w - m.pitch % 16 + 32) % 16;
    if (5 * wanted <= 8 * m.halo_w) m.pitch = wanted;
  }
  m.align = 32 / bytes_of(s.src.type);
  m.whole_rows = tiling.by_cols.value == 1 && s.up_w.value == 1 && tiling.w >= s.width;
  m.by_col = SmallDivisor(m.whole_rows ? s.width : round_up(m.halo_w + m.align - 1, m.align));
  m.by_run =
      SmallDivisor(m.whole_rows ? round_up(int64_t(m.halo_h) * s.width + m.align - 1, m.align)
                                : int64_t(m.halo_h) * m.by_col.value);
  return m;
}

// Returns whether the rows of a tile of w columns, one after the other, lie on the shared memory's
// banks as one long row would: then a warp's reads of 8 pixels meet no bank twice.
inline bool rows_fit_banks(const MmaSegment& m, int w) {
  return m.step_w != 1 || m.s.up_w.value != 1 || w % 16 == 0 || (m.pitch - w) % 16 == 0;
}

// Returns whether threads bring the source while they multiply, turn by turn.
inline bool comes_in_turns(const MmaSegment& m, const MmaType& type) {
  return m.feed == Feed::gather || m.feed == Feed::vectors ||
         (m.feed == Feed::async && type.multiply == Multiply::fp16_sm75);
}

// Returns the turns of all threads together for a full chunk.
inline int64_t chunk_turns(const MmaSegment& m, const MmaType& type) {
  return mma_tile::kGroups * (m.feed == Feed::vectors
                                  ? int64_t(type.per_group() / 4) * m.halo_h * m.halo_w
                              : m.feed == Feed::async ? int64_t(m.halo_h) * m.halo_w
                                                      : int64_t(m.by_run.value));
}

// Returns a neighbourhood's bytes, at most 2^28: an int counts several of them.
inline int64_t neighbourhood_bytes(const MmaSegment& m) {
  constexpr int64_t most = int64_t(1) << 28;
  const int64_t pixels = int64_t(m.halo_h) * m.pitch;
  if (64 * pixels > most) return most;
  return round_up(mma_tile::row_offset(int(pixels)) + 16, 128);
}

// Builds a convolution from its segments.
struct MmaBuilder {
  MmaType type;
  MmaConv conv;
  bool fits_banks = true;  // of all segments

  // tiles: n-tiles of a warp
  MmaBuilder(Multiply multiply, int warp_columns, int tiles) : type(multiply) {
    conv.warp_columns = warp_columns;
    conv.unit_bytes = warp_columns * (tiles / 2) * type.pair_bytes();
  }

  void add(const Segment& s, const MmaDepth& depth, const Tiling& tiling) {
    MmaSegment& m = conv.segment[conv.segments++];
    m = mma_segment(s, type, depth, tiling);
    fits_banks = fits_banks && rows_fit_banks(m, tiling.w);
    conv.units += int(depth.units());
    conv.buffer_bytes = int(std::max<int64_t>(conv.buffer_bytes, neighbourhood_bytes(m)));
  }

  // A stage has about 8 KiB, or 16 if the weights come in parts, or what threads carry. weight: the
  // first unit of the first column block; pitch: bytes from one block to the next.
  void finish(const void* weight, int64_t pitch, int threads) {
    int bytes = 16 * type.pair_bytes();
    if (type.multiply == Multiply::fp16_sm75)
      bytes = std::min(bytes, 16 * mma_gemm::kCarried * threads);
    const int wanted = bytes / conv.unit_bytes;
    conv.stage_units = std::max(std::min(wanted, conv.units), 1);
    conv.weight = weight;
    conv.weight_pitch = pitch;
    for (int k = 0; k < conv.segments; ++k) {
      MmaSegment& m = conv.segment[k];
      if (!comes_in_turns(m, type)) continue;
      // The chunk comes while the one before is computed, if that is a full one.
      const int64_t turns = ceil_div(chunk_turns(m, type), threads);
      m.turns = int(ceil_div(turns, std::max(2 * m.taps / conv.stage_units, 1)));
    }
  }
};

}  // namespace snnlstm::cuda
