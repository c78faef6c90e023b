// The forward pass of a sequence in one launch, on tensor cores.
#pragma once

#include "forward_mma.cuh"
#include "resident_forward.cuh"
#include "resident_mma.cuh"

namespace snnlstm::cuda {

// A unit is 32 pixels x the 4 gates of 8 * Tiles channels, as in mma.cuh.
template <class Element, int Tiles>
class ResidentMma {
 public:
  static constexpr int kPatches = 2, kHeld = 2 * Tiles, kTiles = 4 * Tiles;
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kPerStep = 32 / sizeof(Element);
  using Gemm = MmaGemm<Element, kTiles, true>;

  SNNLSTM_DEVICE ResidentMma(const ResidentForward& p, unsigned char* shared)
      : p_(p), shared_(shared), lane_(int(threadIdx.x) % 32) {}

  SNNLSTM_DEVICE int first_pixel(int u) const {
    return int(p_.by_groups.divide(unsigned(u))) * mma_gemm::kWarpPixels;
  }
  SNNLSTM_DEVICE int pixel(int u, int k) const { return first_pixel(u) + k * 16 + 2 * (lane_ / 4); }
  SNNLSTM_DEVICE int group(int u) const {
    unsigned rest = unsigned(u);
    return int(p_.by_groups.split(rest));
  }
  SNNLSTM_DEVICE int channel(int u) const { return group(u) * 8 * Tiles + kHeld * (lane_ % 4); }

  SNNLSTM_DEVICE void copy_weights() const {
    copy_to_shared(shared_ + p_.at.weights, p_.weight, p_.weight_bytes);
  }

  // The table of x, then that of mem.
  SNNLSTM_DEVICE void fill_table() const {
    int* table = reinterpret_cast<int*>(shared_ + p_.at.table);
    if (p_.gathers)
      fill_taps(table, p_.units_of[0] * kPerStep, p_.x, p_.x.channels, p_.at.x);
    else
      fill_walk(table, p_.x, p_.at.x, p_.chunks[0], p_.tail_steps[0]);
    fill_walk(table + p_.table_of_mem, p_.x, p_.at.mem, p_.chunks[1], p_.tail_steps[1]);
  }

  SNNLSTM_DEVICE void multiply(int u, const unsigned char* x, const unsigned char* mem) {
    clear<2 * kTiles * 4>(&acc_[0][0][0]);
    const int of_block = group(u) / p_.warp_columns, column = group(u) % p_.warp_columns;
    SharedPlace b = shared_place(shared_ + p_.at.weights + of_block * int(p_.weight_pitch) +
                                 column * (kTiles / 2 * Gemm::kPairBytes) + lane_ * 16);
    if (p_.gathers)
      gather(u, x, b);
    else
      walk(u, p_.at.x, p_.x.step_h, p_.x.step_w, 0, x, b);
    walk(u, p_.at.mem, 1, 1, 1, mem, b);
  }

  // The sums of the next m16 tile.
  SNNLSTM_DEVICE void take(float (&sum)[4][2][kHeld]) {
    ::snnlstm::cuda::take<Tiles>(acc_[0], sum);
    unrolled<kTiles, 4>([&](int nt, int r) { acc_[0][nt][r] = acc_[1][nt][r]; });
  }

 private:
  SNNLSTM_DEVICE void walk(int u, const SharedImage& image, int step_h, int step_w, int half,
                           const unsigned char* from, SharedPlace& b) {
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table) + half * p_.table_of_mem;
    const ResidentWalk<Element, kTiles> walk{p_.multiply, p_.tiling,         image,
                                             table,       p_.units_of[half], p_.unit_bytes};
    walk.add(first_pixel(u), step_h, step_w, from, b, acc_);
  }

  // An x of few channels comes to the fragments element by element: K is (tap, channel), no gaps.
  SNNLSTM_DEVICE void gather(int u, const unsigned char* from, SharedPlace& b) {
    const unsigned char* pixels[2][2];
    unrolled<2, 2>([&](int mi, int odd) {
      int y, x;
      locate(p_.tiling, p_.at.x, pixel(u, mi) + odd, p_.x.step_h, p_.x.step_w, y, x);
      pixels[mi][odd] = from + y + p_.at.x.pixel(0, x);
    });
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table);
#pragma unroll 1
    for (int step = 0; step < p_.units_of[0]; ++step) {
      uint32_t a[2][4];
      unrolled<2>([&](int half) {
        if constexpr (kHalf) {
          const int k = step * 16 + 2 * (lane_ % 4) + 8 * half;
          const int lo = table[k], hi = table[k + 1];
          unrolled<2, 2>([&](int mi, int odd) {
            a[mi][2 * half + odd] = element(pixels[mi][odd], lo) | element(pixels[mi][odd], hi)
                                                                       << 16;
          });
        } else {
          const int k = table[step * 8 + lane_ % 4 + 4 * half];
          unrolled<2, 2>(
              [&](int mi, int odd) { a[mi][2 * half + odd] = element(pixels[mi][odd], k); });
        }
      });
      __syncwarp();
      product_of_stored<Element>(p_.multiply, a, b, acc_);
      b = b + p_.unit_bytes;
    }
  }
  SNNLSTM_DEVICE static uint32_t element(const unsigned char* pixel, int offset) {
    using Bits = std::conditional_t<kHalf, uint16_t, uint32_t>;
    return offset < 0 ? 0 : *reinterpret_cast<const Bits*>(pixel + offset);
  }

  const ResidentForward& p_;
  unsigned char* shared_;
  int lane_;
  float acc_[2][kTiles][4];
};

template <class Element, int Tiles>
__global__ void __launch_bounds__(resident::threads(4 * Tiles), 1)
    resident_forward_mma(const __grid_constant__ ResidentForward p) {
  if constexpr (arch::has_mma) {
    auto* shared = &shared_memory<unsigned char>();
    Block block = resident_block();
    const auto tile = resident_tile<float>(p, shared, block);
    ResidentForwardBlock<Stored<Element>, float, 2 * Tiles> sequence(p, shared, block, tile);
    ResidentMma<Element, Tiles> unit(p, shared);
    sequence.run(unit);
  }
}

}  // namespace snnlstm::cuda
