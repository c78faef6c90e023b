// The steps of the backward pass in one launch, last step first; see resident.cuh. Other kernels
// form the gradients of x and of the parameters, for all steps at once. Shared memory holds
//
//   d_gates        1 image in the operands' type: step t reads those of t + 1, and after a barrier
//                  writes its own over them
//   weights        for the gradient of mem, packed as for the kernels of one step
//   d_mem, d_syn   gradients of mem from the convolution, and of syn, in slots of the thread with
//                  the neurons in the pointwise part. Other threads have convolved for them, since
//                  in layers of 8 channels half of the tensor cores' columns are empty.
#pragma once

#include "neuron_backward.cuh"
#include "resident.cuh"

namespace snnlstm::cuda {

// The layout of shared memory, in bytes from its start.
struct ResidentBackwardLayout {
  SharedImage d_gates;
  int weights = 0, table = 0;
  int d_mem = 0, d_syn = 0;
  int vectors = 0, row_sums = 0;
  int mem_tile = 0, mem_pitch = 0;
  int bytes = 0;
};

struct ResidentBackward : ResidentArgs<NeuronBackward, ResidentBackwardLayout> {
  Tensor syn0;       // syn before the first step
  Tensor saved_syn;  // at t: syn before step t
  Tensor grad_mem0;
  Segment segment;      // the transposed convolution
  int weight_rows = 0;  // fma: of K as packed
  WalkSizes walk;       // mma
  // In the pointwise part a warp has pieces: 32 >> quad_bits pairs of pixels x held_channels().
  int quad_bits = 2;
  int tiles = 0, pieces = 0;  // pieces of the same channels; all of them
  SmallDivisor by_tiles;

  SNNLSTM_BOTH int held_channels() const { return 4 << quad_bits; }
};

// Returns the slot of pixel m (even) and channels first ... first + 3, in elements; pixel m + 1 has
// the slot kSlotStride behind it.
constexpr int kSlotStride = 128;
SNNLSTM_DEVICE int slot_of(const ResidentBackward& p, int m, int first) {
  const int quad = first >> 2 & ((1 << p.quad_bits) - 1), group = first >> (2 + p.quad_bits);
  const int pair = m >> 1, tile = pair >> (5 - p.quad_bits);
  const int lane = (pair << p.quad_bits & 31) | quad;
  return (group * p.tiles + tile) * 2 * kSlotStride + 4 * lane;
}

// What both kernels do alike. A Unit multiplies. Planes: the image of d_gates has a plane for each
// channel; else its pixels hold all channels.
template <class Element, class R, bool Planes>
class ResidentBackwardBlock {
 public:
  SNNLSTM_DEVICE ResidentBackwardBlock(const ResidentBackward& p, unsigned char* shared,
                                       BlockPlace& block, const BackwardTile<R>& tile)
      : p_(p), shared_(shared), block_(block), tile_(tile) {}

  template <class Unit>
  SNNLSTM_DEVICE void run(Unit& unit) {
    const int T = min(p_.T, p_.neuron.fire.left(block_.n, 0));
    unit.copy_weights();
    cp_async_commit();
    clear_shared(shared_, p_.at.d_gates.bytes);
    tile_.load_vectors();
    unit.fill_table();
    const int halves = p_.quad_bits == 1 ? 2 : 1;  // groups of a warp's lanes with equal channels
    R* row_sums = array(p_.at.row_sums);
    for (int i = int(threadIdx.x); i < resident::warps() * halves * p_.channels;
         i += int(blockDim.x))
      row_sums[i] = 0;
    R* own_sums = row_sums + (int(threadIdx.x) / (32 / halves)) * p_.channels;
    for_each_patch([&](int m, int first) {
      const R zeros[4] = {0, 0, 0, 0};
      const int slot = slot_of(p_, m, first);
      unrolled<2>([&](int px) {
        store_vector(array(p_.at.d_mem) + slot + px * kSlotStride, zeros);
        store_vector(array(p_.at.d_syn) + slot + px * kSlotStride, zeros);
      });
    });
    if (!fault(Fault::missing_wait, 30)) cp_async_wait<0>();
    __syncthreads();

    const MemTile<R> mem_tile{array(p_.at.mem_tile), p_.at.mem_pitch};
#pragma unroll 1
    for (int t = T - 1; t >= 0; --t) {
      block_.t = t;
      if (t + 1 < T) convolve(unit);
      // From here on all threads have read the gradients of step t + 1.
      if (!fault(Fault::missing_barrier_overwrite, 30)) __syncthreads();
      BackwardStep<R> step;
      step.syn_prev = t > 0 ? &p_.saved_syn : &p_.syn0;
      step.states = p_.record || t + 1 == T;
      step.own_mem = t + 1 < T;
      step.first = t == 0;
      tile_.in_phases(mem_tile, [&](bool gather) {
        for_each_patch([&](int m, int first) {
          const int slot = slot_of(p_, m, first);
          step.d_syn = array(p_.at.d_syn) + slot, step.stride = kSlotStride;
          tile_.patch(
              m, first, gather, FromShared<R>{array(p_.at.d_mem) + slot, kSlotStride}, mem_tile,
              own_sums, 1 << p_.quad_bits, false, step,
              [&](const PixelPair& at, int c0, const R(&gate)[4][2][4]) { keep(at, c0, gate); });
        });
      });
      if (!fault(Fault::missing_barrier_read, 30)) __syncthreads();
    }
    tile_.write_sums(row_sums, resident::warps() * halves);
    if (!p_.grad_mem0.present()) return;
    convolve(unit);
    if (!fault(Fault::missing_barrier_read, 32)) __syncthreads();
    for_each_patch([&](int m, int first) {
      const PixelPair at = pixel_pair(p_.tiling, block_, m, p_.neuron.Ho, p_.neuron.Wo);
      const R* d_mem = array(p_.at.d_mem) + slot_of(p_, m, first);
      R v[2][4];
      unrolled<2>([&](int px) { load_vector(d_mem + px * kSlotStride, v[px]); });
      store_patch(p_.grad_mem0, at, first, v);
    });
  }

 private:
  SNNLSTM_DEVICE R* array(int start) const { return reinterpret_cast<R*>(shared_ + start); }

  // Calls f(first pixel, first channel) for each patch that the thread holds.
  template <class F>
  SNNLSTM_DEVICE void for_each_patch(F&& f) const {
    const int lane = int(threadIdx.x) % 32;
    const int quad = lane & ((1 << p_.quad_bits) - 1), pair = lane >> p_.quad_bits;
#pragma unroll 1
    for (int piece = resident::warp(); piece < p_.pieces; piece += resident::warps()) {
      unsigned group = unsigned(piece);
      const int tile = int(p_.by_tiles.split(group));
      f(2 * ((tile << (5 - p_.quad_bits)) + pair), int(group) * p_.held_channels() + 4 * quad);
    }
  }

  // Writes the gradients that mem gets through the gates of step t + 1.
  template <class Unit>
  SNNLSTM_DEVICE void convolve(Unit& unit) const {
#pragma unroll 1
    for (int u = resident::warp(); u < p_.units; u += resident::warps()) {
      __syncwarp();  // lanes have gone different ways
      unit.multiply(u, shared_ + p_.at.d_gates.start);
      unit.for_each([&](int m, int first, const R(&d_mem)[2][4]) {
        if (m >= p_.tiling.h * p_.tiling.w || first >= p_.neuron.Cp) return;
        R* to = array(p_.at.d_mem) + slot_of(p_, m, first);
        unrolled<2>([&](int px) { store_vector(to + px * kSlotStride, d_mem[px]); });
      });
    }
  }

  // Writes a patch's d_gates into the image.
  SNNLSTM_DEVICE void keep(const PixelPair& at, int c0, const R (&gate)[4][2][4]) const {
    if (c0 >= p_.neuron.Cp) return;
    const SharedImage& i = p_.at.d_gates;
    const DType type = half_type(p_.multiply);
#pragma unroll
    for (int px = 0; px < 2; ++px) {
      if (!at.valid[px]) continue;
      unsigned char* to = shared_ + i.start + i.pixel(at.y[px] + i.top, at.x[px] + i.left);
      unrolled<4>([&](int k) {
        unsigned char* channels = to + (k * p_.neuron.Cp + c0) * i.channel;
        if constexpr (!Planes) {
          put_channels<Element>(channels, type, gate[k][px]);
        } else {
          unrolled<4>([&](int ch) {
            const R one[1] = {gate[k][px][ch]};
            put_channels<Element>(channels + ch * i.channel, type, one);
          });
        }
      });
    }
  }

  const ResidentBackward& p_;
  unsigned char* shared_;
  BlockPlace& block_;
  const BackwardTile<R>& tile_;
};

// A unit is 32 pixels x 16 channels.
template <class Element>
class ResidentBackwardMma {
 public:
  SNNLSTM_DEVICE ResidentBackwardMma(const ResidentBackward& p, unsigned char* shared)
      : p_(p), shared_(shared), lane_(int(threadIdx.x) % 32) {}

  SNNLSTM_DEVICE void copy_weights() const {
    copy_to_shared(shared_ + p_.at.weights, p_.weight, p_.weight_bytes);
  }
  SNNLSTM_DEVICE void fill_table() const {
    fill_walk(reinterpret_cast<int*>(shared_ + p_.at.table), p_.segment, p_.at.d_gates, p_.walk);
  }

  SNNLSTM_DEVICE void multiply(int u, const unsigned char* d_gates) {
    clear<16>(&acc_[0][0][0]);
    unsigned tile = unsigned(u);
    const int group = int(p_.by_groups.split(tile));
    pixel_ = int(tile) * mma_gemm::kWarpPixels, channel_ = 16 * group;
    SharedPlace b = shared_place(shared_ + p_.at.weights +
                                 group * MmaGemm<Element, 2, true>::kPairBytes + lane_ * 16);
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table);
    const ResidentWalk<Element, 2> walk{p_.multiply, p_.tiling,     p_.at.d_gates,
                                        table,       p_.walk.units, p_.unit_bytes};
    walk.add(pixel_, 1, 1, d_gates, b, acc_);
  }

  // Calls f(first pixel, first channel, values[pixel][channel]) for the thread's patches.
  template <class F>
  SNNLSTM_DEVICE void for_each(F&& f) const {
    unrolled<2>([&](int mi) {
      const auto &a = acc_[mi][0], &b = acc_[mi][1];
      const float v[2][4] = {{a[0], a[1], b[0], b[1]}, {a[2], a[3], b[2], b[3]}};
      f(pixel_ + mi * 16 + 2 * (lane_ / 4), channel_ + 4 * (lane_ % 4), v);
    });
  }

 private:
  const ResidentBackward& p_;
  unsigned char* shared_;
  int lane_, pixel_ = 0, channel_ = 0;
  float acc_[2][2][4];
};

// A unit is 64 pixels x 16 channels; a thread holds 8 pixels of 4.
template <class R>
class ResidentBackwardFma {
 public:
  SNNLSTM_DEVICE ResidentBackwardFma(const ResidentBackward& p, unsigned char* shared)
      : p_(p), shared_(shared), lane_(int(threadIdx.x) % 32) {}

  SNNLSTM_DEVICE int columns() const { return 16 * int(p_.by_groups.value); }
  SNNLSTM_DEVICE int depth() const { return p_.segment.taps() * p_.segment.channels; }

  SNNLSTM_DEVICE void copy_weights() const {
    copy_rows(reinterpret_cast<R*>(shared_ + p_.at.weights), static_cast<const R*>(p_.weight),
              depth(), p_.weight_rows, columns(), p_.weight_columns);
  }
  SNNLSTM_DEVICE void fill_table() const {
    fill_taps(reinterpret_cast<int*>(shared_ + p_.at.table), depth(), p_.segment,
              p_.segment.channels, p_.at.d_gates);
  }

  SNNLSTM_DEVICE void multiply(int u, const unsigned char* d_gates) {
    clear<32>(&acc_[0][0][0]);
    unsigned tile = unsigned(u);
    channel_ = 16 * int(p_.by_groups.split(tile)) + 4 * (lane_ / 8);
    pixel_ = 64 * int(tile) + 2 * (lane_ % 8);
    add_products(p_.tiling, p_.at.d_gates, pixel_, 1, 1, d_gates, depth(),
                 reinterpret_cast<const int*>(shared_ + p_.at.table),
                 reinterpret_cast<const R*>(shared_ + p_.at.weights) + channel_, columns(), acc_);
  }

  template <class F>
  SNNLSTM_DEVICE void for_each(F&& f) const {
    unrolled<4>([&](int i) { f(pixel_ + 16 * i, channel_, acc_[i]); });
  }

 private:
  const ResidentBackward& p_;
  unsigned char* shared_;
  int lane_, pixel_ = 0, channel_ = 0;
  R acc_[4][2][4];
};

template <class Element>
__global__ void __launch_bounds__(resident::backward_threads(sizeof(float)), 1)
    resident_backward_mma(const __grid_constant__ ResidentBackward p) {
  if constexpr (arch::has_mma<Element>)
    run_resident<ResidentBackwardBlock<Stored<Element>, float, false>, BackwardTile<float>,
                 ResidentBackwardMma<Element>>(p);
  else
    trap_without_mma();
}

template <class R>
__global__ void __launch_bounds__(resident::backward_threads(sizeof(R)), 1)
    resident_backward_fma(const __grid_constant__ ResidentBackward p) {
  run_resident<ResidentBackwardBlock<R, R, true>, BackwardTile<R>, ResidentBackwardFma<R>>(p);
}

}  // namespace snnlstm::cuda
