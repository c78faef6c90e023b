// The memory layout of the data between the caller's tensors, and how it is cut into tasks.
//
// Images are channels-last, so that a vector holds neighbouring channels and a tap's inputs lie
// side by side. Channels are counted in blocks of VL: Cb blocks, Cp = Cb * VL channels, of which
// those from C on are zero.
//   x        (rows, W + 2 pad, Cin)               zero border, task-local or for one time step
//   mem      (N, Ho + 2 pad, Wo + 2 pad, Cp)      zero border: the recurrent convolution reads it
//   syn      (N, Ho * Wo, Cp)
//   gates    (N, Ho * Wo, Cb, 4, VL)              i, f, o and g of a channel in four vectors; in
//                                                 saved gates the sign of o says "was reset"
//   d gates  (N, Ho + 2 pad, Wo + 2 pad, Cb, 4, VL)
// A convolution has no mem, and 4 VL neighbouring output channels in the place of four gates.
// With Winograd the images are rounded up to whole tiles, with zeros.
//
// Packed weights, K counting (kernel row, kernel column, input channel):
//   forward   (Cb, x.K + mem.K, 4, VL)
//   backward  (Cin blocks, Kg, NV * VL), then (C blocks, Kg, NV * VL), NV vectors in a block
//             Kg counts (flipped kernel row, flipped kernel column, Cb, 4, VL)
// and for Winograd, of either half:
//   forward   (Cb, points, parts, Cin or C, 4, VL)
//   backward  (Cin or C blocks, points, parts, 4 Cp, NV * VL)
#pragma once

#include "run_list.h"
#include "winograd.h"
#include "workspace.h"

SNNLSTM_BEGIN_ISA

// Vector code may read this many elements beyond an image, which it then ignores.
constexpr int64_t kReadAhead = 16;

// The neighbouring vectors of output channels that a register tile takes at once.
struct VectorBlock {
  int64_t first;
  int count;
};

// Returns the block of vector v, of `vectors` vectors of `bytes` bytes each. Blocks have four
// vectors, and the last block has the rest. A rest of three short vectors is split into one vector
// and a pair, which one of the processor's longer vectors holds (Merged).
inline VectorBlock vector_block(int64_t vectors, int64_t v, int bytes) {
  const int64_t whole = vectors / 4 * 4;
  const int64_t rest = vectors - whole;
  if (v < whole) return {v / 4 * 4, 4};
  if (rest < 3 || 2 * bytes > kNativeBytes) return {whole, int(rest)};
  return v < whole + 2 ? VectorBlock{whole, 2} : VectorBlock{whole + 2, 1};
}

// What a half of the convolution reads: x or mem.
struct Input {
  int64_t channels, first_channel;  // of the caller's weight
  int64_t H, W;                     // the image's size,
  int64_t rows, columns;            // and with its border
  int64_t pixel;                    // values in a pixel
  int stride_h, stride_w;
  int64_t first_k, K;  // the half's rows of the packed weight
  int64_t blocks;      // vectors of the gradient's channels

  int64_t row() const { return columns * pixel; }
  int64_t image() const { return rows * row(); }
  // Lists the half's taps, which a convolution sums.
  RunList runs(const Cell& c, int64_t max_len) const {
    return RunList(c, channels, row(), pixel, first_k, max_len);
  }
};

template <class T, int VL>
struct Layout {
  explicit Layout(const Cell& cell)
      : c(cell),
        winograd(cell.tiled() ? cpu::tiling(cell) : WinogradTile()),
        grad_winograd(cell.tiled() ? cpu::grad_tiling(cell) : WinogradTile()),
        Ho(cell.Ho()),
        Wo(cell.Wo()),
        Hr(whole(winograd.h, cell.dilation_h, Ho)),
        Wr(whole(winograd.w, cell.dilation_w, Wo)),
        Hp(cell.Hp()),
        Wp(cell.Wp()),
        ph(cell.pad_h()),
        pw(cell.pad_w()),
        Cb((cell.C + VL - 1) / VL),
        Cp(Cb * VL),
        pixels(Ho * Wo),
        taps(cell.kernel_h * cell.kernel_w),
        Kg(taps * 4 * Cp) {
    mem.channels = cell.recurrent(), mem.first_channel = cell.Cin, mem.blocks = Cb;
    mem.pixel = cell.Cout ? 0 : Cp;
    mem.H = Ho, mem.W = Wo, mem.stride_h = mem.stride_w = 1;
    mem.rows = bordered(cell.kernel_h, winograd.h, grad_winograd.h, cell.dilation_h, Ho);
    mem.columns = bordered(cell.kernel_w, winograd.w, grad_winograd.w, cell.dilation_w, Wo);
    x.channels = x.pixel = cell.Cin, x.first_channel = 0;
    x.blocks = whole_vectors((cell.Cin + VL - 1) / VL);
    x.H = cell.H, x.W = cell.W, x.stride_h = cell.stride_h, x.stride_w = cell.stride_w;
    x.rows = tiled_x() ? mem.rows : cell.H + 2 * ph;
    x.columns = tiled_x() ? mem.columns : cell.W + 2 * pw;
    x.first_k = 0, x.K = mem.first_k = taps * x.channels, mem.K = taps * mem.channels;
  }

  Cell c;
  WinogradTile winograd;           // 1 x 1 without Winograd
  WinogradTile grad_winograd;      // the weight gradient's
  int64_t Ho, Wo, Hr, Wr, Hp, Wp;  // Hr, Wr: the state's image in whole tiles
  int64_t ph, pw, Cb, Cp, pixels;
  int64_t taps, Kg;
  Input x, mem;  // d gates have the image and border of mem

  // Returns the number of vectors of x's gradient. Vectors shorter than the processor's come in
  // pairs, which are merged, or in threes, which take as long.
  static int64_t whole_vectors(int64_t n) {
    return VL * int(sizeof(T)) < kNativeBytes && n > 1 && n % 3 != 0 ? round_up(n, 2) : n;
  }
  static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
  // Says whether the input half has the tiles of the recurrent half.
  bool tiled_x() const { return c.tiled() && c.stride_h == 1 && c.stride_w == 1; }
  // whole() rounds `n` pixels along an axis up to whole tiles, and tiles() counts those tiles.
  static int64_t whole(const Axis& a, int64_t dilation, int64_t n) {
    return round_up(n, a.tile * (a.tile > 1 ? dilation : 1));
  }
  static int64_t tiles(const Axis& a, int64_t dilation, int64_t n) {
    return whole(a, dilation, n) / a.tile;
  }
  // Adds to n pixels the border that direct convolution, or Winograd's tiles of either kind, reads.
  int64_t bordered(int kernel, const Axis& a, const Axis& b, int64_t dilation, int64_t n) const {
    if (!c.tiled()) return n + dilation * (kernel - 1);
    const int64_t most_a = whole(a, dilation, n) + dilation * (a.taps() - 1);
    const int64_t most_b = whole(b, dilation, n) + dilation * (b.taps() - 1);
    return most_a > most_b ? most_a : most_b;
  }

  // These count the taps of the caller's kernel, and find the place of one of `taps` among them.
  int64_t all_columns() const { return c.kernel_w + 2 * c.outer_w; }
  int64_t all_taps() const { return (c.kernel_h + 2 * c.outer_h) * all_columns(); }
  int64_t place(int64_t tap) const {
    return (tap / c.kernel_w + c.outer_h) * all_columns() + tap % c.kernel_w + c.outer_w;
  }

  // Returns the rows of taps that meet an input's image from a row of the state's pixels.
  MetTaps met(int64_t row, const Input& in) const {
    return MetTaps(row * in.stride_h - ph, c.kernel_h, c.dilation_h, in.H);
  }

  // These count the values of a kernel after Winograd's transform.
  int64_t tile_weights() const { return winograd.points() * winograd.parts(); }
  int64_t grad_points() const { return grad_winograd.points() * grad_winograd.parts(); }

  // Says whether at least half of the lanes hold no channel.
  bool few_channels() const { return 2 * outputs() <= 4 * Cp; }
  // Says whether the weight gradient compacts the lanes that hold channels to few_vectors() vectors
  // of gates. If all four gates fit into one vector, that would save nothing.
  bool compacts_lanes() const { return few_channels() && 4 * VL * int(sizeof(T)) > kNativeBytes; }
  int few_vectors() const { return outputs() <= VL ? 1 : 2; }
  // Count the outputs of the caller's weight, and find the first one of a gate's vector in a channel
  // block, which has lanes() of them. A convolution's outputs fill one vector after the other.
  int64_t outputs() const { return c.Cout ? c.Cout : 4 * c.C; }
  int64_t output(int64_t cb, int64_t gate) const {
    return c.Cout ? (4 * cb + gate) * VL : gate * c.C + cb * VL;
  }
  int64_t lanes(int64_t cb, int64_t gate) const {
    const int64_t left = c.Cout ? c.Cout - output(cb, gate) : c.C - cb * VL;
    return left < 0 ? 0 : left < VL ? left : VL;
  }

  int64_t K() const { return x.K + mem.K; }
  // Returns the multiply-adds of a step's convolution.
  double step_work() const { return double(c.N) * pixels * 4 * K() * c.C; }
  // The distances between the rows and images of d gates.
  int64_t gate_row() const { return mem.columns * 4 * Cp; }
  int64_t gate_image() const { return mem.rows * gate_row(); }
  int64_t state_image() const { return pixels * Cp; }
  // Returns the place of a row of an image of saved syn. Saved gates take four times as much.
  int64_t state_row(int64_t image, int64_t h) const { return image * state_image() + h * Wo * Cp; }
  // Writes the thresholds of Cp channels, which are 1 in lanes without a channel and in cells that
  // do not spike.
  void write_thresholds(const PassArgs& a, T* to) const {
    const T* threshold = static_cast<const T*>(a.threshold);
    for (int64_t ch = 0; ch < Cp; ++ch)
      to[ch] = c.spiking && ch < c.C ? threshold[ch * a.threshold_stride] : T(1);
  }
  // With Winograd the weight for direct convolution lacks the recurrent half, unless some pixels'
  // sums are computed directly.
  int64_t packed_rows() const { return c.tiled() && !c.keeps_equal() ? x.K : K(); }
  int64_t packed_forward() const { return Cb * packed_rows() * 4 * VL; }
  int64_t packed_backward() const { return (x.blocks + (c.tiled() ? 0 : mem.blocks)) * Kg * VL; }

  // These say whether the weights of one step exceed a small L2, or any processor's L2. If they do,
  // many pixels share each read of the weights.
  bool exceeds_l2() const { return weight_bytes() > 512 << 10; }
  bool exceeds_any_l2() const { return weight_bytes() > 2 << 20; }
  int64_t weight_bytes() const {
    const int64_t values = c.tiled() ? tile_weights() * (x.channels + mem.channels) : K();
    return values * 4 * Cp * int64_t(sizeof(T));
  }

  // Returns how many rows are worked on at a time. Their gates of one channel block fit in half of
  // a 32 KiB L1, or in all of it if the weights exceed L2. With Winograd they are some 32 tiles,
  // which share every weight that is read, or 64 if the tiles' values and products fit in L2.
  int64_t block_rows() const {
    if (c.tiled()) return rows_of_tiles(winograd);
    const int64_t rows = (exceeds_l2() ? 32768 : 16384) / (Wo * 4 * VL * int64_t(sizeof(T)));
    return rows < 1 ? 1 : rows < Hr ? rows : Hr;
  }

  // Returns how many rows of tiles are worked on at a time. A kernel in parts also reads
  // rows of tiles below the block, so that a block of few rows would transform more of those rows
  // than of its own.
  int64_t rows_of_tiles(const WinogradTile& t) const {
    const int64_t unit = whole(t.h, c.dilation_h, 1);
    const int64_t columns = tiles(t.w, c.dilation_w, Wo);
    const int64_t in_unit = columns * unit / t.h.tile;
    int64_t units = (wanted_tiles(t) + in_unit - 1) / in_unit;
    if (units < t.h.parts) units = t.h.parts;
    const int64_t rows = unit * units, all = whole(t.h, c.dilation_h, Ho);
    return rows < all ? rows : all;
  }

  // These return the wanted number of tiles of a block, and the number of a whole image.
  int64_t wanted_tiles(const WinogradTile& t) const {
    const int64_t bytes = t.points() * (Cp + 4 * VL) * int64_t(sizeof(T));  // a tile's
    return 64 * bytes <= 448 << 10 ? 64 : 32;
  }
  int64_t image_tiles(const WinogradTile& t) const {
    return tiles(t.h, c.dilation_h, Ho) * tiles(t.w, c.dilation_w, Wo);
  }

  // Returns how many small images one thread takes together, so that all of them share the weights
  // that it reads. Every thread has at least two such groups, or one if the weights exceed L2. If
  // the groups are `even`, and always if the weights exceed any L2, all threads have equally many,
  // with at most a third more images than wanted.
  int64_t images_together(int threads, bool even) const {
    if (block_rows() < Hr || c.N == 0) return 1;
    const int64_t images = c.tiled() ? images_of(winograd) : (exceeds_l2() ? 128 : 64) / pixels;
    if (images < 1) return 1;
    const int64_t most = c.N / (exceeds_l2() ? threads : 2 * threads);
    if (!exceeds_l2() || !(even || exceeds_any_l2()))
      return most < 1 ? 1 : images < most ? images : most;
    const int64_t rounds = (3 * c.N + 4 * images * threads - 1) / (4 * images * threads);
    return (c.N + rounds * threads - 1) / (rounds * threads);
  }
  // Returns how many images have the wanted number of tiles or, if the weights fit in L2, as many
  // tiles as keep the registers busy.
  int64_t images_of(const WinogradTile& t) const {
    return (exceeds_l2() ? wanted_tiles(t) : 16) / image_tiles(t);
  }

  // Returns how many rows of a block have their gates of one channel block in L1 at a time.
  int64_t strip_rows() const {
    if (!c.tiled()) return block_rows();
    const int64_t unit = whole(winograd.h, c.dilation_h, 1);
    const int64_t rows = 16384 / (Wr * 4 * VL * int64_t(sizeof(T))) / unit * unit;
    return rows < unit ? unit : rows < block_rows() ? rows : block_rows();
  }

  // Returns how many rows one task takes, in whole pooling windows and tiles: a block, or less if
  // the threads would lack tasks. In a call of one step a task also reads the rows around its own,
  // so it takes several blocks as long as their states fit in L2.
  int64_t task_rows(int threads) const {
    int64_t rows = block_rows();
    const int64_t wanted = 4 * threads;
    const int64_t whole_tiles = whole(winograd.h, c.dilation_h, 1);
    const int64_t least = whole_tiles * winograd.h.parts;
    const auto tasks = [&](int64_t of) { return c.N * ((Ho + of - 1) / of); };
    const auto worth = [&](int64_t of) {
      return !exceeds_l2() || of * Wo >= 128 || tasks(2 * of) < threads;
    };
    while (rows > least && tasks(rows) < wanted && worth((rows + 1) / 2)) rows = (rows + 1) / 2;
    const int64_t bytes = (2 * mem.columns + Wo) * Cp * int64_t(sizeof(T));
    while (c.T == 1 && rows < Ho && tasks(2 * rows) >= wanted && 2 * rows * bytes <= 512 << 10)
      rows *= 2;
    int64_t unit = c.pool_h;
    while (unit % whole_tiles != 0) unit += c.pool_h;
    rows = rows / unit * unit;
    return rows < unit ? unit : rows;
  }
};

SNNLSTM_END_ISA
