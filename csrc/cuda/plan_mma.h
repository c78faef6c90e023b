// Host side of mma.cuh: the neighbourhoods, the stream of weights and the shared memory of a
// launch.
#pragma once

#include "mma.cuh"
#include "plan.h"

namespace snnlstm::cuda {

// Sizes that follow from a type of operands.
struct MmaType {
  Multiply multiply;
  int element;  // bytes

  explicit MmaType(Multiply m)
      : multiply(m), element(m == Multiply::fp16 || m == Multiply::bf16 ? 2 : 4) {}
  DType type() const {  // of elements in shared memory
    return multiply == Multiply::fp16   ? DType::float16
           : multiply == Multiply::bf16 ? DType::bfloat16
                                        : DType::float32;
  }
  int pair_bytes() const {  // of the packed weight, see MmaGemm
    return (multiply == Multiply::tf32x3 ? 2 : 1) * mma_gemm::kPairBytes;
  }
  int per_group() const { return mma_tile::kGroupBytes / element; }
  int per_step() const { return 2 * per_group(); }
  int per_chunk() const { return mma_tile::kGroups * per_group(); }
};

// K of a segment in the order of the walk: chunks of channels, taps, k-steps.
struct MmaDepth {
  bool patches = false;
  int64_t channels = 0;  // of the walk
  int64_t taps = 1, chunks = 0;
  int tail_steps = 0;

  MmaDepth() = default;
  // may_patch: lay out (tap, channel) side by side where that makes fewer units.
  MmaDepth(const MmaType& type, const Segment& window, bool may_patch = false) {
    const int64_t taps_of = window.taps(), channels_of = window.channels;
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

// Returns how the source may be read.
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

constexpr int64_t kLongestSide = 4096;  // of a neighbourhood: 64 bytes and more for each pixel

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
  // A side longer than kLongestSide fits in no shared memory, whatever its length.
  const auto reach = [](int64_t tile, int64_t step, int64_t taps, int64_t dilation, int64_t up) {
    const int64_t pixels = up > 1 ? (tile - 1 + (taps - 1) * dilation) / up + 2
                                  : (tile - 1) * step + (taps - 1) * dilation + 1;
    return int(std::min(pixels, kLongestSide));
  };
  m.halo_h = reach(tiling.h, s.step_h, s.taps_h, s.dilation_h, int(s.up_h.value));
  m.halo_w = reach(tiling.w, s.step_w, s.taps_w, s.dilation_w, int(s.up_w.value));
  m.by_halo_w = SmallDivisor(m.halo_w);
  m.step_h = s.step_h, m.step_w = s.step_w;
  // An m16 tile that goes over a row's end finds the next row on the banks where this one would
  // have gone on, if both are a multiple of 16 pixels apart.
  // Gathered pixels are stored 8 at a time from an even column on, which must be an even pixel.
  const bool plain = s.step_w == 1 && s.up_w.value == 1;
  m.lead = plain && m.feed == Feed::gather ? s.pad_w & 1 : 0;
  m.pitch = int(round_up(m.halo_w + 1, 2));  // the same for all feeds
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

// The turns, of all threads together, of a full chunk that is not copied asynchronously.
inline int64_t chunk_turns(const MmaSegment& m, const MmaType& type) {
  return mma_tile::kGroups * (m.feed == Feed::vectors
                                  ? int64_t(type.per_group() / 4) * m.halo_h * m.halo_w
                                  : int64_t(m.by_run.value));
}

// A neighbourhood's bytes, but so few that several of them are still counted in int.
inline int64_t neighbourhood_bytes(const MmaSegment& m) {
  constexpr int64_t most = int64_t(1) << 28;
  const int64_t pixels = int64_t(m.halo_h) * m.pitch;
  if (64 * pixels > most) return most;
  return round_up(mma_tile::row_offset(int(pixels)) + 16, 128);
}

// Puts segments together.
struct MmaBuilder {
  MmaType type;
  int warp_columns, tiles;  // n-tiles of a warp
  MmaConv conv;

  MmaBuilder(Multiply multiply, int warp_columns_of, int tiles_of)
      : type(multiply), warp_columns(warp_columns_of), tiles(tiles_of) {
    conv.multiply = type.multiply;
    conv.warp_columns = warp_columns;
    conv.unit_bytes = unit_bytes();
  }
  int unit_bytes() const { return warp_columns * (tiles / 2) * type.pair_bytes(); }

  void add(const Segment& s, const MmaDepth& depth, const Tiling& tiling) {
    MmaSegment& m = conv.segment[conv.segments++];
    m = mma_segment(s, type, depth, tiling);
    conv.units += int(depth.units());
    conv.buffer_bytes = int(std::max<int64_t>(conv.buffer_bytes, neighbourhood_bytes(m)));
  }

  // The stages: about 8 KiB each, or 16 where the weights come in parts. weight: the first unit of
  // the first column block that is read; pitch: bytes from one block to the next.
  void finish(const void* weight, int64_t pitch, int threads) {
    const int wanted = 16 * type.pair_bytes() / conv.unit_bytes;
    conv.stage_units = std::max(std::min(wanted, conv.units), 1);
    conv.weight = weight;
    conv.weight_pitch = pitch;
    for (int k = 0; k < conv.segments; ++k) {
      MmaSegment& m = conv.segment[k];
      if (m.feed != Feed::gather && m.feed != Feed::vectors) continue;
      // They come while the chunk before is computed, if that has as many stages as a full one.
      const int64_t turns = ceil_div(chunk_turns(m, type), threads);
      m.turns = int(ceil_div(turns, std::max(2 * m.taps / conv.stage_units, 1)));
    }
  }
};

}  // namespace snnlstm::cuda
