// ldmatrix and mma, with the fragment layouts of the PTX ISA ("Warp-level matrix load instruction",
// "Matrix Fragments for mma").
#include <cmath>
#include <cstring>

#include "checks.h"
#include "kernels/half.cuh"
#include "machine.h"

namespace simt {

namespace {

using snnlstm::cuda::bf16, snnlstm::cuda::fp16, snnlstm::cuda::tf32;

template <MmaType type>
float element(uint32_t word, int half) {
  if constexpr (type == MmaType::tf32) {
    return to_float(tf32{word & 0xffffe000u});  // the tensor core ignores the other bits
  } else {
    const auto bits = uint16_t(word >> 16 * half);
    if constexpr (type == MmaType::bf16) return to_float(bf16{bits});
    return to_float(fp16{bits});
  }
}

float towards_zero(double exact) {
  const float nearest = float(exact);
  return std::fabs(double(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Adds four products to `sum`, each cut to 24 bits of the largest of the five terms, as the sum is.
// No tensor core that Fasi et al. looked at is coarser (2021, https://doi.org/10.7717/peerj-cs.330,
// section 4: a V100 aligns like this, with no bit more; newer ones keep one bit or two).
double add_aligned(double sum, const double (&products)[4]) {
  double largest = std::fabs(sum);
  for (const double p : products) largest = std::fmax(largest, std::fabs(p));
  if (largest == 0 || !std::isfinite(largest))
    return sum + products[0] + products[1] + products[2] + products[3];
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  double all = std::trunc(sum / unit);
  for (const double p : products) all += std::trunc(p / unit);
  return double(towards_zero(all * unit));
}

// Products are exact in float for all three types. The order and rounding of a tensor core's sums
// are not documented. Here sums are float additions in the order of k; or, if the machine
// truncates, see above. (Ootomo and Yokota report that real ones truncate, too: 2022,
// https://doi.org/10.1177/10943420221090256.)
template <MmaType type>
void multiply(Warp& warp) {
  constexpr int per_word = type == MmaType::tf32 ? 1 : 2;
  constexpr int K = 8 * per_word;
  float a[16][K], b[K][8], d[16][8];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const Offer& o = warp.lanes[lane].offer;
    const int g = int(lane) / 4, t = int(lane) % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int word = 0; word < 2; ++word) {
        const int k = per_word * (t + 4 * word) + half;
        a[g][k] = element<type>(o.a[2 * word], half);
        a[g + 8][k] = element<type>(o.a[2 * word + 1], half);
        b[k][g] = element<type>(o.b[word], half);
      }
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = o.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    if (simt_settings.truncates) {
      for (int column = 0; column < 8; ++column) {
        double sum = d[row][column], products[4];
        for (int k = 0; k < K; ++k) {
          products[k % 4] = double(a[row][k]) * b[k][column];
          if (k % 4 == 3) sum = add_aligned(sum, products);
        }
        d[row][column] = float(sum);
      }
      continue;
    }
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const int g = int(lane) / 4, t = int(lane) % 4;
    float* out = warp.lanes[lane].offer.d;
    for (int i = 0; i < 4; ++i) out[i] = d[g + i / 2 * 8][2 * t + i % 2];
  }
}

// A lane reads what it receives, whichever lane handed over the row's address. A transposed element
// is checked with its neighbour, which another lane of the warp reads in any case.
void check_parts(Warp& warp, bool transposed) {
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (unsigned half = 0; half < (transposed ? 2u : 1u); ++half) {
        const Offer& row = warp.lanes[8 * i + (transposed ? 2 * t + half : g)].offer;
        const unsigned word = transposed ? g / 2 : t;
        check_matrix_part(warp.lanes[lane], static_cast<const char*>(row.row) + 4 * word, 4,
                          row.pc);
      }
    }
  }
}

template <bool transposed>
void load_tiles(Warp& warp) {
  uint16_t tiles[4][8][8];
  for (unsigned l = 0; l < warp_size; ++l) {
    Thread& owner = warp.lanes[l];
    const char* row = static_cast<const char*>(owner.offer.row);
    check_matrix_row(owner, row, owner.offer.pc);
    std::memcpy(tiles[l / 8][l % 8], row, 16);
  }
  check_parts(warp, transposed);
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    uint32_t* r = warp.lanes[lane].offer.r;
    const unsigned g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto& tile = tiles[i];
      const uint32_t lo = transposed ? tile[2 * t][g] : tile[g][2 * t];
      const uint32_t hi = transposed ? tile[2 * t + 1][g] : tile[g][2 * t + 1];
      r[i] = lo | hi << 16;
    }
  }
}

}  // namespace

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Machine& m = machine();
  if (simt_settings.compute_capability < 80) m.fail("mma at " + describe(site) + " needs sm_80");
  Offer& offer = m.current->offer;
  offer.d = d;
  offer.a = a;
  offer.b = b;
  constexpr void (*by_type[])(Warp&) = {multiply<MmaType::fp16>, multiply<MmaType::bf16>,
                                        multiply<MmaType::tf32>};
  m.collective(Operation::mma, int(type), site, by_type[int(type)]);
}

void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site) {
  Machine& m = machine();
  Offer& offer = m.current->offer;
  offer.r = r;
  offer.row = row;
  offer.pc = __builtin_return_address(0);
  m.collective(Operation::ldmatrix, transposed, site,
               transposed ? load_tiles<true> : load_tiles<false>);
}

}  // namespace simt
