// Implicit GEMM on tensor cores: M = pixels of a tile, N = columns, K = taps x channels.
//
// A block of 4 warps keeps the tile's neighbourhood in shared memory, 64 bytes of channels (a
// chunk) at a time, and walks over all taps of the chunk by shifting the rows that it reads. So
// there is no im2col, and a block fetches every source pixel once. Weights come in the order in
// which the tensor cores take them, straight from global memory: each warp reads all that its block
// needs.
//
//     pixel 0 | 4 groups of 16 bytes
//     pixel 1 | 4 groups of 16 bytes
//     16 bytes of padding
//     pixel 2 | ...
//
// So three kinds of access touch every bank once: ldmatrix of every other pixel, reads of 8
// neighbours (weight_gradient_mma.cuh), and stores of neighbours.
//
// A warp computes 32 pixels x NT n-tiles of 8 columns. Row r of an m16 tile is pixel 2 r for r < 8
// and 2 (r - 8) + 1 for the others: a thread's rows g and g + 8 are the neighbours 2g and 2g + 1.
// If n-tiles come in pairs (a, b) of 16 channels, columns 2t, 2t + 1 of a are channels 4t, 4t + 1,
// and those of b are 4t + 2, 4t + 3: a thread holds 2 pixels x 4 neighbouring channels.
#pragma once

#include "../gemm.h"
#include "tile.cuh"

namespace snnlstm::cuda {

// Rounds a float for the tensor core, which drops all but the first 10 bits of the mantissa, by
// adding about half a unit of the last of these bits. That takes one instruction (cvt.rna: two or
// three). NaN, infinity and numbers that are exact in tf32 keep their values. The error is at most
// 0.71 units, and 0 on average over mantissas.
SNNLSTM_DEVICE uint32_t rounds_to_tf32(uint32_t bits) {
  const float x = detail::float_of(bits);
  return detail::bits_of(fmaf(x, 3.4526698e-4f, x));  // 2^-11.5
}

// Element: of shared memory, float (which tf32 rounds when it is read), fp16 or bf16.
template <class Element>
struct MmaElement {
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kPerGroup = mma_tile::kGroupBytes / sizeof(Element);
  static constexpr int kPerChunk = mma_tile::kGroups * kPerGroup;

  // Writes a group of 16 bytes.
  SNNLSTM_DEVICE static void store_group(unsigned char* to, const float (&v)[kPerGroup]) {
    if constexpr (kHalf)
      store(to, make_uint4(pack<Element>(v[0], v[1]), pack<Element>(v[2], v[3]),
                           pack<Element>(v[4], v[5]), pack<Element>(v[6], v[7])));
    else
      store(to, make_float4(v[0], v[1], v[2], v[3]));
  }

  // Begins to load a chunk of the neighbourhood of the tile `at`; cp_async_wait() and a barrier
  // must follow. Pixels outside the image, and channels after the last, are zeros.
  SNNLSTM_DEVICE static void load_chunk(const MmaSegment& m, const BlockPlace& at, int chunk,
                                        unsigned char* buffer) {
    const Segment& s = m.s;
    const void* image = image_of(s.src, at.t, at.n);
    const int top = at.y0 * s.step_h - s.pad_h;
    const int left = (fault(Fault::first_tile_column) ? 0 : at.x0) * s.step_w - s.pad_w;
    // Neighbouring threads read neighbours in memory: groups of channels, or pixels.
    const int groups = 2 * m.steps(chunk), lanes = s.src.c == 1 ? groups : 1;
    const int first = int(threadIdx.x) / lanes, stride = int(blockDim.x) / lanes;
    const int row_stride = stride / m.halo_w, col_stride = stride % m.halo_w;
#pragma unroll 1
    for (int group = int(threadIdx.x) % lanes; group < groups; group += lanes) {
      const int c = chunk * kPerChunk + group * kPerGroup;
      int row = first / m.halo_w, col = first % m.halo_w;
#pragma unroll 1
      while (row < m.halo_h) {
        const int y = top + row, x = left + col;
        const bool real = inside(y, s.height) && inside(x, s.width) && c < s.channels;
        const int shift = fault(Fault::wrong_source_halo) && x + 1 < s.width ? 1 : 0;
        const int from = real ? offset(s.src, c, y, x + shift) : 0;
        unsigned char* to = buffer + mma_tile::row_offset(row * m.halo_w + col) + 16 * group;
        if (m.asynchronous) {
          cp_async(to, static_cast<const Element*>(image) + from, real);
        } else if (real || !fault(Fault::no_border_zeros)) {
          float v[kPerGroup];
          unrolled<kPerGroup>([&](int e) {
            const bool exists = real && c + e < s.channels;
            v[e] = exists ? read<float>(image, s.src.type, from + e * s.src.c) : 0;
          });
          store_group(to, v);
        }
        row += row_stride;
        col += col_stride;
        if (col >= m.halo_w) {
          col -= m.halo_w;
          ++row;
        }
      }
    }
    cp_async_commit();
  }
};

template <class Element, int NT>
class MmaGemm {
  using E = MmaElement<Element>;

 public:
  using Accumulators = float[2][NT][4];

  SNNLSTM_DEVICE MmaGemm(const MmaConv& p, unsigned char* shared, const Tiling& tiling,
                         const BlockPlace& block)
      : p_(p), shared_(shared), tiling_(tiling), block_(block) {}

  // Returns the first of the 2 neighbouring pixels that the thread holds in m16 tile mi.
  SNNLSTM_DEVICE static int pixel(int mi) {
    return int(threadIdx.x) / 32 * 32 + mi * 16 + 2 * (int(threadIdx.x) % 32 / 4);
  }
  SNNLSTM_DEVICE static int quad() { return int(threadIdx.x) % 4; }

  // Ends with a barrier, also without a segment.
  SNNLSTM_DEVICE void run(Accumulators& acc) const {
    clear<2 * NT * 4>(&acc[0][0][0]);
    const auto* weight = static_cast<const unsigned char*>(p_.weight) +
                         block_.column * p_.weight_pitch + int(threadIdx.x) % 32 * 16;
#pragma unroll 1
    for (int k = 0; k < p_.segments; ++k) {
      const MmaSegment& m = p_.segment[k];
      const int pixel[2] = {pixel_of_lane(m, 0), pixel_of_lane(m, 1)};
#pragma unroll 1
      for (int chunk = 0; chunk < m.chunks; ++chunk) {
        if (!fault(Fault::no_reuse_barrier)) __syncthreads();  // nobody reads the chunk before
        E::load_chunk(m, block_, fault(Fault::first_chunk) ? 0 : chunk, shared_);
        if (!fault(Fault::no_chunk_wait)) cp_async_wait<0>();
        if (!fault(Fault::no_chunk_barrier)) __syncthreads();
#pragma unroll 1
        for (int tap = 0; tap < m.s.taps(); ++tap) {
          const int shift =
              tap / m.s.taps_w * m.s.dilation_h * m.halo_w + tap % m.s.taps_w * m.s.dilation_w;
#pragma unroll 1
          for (int step = 0; step < m.steps(chunk); ++step) {
            multiply(pixel[0] + shift, pixel[1] + shift, step, weight, acc);
            weight += NT / 2 * mma_tile::kPairBytes;
          }
        }
      }
    }
    __syncthreads();
  }

 private:
  // Returns the pixel of the neighbourhood that the lane hands to ldmatrix for m16 tile mi at tap
  // 0, 0.
  SNNLSTM_DEVICE int pixel_of_lane(const MmaSegment& m, int mi) const {
    const int lane = int(threadIdx.x) % 32;
    const int odd = fault(Fault::wrong_fragment_row) ? 0 : lane >> 3 & 1;
    int at = int(threadIdx.x) / 32 * 32 + mi * 16 + 2 * (lane % 8) + odd;
    if (at >= tiling_.h * tiling_.w) at = 0;  // any pixel
    return at / tiling_.w * m.s.step_h * m.halo_w + at % tiling_.w * m.s.step_w +
           (fault(Fault::wrong_mma_halo) ? 1 : 0);
  }

  // Adds the products of one k-step to acc.
  SNNLSTM_DEVICE void multiply(int pixel0, int pixel1, int step, const unsigned char* weight,
                               Accumulators& acc) const {
    using T = std::conditional_t<E::kHalf, Element, tf32>;
    const int at = 32 * step + (int(threadIdx.x) % 32 >> 4) * 16;
    uint32_t a[2][4];
    ldmatrix(a[0], shared_ + mma_tile::row_offset(pixel0) + at);
    ldmatrix(a[1], shared_ + mma_tile::row_offset(pixel1) + at);
    if constexpr (!E::kHalf)
      unrolled<2, 4>([&](int mi, int r) { a[mi][r] = rounds_to_tf32(a[mi][r]); });
    unrolled<NT / 2>([&](int pair) {
      const auto w = load<uint4>(weight + pair * mma_tile::kPairBytes);
      const uint32_t w0[2] = {w.x, w.y}, w1[2] = {w.z, w.w};
      unrolled<2>([&](int mi) {
        mma<T>(acc[mi][2 * pair], a[mi], w0);
        mma<T>(acc[mi][2 * pair + 1], a[mi], w1);
      });
    });
  }

  const MmaConv& p_;
  unsigned char* shared_;
  const Tiling& tiling_;
  const BlockPlace& block_;
};

}  // namespace snnlstm::cuda
