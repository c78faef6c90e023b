// How data lies in memory between the caller's tensors, and how it is cut into tasks.
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
// With Winograd the images are rounded up to whole tiles, with zeros.
//
// Packed weights, K counting (kernel row, kernel column, input channel):
//   forward   (Cb, Kx + Km, 4, VL)                Kx rows for x, then Km for mem
//   backward  (Cin blocks, Kg, NV * VL), then (C blocks, Kg, NV * VL), NV vectors in a block
//             Kg counts (flipped kernel row, flipped kernel column, Cb, 4, VL)
// and for Winograd, of either half:
//   forward   (Cb, points, parts, Cin or C, 4, VL)
//   backward  (Cin or C blocks, points, parts, 4 Cp, NV * VL)
#pragma once

#include "../../testing/fences.h"
#include "conv.h"
#include "winograd.h"

SNNLSTM_BEGIN_ISA

// Vector code may read this many elements beyond an image, and drops them.
constexpr int64_t kReadAhead = 16;

// Hands out pieces of one allocation, each on a cache line of its own. Without memory it only
// counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t size = count * int64_t(sizeof(T)), whole = ((size + 63) & ~int64_t(63)) + kFence;
    char* p = base_ ? base_ + (-reinterpret_cast<uintptr_t>(base_) & 63) + used_ : nullptr;
    if (p) fence(p + size, whole - size);
    used_ += whole;
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return used_ + 64; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A register tile takes these neighbouring vectors of output channels at once.
struct VectorBlock {
  int64_t first;
  int count;
};

// Returns the block in which vector v of `vectors` vectors of `bytes` each is. Blocks have four
// vectors, and the last has the rest. Short vectors are taken in pairs, which the processor's
// longer ones hold (Merged).
inline VectorBlock vector_block(int64_t vectors, int64_t v, int bytes) {
  const int64_t whole = vectors / 4 * 4, rest = vectors - whole;
  if (v < whole) return {v / 4 * 4, 4};
  if (rest < 3 || 2 * bytes > kNativeBytes) return {whole, int(rest)};
  return v < whole + 2 ? VectorBlock{whole, 2} : VectorBlock{whole + 2, 1};
}

// The rows of a kernel's taps that meet a pixel, and not only the border.
struct MetTaps {
  int64_t first, last;  // the last one is not among them

  // Row 0 of the taps looks at row `begin` of n, which may lie in the border.
  MetTaps(int64_t begin, int kernel, int dilation, int64_t n) {
    const int64_t before = begin < 0 ? (dilation - 1 - begin) / dilation : 0;
    const int64_t until = n > begin ? (n - begin + dilation - 1) / dilation : 0;
    last = until < kernel ? until : kernel;
    first = before < last ? before : last;
  }
};

template <class T, int VL>
struct Layout {
  explicit Layout(const Cell& cell)
      : c(cell),
        form(cell.tiled() ? cpu::tiling(cell) : TileForm()),
        grad_form(cell.tiled() ? cpu::grad_tiling(cell) : TileForm()),
        Ho(cell.Ho()),
        Wo(cell.Wo()),
        Hr(whole(form.h, cell.dilation_h, Ho)),
        Wr(whole(form.w, cell.dilation_w, Wo)),
        Hp(cell.Hp()),
        Wp(cell.Wp()),
        ph(cell.pad_h()),
        pw(cell.pad_w()),
        Cb((cell.C + VL - 1) / VL),
        Cp(Cb * VL),
        pixels(Ho * Wo),
        Hm(bordered(cell.kernel_h, form.h, grad_form.h, cell.dilation_h, Ho)),
        Wm(bordered(cell.kernel_w, form.w, grad_form.w, cell.dilation_w, Wo)),
        Hx(tiled_x() ? Hm : cell.H + 2 * ph),
        Wx(tiled_x() ? Wm : cell.W + 2 * pw),
        taps(cell.kernel_h * cell.kernel_w),
        Kx(taps * cell.Cin),
        Km(taps * cell.C),
        Kg(taps * 4 * Cp),
        x_blocks(whole_vectors((cell.Cin + VL - 1) / VL)) {}

  Cell c;
  TileForm form, grad_form;        // Winograd's, or 1 x 1; grad_form: of the weight gradient
  int64_t Ho, Wo, Hr, Wr, Hp, Wp;  // Hr, Wr: the state's image in whole tiles
  int64_t ph, pw, Cb, Cp, pixels;
  int64_t Hm, Wm, Hx, Wx;  // with border, of mem and d gates, and of x
  int64_t taps, Kx, Km, Kg, x_blocks;

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
  // Returns `n` with the border that direct convolution, or the tiles of either form, look at.
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

  // Returns the rows of taps that meet the state's image, or x's, from a row of the state's pixels.
  MetTaps met(int64_t row, bool of_x) const {
    return MetTaps(row * (of_x ? c.stride_h : 1) - ph, c.kernel_h, c.dilation_h, of_x ? c.H : Ho);
  }

  // These count the values that Winograd makes of a kernel.
  int64_t tile_weights() const { return form.points() * form.parts(); }
  int64_t grad_points() const { return grad_form.points() * grad_form.parts(); }

  // Says whether at least half of the lanes are zero.
  bool few_channels() const { return 2 * c.C <= Cp; }
  // Says whether the weight gradient closes up the others, to few_vectors() vectors of gates. Where
  // all four gates are one vector that saves nothing.
  bool closes_up() const { return few_channels() && 4 * VL * int(sizeof(T)) > kNativeBytes; }
  int few_vectors() const { return 4 * c.C <= VL ? 1 : 2; }

  int64_t K() const { return Kx + Km; }
  // Returns the multiply-adds of a step's convolution.
  double step_work() const { return double(c.N) * pixels * 4 * K() * c.C; }
  int64_t mem_image() const { return Hm * Wm * Cp; }
  int64_t x_image() const { return Hx * Wx * c.Cin; }
  int64_t state_image() const { return pixels * Cp; }
  int64_t gates_image() const { return pixels * 4 * Cp; }
  // With Winograd the weight for direct convolution lacks the recurrent half, unless some pixels'
  // sums are formed directly.
  int64_t packed_rows() const { return c.tiled() && !c.keeps_equal() ? Kx : K(); }  // of forward
  int64_t packed_forward() const { return Cb * packed_rows() * 4 * VL; }
  int64_t packed_backward() const { return (x_blocks + (c.tiled() ? 0 : Cb)) * Kg * VL; }

  // Says whether the weights of one step exceed a thread's L2. Then they pass over many pixels each
  // time that they are read.
  bool wide() const { return weight_bytes() > 512 << 10; }
  bool heavy() const { return weight_bytes() > 2 << 20; }  // any L2
  int64_t weight_bytes() const {
    const int64_t values = c.tiled() ? tile_weights() * (c.Cin + c.C) : K();
    return values * 4 * Cp * int64_t(sizeof(T));
  }

  // Returns how many rows are worked on at a time. Their gates of one channel block fit in half of
  // a 32 KiB L1; a wide layer has twice as many. With Winograd they are some 32 tiles, which share
  // every weight that is read, or 64 where the tiles' values and products fit in L2.
  int64_t block_rows() const {
    if (c.tiled()) return rows_of_tiles(form);
    const int64_t rows = (wide() ? 32768 : 16384) / (Wo * 4 * VL * int64_t(sizeof(T)));
    return rows < 1 ? 1 : rows < Hr ? rows : Hr;
  }

  // Returns how many rows are worked on at a time in a form's tiles. A kernel in parts sees rows of
  // tiles below the block too, so that a block of few rows would transform more of those than of
  // its own.
  int64_t rows_of_tiles(const TileForm& t) const {
    const int64_t unit = whole(t.h, c.dilation_h, 1), columns = tiles(t.w, c.dilation_w, Wo);
    const int64_t of_unit = columns * unit / t.h.tile;
    int64_t units = (wanted_tiles(t) + of_unit - 1) / of_unit;
    if (units < t.h.parts) units = t.h.parts;
    const int64_t rows = unit * units, all = whole(t.h, c.dilation_h, Ho);
    return rows < all ? rows : all;
  }

  // These return the wanted number of tiles of a block, and the number of a whole image.
  int64_t wanted_tiles(const TileForm& t) const {
    const int64_t bytes = t.points() * (Cp + 4 * VL) * int64_t(sizeof(T));  // of a tile
    return 64 * bytes <= 448 << 10 ? 64 : 32;
  }
  int64_t image_tiles(const TileForm& t) const {
    return tiles(t.h, c.dilation_h, Ho) * tiles(t.w, c.dilation_w, Wo);
  }

  // Returns how many small images one thread takes together, so that the weights which it reads
  // serve all of them. Every thread has at least two such groups, or one where the weights do not
  // stay in L2. If the groups are `even`, and always if the weights are heavy, all threads
  // have equally many, with at most a third more images than wanted.
  int64_t images_together(int threads, bool even) const {
    if (block_rows() < Hr || c.N == 0) return 1;
    const int64_t images = c.tiled() ? images_of(form) : (wide() ? 128 : 64) / pixels;
    if (images < 1) return 1;
    const int64_t most = c.N / (wide() ? threads : 2 * threads);
    if (!wide() || !(even || heavy())) return most < 1 ? 1 : images < most ? images : most;
    const int64_t rounds = (3 * c.N + 4 * images * threads - 1) / (4 * images * threads);
    return (c.N + rounds * threads - 1) / (rounds * threads);
  }
  // Returns how many images have the wanted number of tiles or, where the weights stay in L2, as
  // many tiles as keep the registers busy.
  int64_t images_of(const TileForm& t) const {
    return (wide() ? wanted_tiles(t) : 16) / image_tiles(t);
  }

  // Returns how many rows of a block have their gates of one channel block put together in L1.
  int64_t strip_rows() const {
    if (!c.tiled()) return block_rows();
    const int64_t unit = whole(form.h, c.dilation_h, 1);
    const int64_t rows = 16384 / (Wr * 4 * VL * int64_t(sizeof(T))) / unit * unit;
    return rows < unit ? unit : rows < block_rows() ? rows : block_rows();
  }

  // Returns how many rows one task takes: a block, or less so that every thread has tasks, in whole
  // pooling windows and tiles. In a call of one step a task, which reads the rows around its own
  // too, takes several blocks, as far as their states fit in L2.
  int64_t task_rows(int threads) const {
    int64_t rows = block_rows();
    const int64_t wanted = 4 * threads;
    const int64_t whole_tiles = whole(form.h, c.dilation_h, 1), least = whole_tiles * form.h.parts;
    const auto tasks = [&](int64_t of) { return c.N * ((Ho + of - 1) / of); };
    const auto worth = [&](int64_t of) {
      return !wide() || of * Wo >= 128 || tasks(2 * of) < threads;
    };
    while (rows > least && tasks(rows) < wanted && worth((rows + 1) / 2)) rows = (rows + 1) / 2;
    const int64_t bytes = (2 * Wm + Wo) * Cp * int64_t(sizeof(T));
    while (c.T == 1 && rows < Ho && tasks(2 * rows) >= wanted && 2 * rows * bytes <= 512 << 10)
      rows *= 2;
    if (c.inhibition) return Hr;  // the winner is sought among all neurons of a sample
    int64_t unit = c.pool_h;
    while (unit % whole_tiles != 0) unit += c.pool_h;
    rows = rows / unit * unit;
    return rows < unit ? unit : rows;
  }
};

// The tasks are blocks of rows of all N images. The last block of an image takes the rows that no
// pooling window covers, too. An image is a sample's; if samples have lengths, the longest has the
// first image, so the samples that are not padded at a step are the first ones.
struct RowTasks {
  int64_t rows, per_image, count;
  int64_t most_together;  // tasks of a group
  template <class L>
  RowTasks(const L& l, const PassArgs& a, bool even)
      : rows(l.task_rows(a.threads)), a_(&a), threads_(a.threads) {
    const int64_t covered = l.Hp * l.c.pool_h;
    per_image = covered > 0 ? (covered + rows - 1) / rows : 1;
    count = l.c.N * per_image;
    most_together = per_image == 1 ? l.images_together(a.threads, even) : 1;
    image_rows_ = l.Ho;
  }
  // Returns the tasks of the images that are not padded at step t.
  RowTasks at(int64_t t) const {
    RowTasks some = *this;
    if (!a_->lengths) return some;
    some.count = 0;
    while (some.count < count && steps(some.count) > t) some.count += per_image;
    if (some.count < count && most_together > 1) {
      const int64_t each = (some.count + threads_ - 1) / threads_;
      some.most_together = each < 1 ? 1 : each < most_together ? each : most_together;
    }
    return some;
  }
  // Returns the sample of an image, and the steps of a task's sample. A call of one of the caller's
  // steps may be given how many are left of each sample.
  int64_t sample(int64_t image) const { return a_->order ? a_->order[image] : image; }
  int64_t steps(int64_t task) const {
    const int64_t T = a_->cell.T, given = a_->lengths ? a_->lengths[sample(image(task))] : T;
    return given < T ? given : T;
  }
  int64_t images() const { return count / per_image; }
  // The groups of tasks that share the weights: whole images, or one task each.
  int64_t groups() const { return (count + most_together - 1) / most_together; }
  int64_t first(int64_t group) const { return count > 0 ? count * group / groups() : 0; }
  int64_t together(int64_t group) const { return first(group + 1) - first(group); }
  int64_t image(int64_t task) const { return task / per_image; }
  int64_t begin(int64_t task) const { return task % per_image * rows; }
  int64_t end(int64_t task) const {
    return task % per_image == per_image - 1 ? image_rows_ : begin(task) + rows;
  }
  int64_t most_rows() const {
    const int64_t last = image_rows_ - (per_image - 1) * rows;
    return rows > last ? (per_image > 1 ? rows : last) : last;
  }

 private:
  const PassArgs* a_;
  int threads_;
  int64_t image_rows_;
};

// The input values that a convolution sums for one output pixel. They are cut into chunks whose
// weights stay in L1 while many pixels pass over them.
class RunList {
 public:
  RunList() = default;
  template <class... Args>
  explicit RunList(const Cell& c, Args... args) {
    dense(c, args...);
  }
  RunList(const RunList&) = delete;
  RunList& operator=(const RunList&) = delete;
  ~RunList() { delete[] runs_; }

  // Makes the list of all kernel_h x kernel_w taps of `channels` values each, row by row. In the
  // input rows lie row_stride apart and pixels pixel_stride. weight_row is that of the first tap.
  void dense(const Cell& c, int64_t channels, int64_t row_stride, int64_t pixel_stride,
             int64_t weight_row, int64_t max_len) {
    const bool whole_rows = c.dilation_w == 1 && pixel_stride == channels;
    const int64_t pieces = whole_rows ? 1 : c.kernel_w;
    const int64_t len = whole_rows ? c.kernel_w * channels : channels;
    reserve(c.kernel_h * pieces * (len / max_len + 1));
    for (int64_t i = 0; i < c.kernel_h; ++i)
      for (int64_t j = 0; j < pieces; ++j)
        add({i * c.dilation_h * row_stride + j * c.dilation_w * pixel_stride,
             weight_row + (i * pieces + j) * len, len},
            max_len);
    of_row_ = count_ / c.kernel_h;
  }
  void reserve(int64_t count) {
    delete[] runs_;
    runs_ = new Run[count];
    count_ = 0;
  }
  void add(Run run, int64_t max_len) {
    const int64_t parts = (run.len + max_len - 1) / max_len;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t a = run.len * p / parts, b = run.len * (p + 1) / parts;
      runs_[count_++] = {run.in + a, run.w + a, b - a};
    }
  }
  int count() const { return count_; }

  bool is_dense() const { return of_row_ > 0; }
  // Returns the row of taps that a run of a dense list belongs to.
  int64_t row(const Run* run) const { return (run - runs_) / of_row_; }
  // Reduces some neighbouring runs of a dense list to those of the rows [taps.first, taps.last).
  void limit(const Run*& runs, int& number, const MetTaps& taps) const {
    const Run *end = runs + number, *first = runs_ + taps.first * of_row_,
              *last = runs_ + taps.last * of_row_;
    if (runs < first) runs = first;
    if (end > last) end = last;
    number = runs < end ? int(end - runs) : 0;
  }

  // Calls f(first run, number of runs) for stretches of at most max_len values.
  template <class F>
  void chunks(int64_t max_len, F&& f) const {
    for (int first = 0; first < count_;) {
      int64_t len = 0;
      int n = 0;
      while (first + n < count_ && (n == 0 || len + runs_[first + n].len <= max_len))
        len += runs_[first + n++].len;
      f(runs_ + first, n);
      first += n;
    }
  }

 private:
  Run* runs_ = nullptr;
  int count_ = 0, of_row_ = 0;
};

// Returns how many values of K have weights (NV * VL each) that fill about 12 KiB.
template <class T>
constexpr int64_t chunk_length(int64_t outputs) {
  return 12288 / (outputs * int64_t(sizeof(T)));
}

SNNLSTM_END_ISA
