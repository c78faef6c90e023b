#include "planning.h"

namespace snnlstm::cuda {

DType gate_type(DType states, Matrix matrix) {
  if (states != DType::float32) return states;
  return matrix == Matrix::float16    ? DType::float16
         : matrix == Matrix::bfloat16 ? DType::bfloat16
                                      : states;
}

int64_t padded_channels(int64_t C) {
  Cell cell;
  cell.C = C;
  return Shape(cell).Cp;
}

namespace {

// Returns how the kernels multiply if a tile's neighbourhood fits into shared memory.
Multiply multiply_on(const Device& device, const Cell& c, Matrix matrix) {
  if (device.compute_capability < 80 || c.dtype == DType::float64) return Multiply::fma;
  const DType type = gate_type(c.dtype, matrix);
  if (type == DType::float16) return Multiply::fp16;
  if (type == DType::bfloat16) return Multiply::bf16;
  return matrix == Matrix::tf32 ? Multiply::tf32 : Multiply::fma;
}

}  // namespace

// ---- tiles --------------------------------------------------------------------------------------

// Widths are even, because threads hold pairs of pixels. All tiles along an axis are equally large,
// up to rounding.
void cut(Tiling& tiling, int64_t height, int64_t width, int64_t pixels) {
  constexpr int64_t kMostColumns = 32;
  tiling.cols = int(std::max<int64_t>(ceil_div(width, kMostColumns), 1));
  tiling.w = int(std::max<int64_t>(round_up(ceil_div(width, tiling.cols), 2), 2));
  tiling.rows = int(std::max<int64_t>(ceil_div(height, pixels / tiling.w), 1));
  tiling.h = int(std::max<int64_t>(ceil_div(height, tiling.rows), 1));
}

void cover(Tiling& tiling, const Cell& c, int64_t images, int64_t columns, int64_t per_block) {
  tiling.images = images;
  tiling.batch = int(std::max<int64_t>(c.N, 1));
  tiling.columns = int(ceil_div(columns, per_block));
}

// ---- convolutions -------------------------------------------------------------------------------

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
  if (is_x) s.dgrad_stride_h = c.stride_h, s.dgrad_stride_w = c.stride_w;
  return s;
}

MmaSegment mma_segment(const Segment& s, Multiply multiply, const Tiling& tiling) {
  const DType type = operand_type(multiply);
  const int per_group = mma_tile::kGroupBytes / bytes_of(type);
  const int per_chunk = mma_tile::kGroups * per_group;
  MmaSegment m;
  m.s = s;
  m.chunks = int(ceil_div(s.channels, per_chunk));
  m.tail_steps = int(ceil_div(s.channels - (m.chunks - 1) * per_chunk, 2 * per_group));
  const auto reach = [](int64_t tile, int64_t step, int64_t taps, int64_t dilation) {
    constexpr int64_t kMost = 4096;  // a longer side fits into no shared memory
    return int(std::min((tile - 1) * step + (taps - 1) * dilation + 1, kMost));
  };
  m.halo_h = reach(tiling.h, s.step_h, s.taps_h, s.dilation_h);
  m.halo_w = reach(tiling.w, s.step_w, s.taps_w, s.dilation_w);
  const Tensor& a = s.src;
  m.asynchronous = a.type == type && a.c == 1 && s.channels % per_group == 0 &&
                   a.w % per_group == 0 && a.h % per_group == 0 && a.n % per_group == 0 &&
                   a.t % per_group == 0 && reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
  return m;
}

// Returns a neighbourhood's bytes, at most 2^28: an int counts several of them.
static int64_t neighbourhood_bytes(const MmaSegment& m) {
  constexpr int64_t most = int64_t(1) << 28;
  const int64_t pixels = int64_t(m.halo_h) * m.halo_w;
  return 64 * pixels > most ? most : round_up(mma_tile::row_offset(int(pixels)), 128);
}

MmaConv mma_conv(std::initializer_list<MmaSegment> segments) {
  MmaConv conv;
  for (const MmaSegment& m : segments) {
    conv.segment[conv.segments++] = m;
    conv.buffer_bytes = int(std::max<int64_t>(conv.buffer_bytes, neighbourhood_bytes(m)));
  }
  return conv;
}

// ---- steps --------------------------------------------------------------------------------------

namespace {

// Plans the blocks for results of this size: on tensor cores, if they take such convolutions and
// the neighbourhoods fit into shared memory. fma_channels: of a block without tensor cores.
StepBlocks step_blocks(const Cell& c, const Device& device, Matrix matrix, int64_t height,
                       int64_t width, std::initializer_list<Segment> segments, int fma_channels) {
  StepBlocks step;
  cut(step.tiling, height, width, kTilePixels);
  step.multiply = multiply_on(device, c, matrix);
  for (const Segment& s : segments)
    if (step.mma() && (s.strided_dgrad() ||
                       mma_conv({mma_segment(s, step.multiply, step.tiling)}).shared_bytes() >
                           device.shared_bytes))
      step.multiply = Multiply::fma;
  step.channels = step.mma() ? mma_tile::kChannels : fma_channels;
  return step;
}

}  // namespace

StepBlocks forward_blocks(const Cell& c, const Device& device, Matrix matrix) {
  StepBlocks step = step_blocks(c, device, matrix, c.Ho(), c.Wo(), {x_segment(c), mem_segment(c)},
                                fma::kColumns / 4);
  cover(step.tiling, c, c.N, c.C, step.channels);
  return step;
}

StepBlocks data_blocks(const Cell& c, const Device& device, Matrix matrix, bool is_x) {
  StepBlocks step = step_blocks(c, device, matrix, is_x ? c.H : c.Ho(), is_x ? c.W : c.Wo(),
                                {gates_segment(c, is_x)}, fma::kColumns);
  cover(step.tiling, c, is_x ? c.T * c.N : c.N, is_x ? c.Cin : c.C, step.channels);
  return step;
}

// ---- packed weights -----------------------------------------------------------------------------

namespace {

PackedPart packed_part(const Cell& c, const StepBlocks& step, const Segment& segment, Use use) {
  PackedPart part;
  part.use = use;
  part.multiply = step.multiply;
  part.blocks = step.tiling.columns;
  if (step.mma()) {
    const MmaSegment m = mma_segment(segment, step.multiply, step.tiling);
    part.chunks = m.chunks;
    part.tail_steps = m.tail_steps;
    part.pitch = m.units() * part.pairs() * mma_tile::kPairBytes;
  } else {
    part.chunks = int(fma::depth(segment) / fma::kDepth);
    part.pitch = fma::depth(segment) * fma::kColumns * bytes_of(real_of(c.dtype));
  }
  return part;
}

}  // namespace

Packed packed_forward(const Cell& c, const StepBlocks& step) {
  Packed p;
  p.x = packed_part(c, step, x_segment(c), Use::x_to_gates);
  p.mem = packed_part(c, step, mem_segment(c), Use::mem_to_gates);
  p.mem.start = p.x.pitch;
  p.x.pitch = p.mem.pitch = p.x.pitch + p.mem.pitch;
  p.bytes = p.x.blocks * p.x.pitch;
  return p;
}

Packed packed_backward(const Cell& c, const StepBlocks& to_x, const StepBlocks& to_mem) {
  Packed p;
  p.x = packed_part(c, to_x, gates_segment(c, true), Use::gates_to_x);
  p.mem = packed_part(c, to_mem, gates_segment(c, false), Use::gates_to_mem);
  p.mem.start = p.x.blocks * p.x.pitch;
  p.bytes = p.mem.start + p.mem.blocks * p.mem.pitch;
  return p;
}

// ---- the weight's gradient ----------------------------------------------------------------------

namespace {

// Returns in how many parts the pixels of all steps are summed, of `blocks` blocks each: enough for
// two blocks of a multiprocessor. A part has at least 256 pixels, so that a block's start costs
// little. There are at most 1024 parts, because they are written and read again.
int64_t splits_of(const Device& device, int64_t blocks, int64_t pixels) {
  const int64_t most = std::clamp<int64_t>(pixels / 256, 1, 1024);
  return std::clamp<int64_t>(2 * device.multiprocessors / std::max<int64_t>(blocks, 1), 1, most);
}

// unit: shares are multiples of it. pixels: of a unit.
void split(WeightBlocks& w, const Device& device, int64_t blocks, int64_t unit, int64_t pixels) {
  const int64_t units = ceil_div(w.total, unit);
  const int64_t splits = splits_of(device, blocks, units * pixels);
  w.share = std::max<int64_t>(ceil_div(units, splits), 1) * unit;
  w.splits = int(std::max<int64_t>(ceil_div(w.total, w.share), 1));
}

WeightHalf half_on_mma(const Cell& c, int64_t channels) {
  const Shape s(c);
  WeightHalf half;
  half.tap_stride = int(round_up(channels, weight_tile::kChannels));
  half.part_rows = int(round_up(4 * s.Cp, weight_tile::kRows));
  half.part_columns = int(s.taps * half.tap_stride);
  half.blocks = int64_t(half.part_rows / weight_tile::kRows) *
                (half.tap_stride / weight_tile::kChannels) * ceil_div(s.taps, weight_tile::kTaps);
  return half;
}

}  // namespace

WeightBlocks weight_blocks(const Cell& c, const Device& device, Matrix matrix) {
  const Shape s(c);
  WeightBlocks w;
  const Multiply multiply = multiply_on(device, c, matrix);
  if (multiply != Multiply::fma) {
    cut(w.tiling, s.Ho, s.Wo, weight_tile::kPixels);
    cover(w.tiling, c, c.T * c.N, 1, 1);
    w.total = w.tiling.tiles();
    w.buffer_bytes = mma_conv({mma_segment(x_segment(c), multiply, w.tiling),
                               mma_segment(mem_segment(c), multiply, w.tiling)})
                         .buffer_bytes;
    const int element = bytes_of(operand_type(multiply));
    if (w.buffer_bytes < (1 << 24) && w.total < int64_t(1) << 30 &&
        weight_tile::shared_bytes(element, w.buffer_bytes) <= device.shared_bytes) {
      w.multiply = multiply;
      w.x = half_on_mma(c, c.Cin);
      w.mem = half_on_mma(c, c.C);
      split(w, device, w.x.blocks + w.mem.blocks, 1, weight_tile::kPixels);
      return w;
    }
  }
  w.tiling = Tiling();  // of one pixel
  w.tiling.rows = int(std::max<int64_t>(s.Ho, 1));
  w.tiling.cols = int(std::max<int64_t>(s.Wo, 1));
  cover(w.tiling, c, c.T * c.N, 1, 1);
  w.total = c.T * c.N * s.pixels;
  w.x.part_rows = int(round_up(4 * s.Cp, fma::kColumns));
  w.x.part_columns = int(round_up(s.taps * (c.Cin + c.C), kTilePixels));
  w.x.blocks = int64_t(w.x.part_rows / fma::kColumns) * (w.x.part_columns / kTilePixels);
  w.mem = w.x;
  w.x.tap_stride = int(c.Cin);
  w.mem.tap_stride = int(c.C);
  split(w, device, w.x.blocks, fma::kDepth, fma::kDepth);
  return w;
}

}  // namespace snnlstm::cuda
