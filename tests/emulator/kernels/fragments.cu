// Probes: one mma or ldmatrix on registers and tiles that the test chooses; conversions.
#include <algorithm>

#include "case.h"

using namespace snnlstm::cuda;

namespace {

template <class T>
__global__ void one_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = int(threadIdx.x);
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) rd[i] = c[4 * lane + i];
  mma<T>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = rd[i];
}

struct Tiles {
  alignas(16) uint16_t row[32][8];
};

template <bool transposed>
__global__ void one_ldmatrix(const uint16_t* tiles, uint32_t* r) {
  auto& s = shared_memory<Tiles>();
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 8; ++i) s.row[lane][i] = tiles[8 * lane + i];  // 4 lanes meet a bank
  __syncwarp();
  uint32_t v[4];
  transposed ? ldmatrix_transposed(v, s.row[lane]) : ldmatrix(v, s.row[lane]);
  for (int i = 0; i < 4; ++i) r[4 * lane + i] = v[i];
}

}  // namespace

ENTRY probe_mma(int type, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  return guarded([&] {
    constexpr decltype(&one_mma<fp16>) by_type[] = {one_mma<fp16>, one_mma<bf16>, one_mma<tf32>};
    launch(Launch{"one_mma", 1, 32}, by_type[type], a, b, c, d);
  });
}

ENTRY probe_ldmatrix(int transposed, const uint16_t* tiles, uint32_t* r) {
  return guarded([&] {
    const Launch how{"one_ldmatrix", 1, 32, sizeof(Tiles)};
    launch(how, transposed ? one_ldmatrix<true> : one_ldmatrix<false>, tiles, r);
  });
}

template <class T>
uint32_t rounded(uint32_t x) {
  return from_float<T>(detail::float_of(x)).bits;
}
template <class T>
uint32_t widened(uint32_t x) {
  return detail::bits_of(to_float(T{decltype(T::bits)(x)}));
}

// Converts bit patterns of float32 to those of another type, 32 bits each, or back.
ENTRY convert(int type, int back, const uint32_t* in, uint32_t* out, int n) {
  constexpr decltype(&rounded<fp16>) by[2][3] = {{rounded<fp16>, rounded<bf16>, rounded<tf32>},
                                                 {widened<fp16>, widened<bf16>, widened<tf32>}};
  return guarded([&] { std::transform(in, in + n, out, by[back][type]); });
}
