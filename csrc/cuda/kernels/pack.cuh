// Converts the quantiser's levels and the convolution's weight to what the kernels read.
#pragma once

#include "../planning.h"
#include "fma.cuh"

namespace snnlstm::cuda {

// A kernel's argument passes the levels in stream order, so streams and graphs share no memory.
struct StoreLevels {
  static constexpr int kMost = 256;
  double value[kMost];
  int count = 0;
  void* levels = nullptr;
};

template <class R>
__global__ void __launch_bounds__(StoreLevels::kMost)
    store_levels_kernel(const __grid_constant__ StoreLevels p) {
  const int i = int(threadIdx.x);
  if (i < p.count) static_cast<R*>(p.levels)[i] = R(p.value[i]);
}

struct WeightMap {
  const void* weight;  // (4C, Cin + C, places.all), contiguous
  DType type;
  int C, Cp, Cin, taps;
  KernelTaps places;
  Use use;

  SNNLSTM_BOTH bool forward() const { return use == Use::x_to_gates || use == Use::mem_to_gates; }
  SNNLSTM_BOTH int input_channels() const {
    return use == Use::x_to_gates || use == Use::gates_to_x ? Cin : C;
  }
  SNNLSTM_BOTH int columns() const { return forward() ? 4 * C : input_channels(); }
  SNNLSTM_BOTH int depth_channels() const { return forward() ? input_channels() : 4 * Cp; }
};

// Returns the weight between output channel c of a gate and an input channel of x or mem, or 0 if
// one of them does not exist.
template <class R>
SNNLSTM_DEVICE R weight_at(const WeightMap& map, int gate, int c, int input, int tap) {
  const bool mem = map.use == Use::mem_to_gates || map.use == Use::gates_to_mem;
  if (c >= map.C || input >= (mem ? map.C : map.Cin) || tap >= map.taps) return 0;
  const int64_t row = int64_t(gate) * map.C + c;
  const int64_t in = input + (mem ? map.Cin : 0);
  const int64_t first = (row * (map.Cin + map.C) + in) * map.places.all;
  return read<R>(map.weight, map.type, first + map.places.place(unsigned(tap)));
}

// One segment, for the kernel that packs it as (column blocks, K, columns of a block): fma.cuh.
struct FmaPacking {
  WeightMap map;
  void* packed = nullptr;
  int chunks = 0;   // of 16 rows of K
  int columns = 0;  // of a block
  int blocks = 0;   // of the launch
};

// The segments that one launch packs: the halves of x and of mem, for one pass or for both.
template <class Packing>
using Packings = Jobs<Packing, 4>;

// A block packs a chunk. grid: (blocks, segments); blocks beyond a segment's have nothing to do.
template <class R>
__global__ void __launch_bounds__(fma::kThreads)
    pack_fma(const __grid_constant__ Packings<FmaPacking> p) {
  const FmaPacking& job = p.job[blockIdx.y];
  const int index = int(blockIdx.x);
  if (index >= job.blocks) return;
  const WeightMap& map = job.map;
  const int columns = job.columns, channels = map.depth_channels();
  const int64_t chunk = index % job.chunks;
  const int first = index / job.chunks * columns;
  R* out = static_cast<R*>(job.packed) + int64_t(index) * fma::kDepthUnit * columns;
  for (int i = int(threadIdx.x); i < fma::kDepthUnit * columns; i += fma::kThreads) {
    const int64_t k = chunk * fma::kDepthUnit + i / columns;
    const int column = first + i % columns;
    const int tap = int(k / channels), channel = int(k % channels);
    out[i] = map.forward() ? weight_at<R>(map, column % 4, column / 4, channel, tap)
             : tap < map.taps
                 ? weight_at<R>(map, channel / map.Cp, channel % map.Cp, column, map.taps - 1 - tap)
                 : R(0);
  }
}

constexpr int kPackThreads = 256;

// One segment, for the kernel that packs its units in the order in which mma.cuh walks.
struct MmaPacking {
  WeightMap map;
  PackedPart part;
  int pairs = 0;               // of n-tiles, in all column blocks
  uint32_t* packed = nullptr;  // the segment's first unit

  SNNLSTM_BOTH int per_word() const { return is_half(part.multiply) ? 2 : 1; }
  SNNLSTM_BOTH int per_chunk() const { return 16 * per_word(); }  // channels
};

// Packs one chunk of K for one pair of n-tiles: 16 columns. The L1 cache holds the block's piece of
// the weight, some 10 KiB, of which a warp's loads take scattered elements.
class MmaPacker {
 public:
  SNNLSTM_DEVICE MmaPacker(const MmaPacking& p, int chunk, int pair)
      : p_(p), map_(p.map), chunk_(chunk) {
    const int of_warp = p.part.tiles / 2;
    pair_ = pair % of_warp;
    warp_column_ = pair / of_warp % p.part.warps_n;
    block_ = pair / of_warp / p.part.warps_n;
    const int warps = block_ * p.part.warps_n + warp_column_;
    first_column_ = !map_.forward()     ? warps * 8 * p.part.tiles + 16 * pair_
                    : p.part.tiles == 8 ? warps * 16
                                        : warps * 8;
  }

  SNNLSTM_DEVICE void store_units() const {
    const PackedPart& part = p_.part;
    const int taps = int(part.depth.taps);
    const int full = 2 * taps;
    const int steps = chunk_ + 1 < part.depth.chunks ? 2 : part.depth.tail_steps;
    const bool both = part.multiply == Multiply::tf32x3;
    const int pair_words = both ? 256 : 128;
    const int unit_words = part.warps_n * (part.tiles / 2) * pair_words;
    uint32_t* out = p_.packed + block_ * (part.pitch / 4) + int64_t(chunk_) * full * unit_words +
                    (warp_column_ * (part.tiles / 2) + pair_) * pair_words;
    for (int i = int(threadIdx.x); i < taps * steps * 128; i += kPackThreads) {
      const int unit = i / 128;
      const int word = i % 4;
      const int lane = i / 4 % 32;
      const int tap = unit / steps, step = unit % steps;
      const int k = (step * 8 + lane % 4 + word % 2 * 4) * p_.per_word();  // in the chunk
      const int n = lane / 4, tile = word / 2;
      float v[2];
      v[0] = value(n, tile, k, tap);
      v[1] = p_.per_word() == 2 ? value(n, tile, k + 1, tap) : 0;
      uint32_t bits = detail::bits_of(v[0]);
      if (p_.per_word() == 2)
        bits = pack16(half_type(part.multiply), v[0], v[1]);
      else if (part.multiply == Multiply::tf32)
        bits = from_float<tf32>(v[0]).bits;
      uint32_t* to = out + int64_t(unit) * unit_words + i % 128;
      if (both) {
        // The small part of an infinity is 0, since infinity - infinity would be NaN.
        bits = from_float<tf32>(v[0]).bits;
        const float rest = v[0] - detail::float_of(bits);
        to[128] = rest == rest ? from_float<tf32>(rest).bits : 0;
      }
      *to = bits;
    }
  }

 private:
  // Returns the weight for column n of a tile of the pair, channel k of the chunk, tap of the walk.
  SNNLSTM_DEVICE float value(int n, int tile, int k, int tap) const {
    const bool by_gate = p_.part.tiles != 8;  // the pair's tiles are two gates of 8 channels
    const int column = 4 * (n / 2) + 2 * tile + n % 2;  // mma.cuh: pairs
    k += chunk_ * p_.per_chunk();
    if (!map_.forward()) {
      return k < map_.depth_channels()
                 ? weight_at<float>(map_, k / map_.Cp, k % map_.Cp, first_column_ + column,
                                    map_.taps - 1 - tap)
                 : 0;
    }
    if (p_.part.depth.im2col) {
      tap = k / map_.Cin;
      k %= map_.Cin;
    }
    return by_gate ? weight_at<float>(map_, 2 * pair_ + tile, first_column_ + n, k, tap)
                   : weight_at<float>(map_, pair_, first_column_ + column, k, tap);
  }

  const MmaPacking& p_;
  const WeightMap& map_;
  int chunk_, pair_, warp_column_, block_, first_column_;
};

// A block packs a chunk of a pair. grid: as pack_fma's.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    pack_mma(const __grid_constant__ Packings<MmaPacking> p) {
  const MmaPacking& job = p.job[blockIdx.y];
  const int chunks = int(job.part.depth.chunks);
  const int chunk = int(blockIdx.x) % chunks, pair = int(blockIdx.x) / chunks;
  if (pair < job.pairs) MmaPacker(job, chunk, pair).store_units();
}

}  // namespace snnlstm::cuda
