// Kernels that go through a whole sequence in one launch. A block keeps one sample, and what one
// step leaves for the next lies in its shared memory:
//
//   x              2 images in the operands' type: step t reads one while t + 1 comes to the other
//   mem            2 images: step t reads one and writes the other; so a step needs one barrier
//   weights        all of them, packed as for the kernels of one step
//   syn, resets    in slots of the thread that has the neurons
//
// A unit is what a warp computes at once: some pixels of some channels. Every warp has the same
// units in every step.
#pragma once

#include <type_traits>

#include "fma.cuh"
#include "mma.cuh"

namespace snnlstm::cuda {

namespace resident {
// The most threads of a block. Forward kernels with 4 n-tiles or of float need 128 registers, those
// with 8 n-tiles or of double up to 184. width: n-tiles (mma), or bytes of R (fma).
constexpr int threads(int width) { return width <= 4 ? 512 : 256; }
constexpr int backward_threads(int real) { return real == 4 ? 512 : 256; }

SNNLSTM_DEVICE int warp() { return int(threadIdx.x) / 32; }
SNNLSTM_DEVICE int warps() { return int(blockDim.x) / 32; }
}  // namespace resident

// An image with a border of zeros in shared memory. For tensor cores pixels hold all channels.
// Pairs of pixels are then an odd number of 16-byte groups apart, and rows so far that the same
// holds over the end of a row: 8 pixels of the same parity, which ldmatrix reads, lie on different
// banks. Without tensor cores each channel is a plane.
struct SharedImage {
  int start = 0;  // bytes of shared memory before the image, or before the first of two
  int bytes = 0;  // of one image
  int channel = 0, row = 0, pair = 0, single = 0;  // bytes from one to the next
  int top = 0, left = 0;                           // rows and columns of the border
  int rows = 0, columns = 0;                       // with the border; others are not kept

  // Row and column count from the border's corner.
  SNNLSTM_BOTH int pixel(int y, int x) const {
    return y * row + (x >> 1) * pair + (x & 1) * single;
  }
};

// Finds the pixel that a convolution of this stride reads for pixel m of the tile at tap 0, 0. row:
// the bytes from the image's start to the pixel's row. A pixel m beyond the tile gets some pixel of
// the same parity.
SNNLSTM_DEVICE void locate(const Tiling& tiling, const SharedImage& image, int m, int step_h,
                           int step_w, int& row, int& column) {
  unsigned y = unsigned(m < tiling.h * tiling.w ? m : m & 1);
  column = int(tiling.by_w.split(y)) * step_w;
  row = int(y) * step_h * image.row;
}

// The layout of shared memory, in bytes from its start.
struct ResidentLayout {
  SharedImage x, mem;
  int images = 0;  // end of the images
  int weights = 0, table = 0;
  int slots = 0, flags = 0;
  int vectors = 0, mem_tile = 0, mem_pitch = 0, winners = 0;
  int bytes = 0;
};

// A walk over taps and k-steps: chunks of K, k-steps of the last chunk, units.
struct WalkSizes {
  int chunks = 0, tail_steps = 0, units = 0;
};

// What the kernels of both passes are given.
template <class Neuron, class Layout>
struct ResidentArgs {
  int T = 0;
  bool record = false;
  Tiling tiling;  // one tile is the whole image
  Neuron neuron;
  Layout at;
  Multiply multiply = Multiply::fma;
  const void* weight = nullptr;          // packed
  int weight_bytes = 0, unit_bytes = 0;  // mma: bytes of the weight; of a unit of the walk
  int weight_columns = 0;                // fma: of a block of the weight
  SmallDivisor by_groups;                // units of the same pixels
  int units = 0;                         // what warps compute at once, in the whole convolution
  int channels = 0;                      // of the tile
};

template <class Element, class R>
SNNLSTM_DEVICE Element element_of(DType type, R value) {
  if constexpr (sizeof(Element) == 2)
    return Element{uint16_t(to_bits16(type, value))};
  else if constexpr (std::is_same_v<Element, tf32>)
    return tf32{mma_gemm::rounds_to_tf32(detail::bits_of(value))};
  else
    return Element(value);
}

// Stores N neighbouring channels of one pixel, aligned to their size.
template <class Element, class R, int N>
SNNLSTM_DEVICE void put_channels(unsigned char* to, DType type, const R (&v)[N]) {
  Element stored[N];
  unrolled<N>([&](int i) { stored[i] = element_of<Element>(type, v[i]); });
  store_elements(reinterpret_cast<Element*>(to), stored);
}

// Writes table[k] for k = (tap, channel) < depth: the bytes from a pixel to that tap and channel,
// or -1 behind the last tap.
SNNLSTM_DEVICE void fill_taps(int* table, int depth, const Segment& s, int channels,
                              const SharedImage& image) {
  for (int k = int(threadIdx.x); k < depth; k += int(blockDim.x)) {
    const int tap = k / channels;
    table[k] = tap >= s.taps()
                   ? -1
                   : k % channels * image.channel + tap / s.taps_w * s.dilation_h * image.row +
                         tap % s.taps_w * s.dilation_w * image.single;
  }
}

// Writes zeros from the start of shared memory on; bytes: a multiple of 16.
SNNLSTM_DEVICE void clear_shared(unsigned char* shared, int bytes) {
  if (fault(Fault::missing_zero_fill, 20)) return;
  for (int i = 16 * int(threadIdx.x); i < bytes; i += 16 * int(blockDim.x))
    store(shared + i, make_uint4(0, 0, 0, 0));
}

// Begins to copy, 16 bytes at a time; the caller waits.
SNNLSTM_DEVICE void copy_to_shared(unsigned char* to, const void* from, int bytes) {
  const auto* source = static_cast<const unsigned char*>(from);
  for (int i = 16 * int(threadIdx.x); i < bytes; i += 16 * int(blockDim.x))
    cp_async(to + i, source + i);
}

// Brings one time step of x to shared memory. A thread has kAtOnce elements under way, which arrive
// between two turns. In parts the products need all registers but those of two, and take
// three times as long.
template <class Element, class R>
class ResidentInput {
 public:
  static constexpr int kAtOnce = std::is_same_v<Element, mma_gemm::Parts> ? 2 : 8;

  SNNLSTM_DEVICE ResidentInput(const Segment& s, const SharedImage& image, DType type,
                               const Divisor& by_first, const Divisor& by_second, int n)
      : s_(s), image_(image), type_(type), by_first_(by_first), by_second_(by_second), n_(n) {}

  SNNLSTM_DEVICE void start(int t, unsigned char* to) {
    t_ = t, to_ = to;
    next_ = int(threadIdx.x);
    fetch();
  }
  SNNLSTM_DEVICE void turn() {
    put();
    fetch();
  }
  SNNLSTM_DEVICE void finish() {
    while (under_way_) turn();
  }

 private:
  // Neighbouring threads take neighbours in memory. by_first and by_second divide by the extents of
  // the two dimensions that go fastest: channels and columns, or columns and rows.
  SNNLSTM_DEVICE void fetch() {
    const int items = s_.channels * s_.height * s_.width;
    under_way_ = next_ < items;
    if (!under_way_) return;
    const bool by_channel = s_.src.c == 1;
    const void* from = image_of(s_.src, t_, n_);
    unrolled<kAtOnce>([&](int k) {
      target_[k] = -1;
      if (next_ < items) {
        unsigned rest = unsigned(next_);
        const int first = int(by_first_.split(rest)), second = int(by_second_.split(rest));
        const int c = by_channel ? first : int(rest);
        const int x = by_channel ? second : first, y = by_channel ? int(rest) : second;
        const int row = y + image_.top, column = x + image_.left;
        if (row < image_.rows && column < image_.columns) {
          target_[k] = c * image_.channel + image_.pixel(row, column);
          value_[k] = read<R>(from, s_.src.type, offset(s_.src, c, y, x));
        }
      }
      next_ += int(blockDim.x);
    });
  }
  SNNLSTM_DEVICE void put() {
    if (!under_way_) return;
    unrolled<kAtOnce>([&](int k) {
      if (target_[k] >= 0)
        *reinterpret_cast<Element*>(to_ + target_[k]) = element_of<Element>(type_, value_[k]);
    });
  }

  const Segment& s_;
  const SharedImage& image_;
  DType type_;
  const Divisor &by_first_, &by_second_;
  int n_, t_ = 0, next_ = 0;
  bool under_way_ = false;
  unsigned char* to_ = nullptr;
  R value_[kAtOnce];
  int target_[kAtOnce];
};

// The body of all resident kernels: a Sequence goes through the steps, a Tile has the neurons, a
// Unit forms the products. A block has one sample.
template <class Sequence, class Tile, class Unit, class Args>
SNNLSTM_DEVICE void run_resident(const Args& p) {
  auto* shared = &shared_memory<unsigned char>();
  BlockPlace block{0, int(blockIdx.x), 0, 0, 0, blockIdx.x};
  const Tile tile(p.neuron, p.tiling, block, 0, p.channels,
                  reinterpret_cast<typename Tile::N::R*>(shared + p.at.vectors));
  Unit unit(p, shared);
  Sequence(p, shared, block, tile).run(unit);
}

// ---- products on tensor cores -------------------------------------------------------------------

// The type in which an image holds operands. tf32 is rounded when it is stored, once, and not
// whenever it is read.
template <class Element>
using Stored = std::conditional_t<std::is_same_v<Element, float>, tf32, Element>;

// Writes table[2 u] and table[2 u + 1]: the bytes from a pixel, of an even column and of an odd
// one, to what unit u of a walk over the taps reads.
SNNLSTM_DEVICE void fill_walk(int* table, const Segment& s, const SharedImage& image,
                              const WalkSizes& walk) {
  const int full = 2 * s.taps();
  for (int u = int(threadIdx.x); u < walk.units; u += int(blockDim.x)) {
    const int chunk = min(u / full, walk.chunks - 1);
    const int steps = chunk + 1 < walk.chunks ? 2 : walk.tail_steps;
    const int tap = (u - chunk * full) / steps, step = (u - chunk * full) % steps;
    const int right = tap % s.taps_w * s.dilation_w;
    const int down = tap / s.taps_w * s.dilation_h * image.row + chunk * 64 + step * 32;
    unrolled<2>([&](int odd) {
      table[2 * u + odd] = down + image.pixel(0, odd + right) - image.pixel(0, odd);
    });
  }
}

// Adds a b to acc for one k-step, as MmaGemm::product() does. a: of Stored<Element>.
template <class Element, int NT>
SNNLSTM_DEVICE void product_of_stored(Multiply multiply, uint32_t (&a)[2][4], SharedPlace b,
                                      float (&acc)[2][NT][4]) {
  using Gemm = MmaGemm<Element, NT, true>;
  if constexpr (std::is_same_v<Element, float>) {
    unrolled<NT / 2>(
        [&](int pair) { Gemm::add_pair(acc, pair, a, load<uint4>(b + pair * Gemm::kPairBytes)); });
  } else {
    Gemm::product(multiply, a, b, acc);
  }
}

// Computes one half of a convolution for a warp's 32 pixels x NT n-tiles.
template <class Element, int NT>
struct ResidentWalk {
  static constexpr bool kParts = MmaGemm<Element, NT, true>::kParts;
  static constexpr int kFolded = 32;  // in parts: k-steps whose sums are added to the totals

  Multiply multiply;
  const Tiling& tiling;
  const SharedImage& image;  // pixels with all channels
  const int* table;          // see fill_walk()
  int units, unit_bytes;

  // b: the lane's B fragments of the first unit; becomes those of the unit behind the last.
  SNNLSTM_DEVICE void add(int first_pixel, int step_h, int step_w, const unsigned char* from,
                          SharedPlace& b, float (&acc)[2][NT][4]) const {
    const int lane = int(threadIdx.x) % 32;
    SharedPlace row[2];
    int column = 0;
    unrolled<2>([&](int mi) {
      int y;
      const int m = first_pixel + mi * 16 + 2 * (lane % 8) + (lane >> 3 & 1);
      locate(tiling, image, m, step_h, step_w, y, column);
      if (fault(Fault::wrong_halo, 20)) ++column;
      row[mi] = shared_place(from + y + image.pixel(0, column) + (lane >> 4) * 16);
    });
    const int* offset =
        table + (column & 1);  // both columns have one parity: tiles have even width
    if constexpr (kParts) {
#pragma unroll 1
      for (int first = 0; first < units; first += kFolded) {
        float part[2][NT][4] = {};
        add_units(row, offset, first, min(first + kFolded, units), b, part);
        unrolled<2 * NT * 4>([&](int i) { (&acc[0][0][0])[i] += (&part[0][0][0])[i]; });
      }
    } else {
      add_units(row, offset, 0, units, b, acc);
    }
  }

 private:
  SNNLSTM_DEVICE void add_units(const SharedPlace (&row)[2], const int* offset, int first, int last,
                                SharedPlace& b, float (&acc)[2][NT][4]) const {
#pragma unroll 1
    for (int u = first; u < last; ++u, b = b + unit_bytes) {
      const int at = offset[2 * u];
      uint32_t a[2][4];
      unrolled<2>([&](int mi) { ldmatrix(a[mi], row[mi] + at); });
      product_of_stored<Element>(multiply, a, b, acc);
    }
  }
};

// ---- products without ---------------------------------------------------------------------------

// Begins to copy packed weights (column blocks, rows, columns of a block), see fma.cuh, to (depth,
// columns) in shared memory; the caller waits. columns, of_block: multiples of 4.
template <class R>
SNNLSTM_DEVICE void copy_rows(R* to, const R* from, int depth, int rows, int columns,
                              int of_block) {
  constexpr int kVector = 16 / sizeof(R);
  const int vectors = columns / kVector;
  for (int i = int(threadIdx.x); i < depth * vectors; i += int(blockDim.x)) {
    const int k = i / vectors, column = i % vectors * kVector;
    cp_async(to + i * kVector,
             from + (column / of_block * rows + k) * of_block + column % of_block);
  }
}

// Adds the products of rows 0 ... depth - 1 of K to acc[pair][pixel][column], for 4 columns of
// weight and the pairs of pixels from first, first + 16, ... on. table: see fill_taps().
template <class R>
SNNLSTM_DEVICE void add_products(const Tiling& tiling, const SharedImage& image, int first,
                                 int step_h, int step_w, const unsigned char* from, int depth,
                                 const int* table, const R* weight, int pitch, R (&acc)[4][2][4]) {
  const unsigned char* pixels[4];
  unrolled<4>([&](int i) {
    int y, x;
    locate(tiling, image, first + 16 * i, step_h, step_w, y, x);
    pixels[i] = from + y + image.pixel(0, x);
  });
  const int next = step_w * int(sizeof(R));
#pragma unroll 2
  for (int k = 0; k < depth; ++k, weight += pitch) {
    const int tap = table[k];
    R right[4];
    load_vector(weight, right);
    unrolled<4>([&](int i) {
      const unsigned char* p = pixels[i] + tap;
      const R left[2] = {*reinterpret_cast<const R*>(p), *reinterpret_cast<const R*>(p + next)};
      unrolled<2, 4>([&](int px, int c) { acc[i][px][c] += left[px] * right[c]; });
    });
  }
}

}  // namespace snnlstm::cuda
