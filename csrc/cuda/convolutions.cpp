// The convolutions of a pass: their sources, and how tensor cores walk through them.
#include "planning.h"

namespace snnlstm::cuda {

Segment x_segment(const Cell& c) {
  Segment s;
  s.channels = int(c.Cin);
  s.height = int(c.H);
  s.width = int(c.W);
  s.taps_h = c.kernel_h, s.taps_w = c.kernel_w;
  s.dilation_h = c.dilation_h, s.dilation_w = c.dilation_w;
  s.pad_h = int(c.pad_h()), s.pad_w = int(c.pad_w());
  s.step_h = c.stride_h, s.step_w = c.stride_w;
  return s;
}
Segment mem_segment(const Cell& c) {
  Segment s = x_segment(c);
  s.channels = int(c.C);
  s.height = int(c.Ho());
  s.width = int(c.Wo());
  s.step_h = s.step_w = 1;
  return s;
}

Segment gates_segment(const Cell& c, bool is_x) {
  Segment s = mem_segment(c);
  s.channels = int(4 * Shape(c).Cp);
  if (is_x)
    s.dgrad_stride_h = SmallDivisor(c.stride_h), s.dgrad_stride_w = SmallDivisor(c.stride_w);
  return s;
}

MmaDepth::MmaDepth(const MmaType& type, const Segment& segment, bool may_im2col) {
  const int64_t taps_of = segment.taps(), channels_of = segment.channels;
  const auto steps = [&](int64_t k) { return ceil_div(k, type.per_step()); };
  im2col = may_im2col && channels_of <= 4 && taps_of * channels_of <= 2 * type.per_chunk() &&
           steps(taps_of * channels_of) < taps_of * steps(channels_of);
  channels = im2col ? taps_of * channels_of : channels_of;
  taps = im2col ? 1 : taps_of;
  chunks = ceil_div(channels, type.per_chunk());
  tail_steps = int(steps(channels - (chunks - 1) * type.per_chunk()));
}

MmaDepth x_depth(const Cell& c, Multiply m) { return MmaDepth(MmaType(m), x_segment(c), true); }
MmaDepth mem_depth(const Cell& c, Multiply m) { return MmaDepth(MmaType(m), mem_segment(c)); }

namespace {

// Returns how the source is read fastest.
GlobalCopy copy_of(const Segment& s, const MmaType& type, const MmaDepth& depth) {
  if (depth.im2col) return GlobalCopy::im2col;
  const int unit = s.src.type == type.type() ? type.per_group() : 4;
  const Tensor& a = s.src;
  const bool dense = a.c == 1 && s.channels % unit == 0 && a.w % unit == 0 && a.h % unit == 0 &&
                     a.n % unit == 0 && a.t % unit == 0 &&
                     reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
  if (!dense) return GlobalCopy::gather;
  return s.src.type == type.type() ? GlobalCopy::cp_async : GlobalCopy::vectorized;
}

// A neighbourhood has 64 bytes per pixel, and one with a longer side fits in no shared memory.
constexpr int64_t kLongestSide = 4096;

// Returns whether threads copy the source through registers while they multiply.
bool copied_in_registers(const MmaSegment& m, const MmaType& type) {
  return m.copy == GlobalCopy::gather || m.copy == GlobalCopy::vectorized ||
         (m.copy == GlobalCopy::cp_async && type.multiply == Multiply::fp16_sm75);
}

}  // namespace

bool rows_fit_banks(const MmaSegment& m, int w) {
  return m.step_w != 1 || m.s.dgrad_stride_w.value != 1 || w % 16 == 0 || (m.pitch - w) % 16 == 0;
}

int64_t neighbourhood_bytes(const MmaSegment& m) {
  constexpr int64_t most = int64_t(1) << 28;
  const int64_t pixels = int64_t(m.halo_h) * m.pitch;
  if (64 * pixels > most) return most;
  return round_up(mma_tile::row_offset(int(pixels)) + 16, 128);
}

MmaSegment mma_segment(const Segment& s, const MmaType& type, const MmaDepth& depth,
                       const Tiling& tiling) {
  MmaSegment m;
  m.s = s;
  m.copy = copy_of(s, type, depth);
  m.taps = int(depth.taps), m.taps_w = depth.im2col ? 1 : s.taps_w;
  m.chunks = int(depth.chunks);
  m.tail_steps = depth.tail_steps;
  if (depth.im2col) {
    m.halo_h = tiling.h, m.halo_w = m.pitch = tiling.w;
    m.by_run = SmallDivisor(tiling.h * tiling.w);
    m.by_channels = SmallDivisor(s.channels);
    m.by_taps_w = SmallDivisor(s.taps_w);
    m.by_halo_w = SmallDivisor(m.halo_w);
    return m;
  }
  const auto reach = [](int64_t tile, int64_t step, int64_t taps, int64_t dilation, int64_t dgrad) {
    const int64_t pixels = dgrad > 1 ? (tile - 1 + (taps - 1) * dilation) / dgrad + 2
                                     : (tile - 1) * step + (taps - 1) * dilation + 1;
    return int(std::min(pixels, kLongestSide));
  };
  m.halo_h = reach(tiling.h, s.step_h, s.taps_h, s.dilation_h, int(s.dgrad_stride_h.value));
  m.halo_w = reach(tiling.w, s.step_w, s.taps_w, s.dilation_w, int(s.dgrad_stride_w.value));
  m.by_halo_w = SmallDivisor(m.halo_w);
  m.step_h = s.step_h, m.step_w = s.step_w;
  // Neighbouring pixels of the tile read neighbouring pixels of the source.
  const bool adjacent = s.step_w == 1 && s.dgrad_stride_w.value == 1;
  // Gathered pixels are stored 8 at a time from an even column on, which must be an even pixel.
  m.row_padding = adjacent && m.copy == GlobalCopy::gather ? s.pad_w & 1 : 0;
  m.pitch = int(round_up(m.halo_w + 1, 2));  // the same for all copies
  // An m16 tile may extend over the end of a row. With this pitch the next row lies on the banks on
  // which a longer row would continue.
  if (tiling.w % 16 != 0 && adjacent) {
    const int wanted = m.pitch + (tiling.w - m.pitch % 16 + 32) % 16;
    if (5 * wanted <= 8 * m.halo_w) m.pitch = wanted;
  }
  m.align = 32 / bytes_of(s.src.type);
  m.whole_rows = tiling.by_cols.value == 1 && s.dgrad_stride_w.value == 1 && tiling.w >= s.width;
  m.by_col = SmallDivisor(m.whole_rows ? s.width : round_up(m.halo_w + m.align - 1, m.align));
  m.by_run =
      SmallDivisor(m.whole_rows ? round_up(int64_t(m.halo_h) * s.width + m.align - 1, m.align)
                                : int64_t(m.halo_h) * m.by_col.value);
  return m;
}

int64_t chunk_accesses(const MmaSegment& m, const MmaType& type) {
  return mma_tile::kGroups * (m.copy == GlobalCopy::vectorized
                                  ? int64_t(type.per_group() / 4) * m.halo_h * m.halo_w
                              : m.copy == GlobalCopy::cp_async ? int64_t(m.halo_h) * m.halo_w
                                                               : int64_t(m.by_run.value));
}

MmaBuilder::MmaBuilder(Multiply multiply, int warp_columns, int tiles) : type(multiply) {
  conv.warp_columns = warp_columns;
  conv.unit_bytes = warp_columns * (tiles / 2) * type.pair_bytes();
}

void MmaBuilder::add(const Segment& s, const MmaDepth& depth, const Tiling& tiling) {
  MmaSegment& m = conv.segment[conv.segments++];
  m = mma_segment(s, type, depth, tiling);
  fits_banks = fits_banks && rows_fit_banks(m, tiling.w);
  conv.units += int(depth.units());
  conv.buffer_bytes = int(std::max<int64_t>(conv.buffer_bytes, neighbourhood_bytes(m)));
}

// A stage has about 8 KiB, 16 KiB in 3xTF32, or what the threads carry.
void MmaBuilder::finish(const void* weight, int64_t pitch, int threads) {
  int bytes = 16 * type.pair_bytes();
  if (type.multiply == Multiply::fp16_sm75)
    bytes = std::min(bytes, 16 * mma_gemm::kCarried * threads);
  const int wanted = bytes / conv.unit_bytes;
  conv.stage_units = std::max(std::min(wanted, conv.units), 1);
  conv.weight = weight;
  conv.weight_pitch = pitch;
  for (int k = 0; k < conv.segments; ++k) {
    MmaSegment& m = conv.segment[k];
    if (!copied_in_registers(m, type)) continue;
    // The chunk is loaded while the previous one is computed, if that is a full one.
    const int64_t accesses = ceil_div(chunk_accesses(m, type), threads);
    m.accesses = int(ceil_div(accesses, std::max(2 * m.taps / conv.stage_units, 1)));
  }
}

}  // namespace snnlstm::cuda
