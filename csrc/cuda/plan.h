// What the host chooses before it launches anything: sizes of our own images, tiles, and how each
// tensor of the caller's is accessed.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "api.h"
#include "mma.cuh"
#include "tile.cuh"

namespace snnlstm::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Returns the compute type of kernels whose states have this type.
inline DType real_of(DType states) {
  return states == DType::float64 ? DType::float64 : DType::float32;
}

struct Shape {
  explicit Shape(const Cell& cell)
      : c(cell),
        Cp(round_up(cell.C, 8)),
        Ho(cell.Ho()),
        Wo(cell.Wo()),
        pixels(Ho * Wo),
        taps(int64_t(cell.kernel_h) * cell.kernel_w) {}
  Cell c;
  int64_t Cp, Ho, Wo, pixels, taps;

  int64_t state() const { return c.N * pixels * Cp; }  // elements of one time step
  int64_t gates() const { return 4 * state(); }
};

// Hands out pieces of one allocation, aligned to 256 bytes. If `base` is null, it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t bytes) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(bytes, 256);
    return p;
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Chooses a tile of at most `pixels` pixels, and with `windows` one of whole pooling windows;
// returns false if there is none. The width is even, since threads hold pairs of pixels. The tile
// with the fewest pixels in all tiles and their neighbourhoods wins.
inline bool choose_tile(const Cell& c, int64_t height, int64_t width, int pixels, bool windows,
                        Tiling& tiling) {
  const int64_t unit_h = windows ? c.pool_h : 1;
  const int64_t unit_w = windows && c.pool_w % 2 ? 2 * int64_t(c.pool_w) : windows ? c.pool_w : 2;
  int64_t best = -1;
  for (int64_t w = unit_w; unit_h * w <= pixels; w += unit_w) {
    const int64_t h =
        std::min(pixels / w / unit_h * unit_h, round_up(std::max<int64_t>(height, 1), unit_h));
    const int64_t rows = std::max<int64_t>(ceil_div(height, h), 1);
    const int64_t cols = std::max<int64_t>(ceil_div(width, w), 1);
    // In sectors of 8 numbers. A row that goes on beyond the tile costs one more at each end.
    const int64_t halo = std::min<int64_t>(2 * c.pad_h(), 1 << 16);
    const int64_t read = (h + halo) * (ceil_div(w, 8) + (w < width ? 2 : 0)) * 8;
    const int64_t cost = rows * cols * (4 * pixels + read);
    if (best < 0 || cost < best) {
      best = cost;
      tiling.h = int(h), tiling.w = int(w);
      tiling.by_w = SmallDivisor(w), tiling.by_rows = Divisor(rows), tiling.by_cols = Divisor(cols);
      tiling.by_window = SmallDivisor(std::max<int64_t>(w / c.pool_w, 1));
      tiling.by_windows = SmallDivisor(std::max<int64_t>(h / c.pool_h * (w / c.pool_w), 1));
    }
    if (w >= width) break;
  }
  return best >= 0;
}

// Returns the caller's tensor from time step t on. extent: T, N, channels, H, W. width: channels
// that a thread holds.
inline Tensor tensor(const View& v, DType type, int64_t t, const int64_t (&extent)[5], int width) {
  Tensor a;
  a.type = type;
  if (v.data == nullptr) return a;
  const int size = bytes_of(type);
  a.data = static_cast<char*>(v.data) + t * v.stride[0] * size;
  a.t = v.stride[0], a.n = v.stride[1];
  a.c = int(v.stride[2]), a.h = int(v.stride[3]), a.w = int(v.stride[4]);
  a.channels = int(extent[2]);
  int64_t last = 0;
  for (int k = 2; k < 5; ++k) last += (extent[k] - 1) * std::abs(v.stride[k]);
  if (last >= int64_t(1) << 31)
    throw std::runtime_error("one image of a tensor reaches over " + std::to_string(last) +
                             " elements, accepted are less than 2^31: make it contiguous");
  // Returns whether the address and all strides that are used, except `but`, are multiples of `of`.
  const auto multiple = [&](int of, int but) {
    if (reinterpret_cast<uintptr_t>(a.data) % (std::min(of * size, 16)) != 0) return false;
    for (int k = 0; k < 5; ++k)
      if (k != but && extent[k] > 1 && v.stride[k] % of != 0) return false;
    return true;
  };
  const bool c_dense = a.c == 1 || extent[2] == 1, w_dense = a.w == 1 || extent[4] == 1;
  if (width > 1 && c_dense && extent[2] % width == 0 && multiple(width, 2))
    a.access = Access::channels;
  else if (w_dense && extent[4] % 2 == 0 && multiple(2, 4))
    a.access = Access::rows;
  else
    a.access = Access::scalar;
  return a;
}

// Our images (T, N, Ho, Wo, planes, Cp) from step t on. as_tensor() makes a Tensor of them.
inline Image image(const void* data, const Shape& s, DType type, int planes = 1, int64_t t = 0) {
  Image a;
  a.type = type;
  a.n = s.pixels * planes * s.Cp, a.t = s.c.N * a.n;
  a.data = const_cast<char*>(static_cast<const char*>(data)) + t * a.t * bytes_of(type);
  a.width = int(s.Wo), a.planes = planes, a.Cp = int(s.Cp);
  return a;
}

inline Tensor as_tensor(const Image& i) {
  Tensor a;
  a.data = i.data;
  a.t = i.t, a.n = i.n, a.c = 1, a.w = i.planes * i.Cp, a.h = i.width * a.w;
  a.channels = i.planes * i.Cp;
  a.type = i.type;
  a.access = Access::channels;
  return a;
}

// Says why the kernels cannot run a cell in launches of so many blocks, or "". The kernels count
// blocks, and offsets within one image, in 31 bits.
inline std::string reason_against(const Cell& c, int64_t blocks) {
  const Shape s(c);
  // Bounds the rows or columns that a tile's taps reach over, times the stride: SmallDivisor.
  const auto reach = [](int64_t size, double stride, int64_t taps, double dilation) {
    constexpr int64_t tile = 128;
    const double all = (double(size + tile) * stride + double(taps - 1) * dilation) * stride;
    return int64_t(std::min(all, 9e18));
  };
  const std::pair<const char*, int64_t> counts[] = {
      {"((height / stride + 128) * stride + (kernel_size - 1) * dilation) * stride of the rows",
       reach(s.Ho, c.stride_h, c.kernel_h, c.dilation_h)},
      {"((width / stride + 128) * stride + (kernel_size - 1) * dilation) * stride of the columns",
       reach(s.Wo, c.stride_w, c.kernel_w, c.dilation_w)},
      {"4 * channels * height * width of one image's gates", 4 * s.Cp * s.pixels},
      {"channels * height * width of one input image", c.Cin * c.H * c.W},
      {"the number of blocks of a launch", blocks}};
  for (const auto& [what, value] : counts)
    if (value >= int64_t(1) << 31)
      return std::string(what) + " is " + std::to_string(value) +
             "; the CUDA kernels accept less than 2^31";
  return "";
}

inline void refuse_oversize(const Cell& c, int64_t blocks) {
  const std::string reason = reason_against(c, blocks);
  if (!reason.empty()) throw std::runtime_error(reason);
}

// ---- neighbourhoods, weights and shared memory on tensor cores, see mma.cuh ---------------------

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

// Returns the fastest way in which the source may be read.
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

// Returns the turns of all threads together for a full chunk that is not copied asynchronously.
inline int64_t chunk_turns(const MmaSegment& m, const MmaType& type) {
  return mma_tile::kGroups * (m.feed == Feed::vectors
                                  ? int64_t(type.per_group() / 4) * m.halo_h * m.halo_w
                                  : int64_t(m.by_run.value));
}

// Returns a neighbourhood's bytes, at most so many that int counts several of them.
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

  // tiles: n-tiles of a warp
  MmaBuilder(Multiply multiply, int warp_columns, int tiles) : type(multiply) {
    conv.multiply = multiply;
    conv.warp_columns = warp_columns;
    conv.unit_bytes = warp_columns * (tiles / 2) * type.pair_bytes();
  }

  void add(const Segment& s, const MmaDepth& depth, const Tiling& tiling) {
    MmaSegment& m = conv.segment[conv.segments++];
    m = mma_segment(s, type, depth, tiling);
    conv.units += int(depth.units());
    conv.buffer_bytes = int(std::max<int64_t>(conv.buffer_bytes, neighbourhood_bytes(m)));
  }

  // A stage has about 8 KiB, or 16 if the weights come in parts. weight: the first unit of the
  // first column block; pitch: bytes from one block to the next.
  void finish(const void* weight, int64_t pitch, int threads) {
    const int wanted = 16 * type.pair_bytes() / conv.unit_bytes;
    conv.stage_units = std::max(std::min(wanted, conv.units), 1);
    conv.weight = weight;
    conv.weight_pitch = pitch;
    for (int k = 0; k < conv.segments; ++k) {
      MmaSegment& m = conv.segment[k];
      if (m.feed != Feed::gather && m.feed != Feed::vectors) continue;
      // The chunk comes while the one before is computed, if that is a full one.
      const int64_t turns = ceil_div(chunk_turns(m, type), threads);
      m.turns = int(ceil_div(turns, std::max(2 * m.taps / conv.stage_units, 1)));
    }
  }
};

}  // namespace snnlstm::cuda
