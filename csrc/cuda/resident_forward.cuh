// The forward pass of a sequence in one launch; see resident.cuh.
#pragma once

#include <type_traits>

#include "fire.cuh"
#include "forward.cuh"
#include "neuron_forward.cuh"
#include "resident.cuh"

namespace snnlstm::cuda {

struct ResidentForward : ResidentArgs<NeuronForward, ResidentLayout> {
  int64_t* winner = nullptr;    // (T, N), or null
  Segment x;                    // of all time steps
  Divisor by_first, by_second;  // see ResidentInput
  int weight_rows[2] = {0, 0};  // fma: packed rows of K of x, of mem
  // mma
  bool gathers = false;  // x has few channels: K = (tap, channel), without gaps
  WalkSizes walk[2];     // of x, of mem
  int table_of_mem = 0, warp_columns = 1;
  int64_t weight_pitch = 0;  // bytes of a column block
};

// What both kernels do alike. A Unit multiplies, and says which neurons a thread holds: kPatches
// for each unit of the warp, numbered through all of them.
template <class Element, class R, int CH>
class ResidentForwardBlock {
 public:
  using N = Neuron<Math<R>>;

  // tile: of the block, whose t this class counts.
  SNNLSTM_DEVICE ResidentForwardBlock(const ResidentForward& p, unsigned char* shared,
                                      BlockPlace& block, const ForwardTile<R>& tile)
      : p_(p),
        shared_(shared),
        block_(block),
        tile_(tile),
        mem_tile_{reinterpret_cast<R*>(shared + p.at.mem_tile), p.at.mem_pitch} {}

  SNNLSTM_DEVICE unsigned char* image(const SharedImage& i, int t) const {
    return shared_ + i.start + (t & 1) * i.bytes;
  }

  template <class Unit>
  SNNLSTM_DEVICE void run(Unit& unit) {
    const int T = min(p_.T, p_.neuron.fire.left(block_.n, 0));
    if (T <= 0) return;
    clear_shared(shared_, p_.at.images);
    unit.copy_weights();
    cp_async_commit();
    tile_.load_vectors();
    unit.fill_table();
    __syncthreads();  // the images hold zeros
    ResidentInput<Element, R> input(p_.x, p_.at.x, half_type(p_.multiply), p_.by_first,
                                    p_.by_second, block_.n);
    input.start(0, image(p_.at.x, 0));
    for_each_patch(unit, [&](int patch, int m, int first) { begin(patch, m, first); });
    input.finish();
    if (!fault(Fault::missing_wait, 20)) cp_async_wait<0>();
    if (!fault(Fault::missing_barrier_read, 20)) __syncthreads();

    const bool pools = p_.neuron.fire.pool != Pool::none, inhibits = !p_.neuron.fires;
#pragma unroll 1
    for (int t = 0; t < T; ++t) {
      block_.t = t;
      const bool more = t + 1 < T;
      if (more) input.start(t + 1, image(p_.at.x, t + 1));
      int patch = 0;
#pragma unroll 1
      for (int u = resident::warp(); u < p_.units; u += resident::warps()) {
        __syncwarp();  // lanes have gone different ways
        unit.multiply(u, image(p_.at.x, t), image(p_.at.mem, t));
#pragma unroll 1
        for (int k = 0; k < Unit::kPatches; ++k, ++patch) {
          R sum[4][2][CH];
          unit.take(sum);
          step(patch, unit.pixel(u, k), unit.channel(u), sum, !more);
        }
        if (more) input.turn();
      }
      if (more) input.finish();
      if (!fault(Fault::missing_barrier_overwrite, 20)) __syncthreads();
      if (pools || inhibits) {
        if (inhibits)
          fire_winner();
        else
          tile_.finish(mem_tile_);
        if (!fault(Fault::missing_barrier_overwrite, 21)) __syncthreads();
      }
    }
  }

 private:
  template <class Unit, class F>
  SNNLSTM_DEVICE void for_each_patch(Unit& unit, F&& f) {
    int patch = 0;
#pragma unroll 1
    for (int u = resident::warp(); u < p_.units; u += resident::warps())
#pragma unroll 1
      for (int k = 0; k < Unit::kPatches; ++k, ++patch) f(patch, unit.pixel(u, k), unit.channel(u));
  }

  SNNLSTM_DEVICE R* slot(int patch) const {
    return Slot<R, CH>::of(reinterpret_cast<R*>(shared_ + p_.at.slots), patch);
  }
  SNNLSTM_DEVICE unsigned& flags(int patch) const {
    return reinterpret_cast<unsigned*>(shared_ +
                                       p_.at.flags)[patch * int(blockDim.x) + int(threadIdx.x)];
  }

  // Keeps a patch's states before the first step.
  SNNLSTM_DEVICE void begin(int patch, int m, int first) {
    const PixelPair at = pixel_pair(p_.tiling, block_, m, p_.neuron.Ho, p_.neuron.Wo);
    R v[2][CH];
    load_patch(p_.neuron.syn_in, at, first, v);
    Slot<R, CH>::keep(slot(patch), v);
    load_patch(p_.neuron.mem_in, at, first, v);
    keep_mem(patch, at, first, v, 0);
  }

  // Keeps a patch's mem for the convolution and the reset of step t.
  SNNLSTM_DEVICE void keep_mem(int patch, const PixelPair& at, int first, const R (&mem)[2][CH],
                               int t) {
    const SharedImage& i = p_.at.mem;
    unsigned char* to = image(i, t) + first * i.channel;
    unrolled<2>([&](int px) {
      if (at.valid[px] && first < (CH == 1 ? p_.neuron.C : p_.neuron.Cp))
        put_channels<Element>(to + i.pixel(at.y[px] + i.top, at.x[px] + i.left),
                              half_type(p_.multiply), mem[px]);
    });
    if (p_.neuron.reset == Reset::none) return;
    const R* thresholds =
        reinterpret_cast<const R*>(shared_ + p_.at.vectors) + 4 * p_.channels + first;
    unsigned fires = 0;
    unrolled<CH, 2>([&](int ch, int px) {
      if (N::fires(mem[px][ch], thresholds[ch])) fires |= 1u << (px * CH + ch);
    });
    flags(patch) = fault(Fault::missing_reset, 20) ? 0 : fires;
  }

  SNNLSTM_DEVICE void step(int patch, int m, int first, R (&sum)[4][2][CH], bool last) {
    const PixelPair at = pixel_pair(p_.tiling, block_, m, p_.neuron.Ho, p_.neuron.Wo);
    R syn[2][CH], mem[2][CH];
    Slot<R, CH>::get(slot(patch), syn);
    const unsigned resets = p_.neuron.reset == Reset::none ? 0 : flags(patch);
    StepOutputs outputs;
    outputs.states = last || p_.record, outputs.own_syn = !last;
    tile_.update(
        at, m, first, sum, syn, mem,
        [&](int px, int ch, R) { return (resets >> (px * CH + ch) & 1) != 0; }, mem_tile_, outputs);
    if (!p_.neuron.fires) mem_tile_.put(m, first, mem);
    if (last) return;
    unrolled<2, CH>(
        [&](int px, int ch) { syn[px][ch] = rounded(p_.neuron.fire.spk.type, syn[px][ch]); });
    Slot<R, CH>::keep(slot(patch), syn);
    const int next = fault(Fault::missing_barrier_overwrite, 22) ? block_.t : block_.t + 1;
    keep_mem(patch, at, first, mem, next);
  }

  // Under inhibition writes the spikes of the step whose mem the tile holds. Barriers come before
  // and after.
  SNNLSTM_DEVICE void fire_winner() const {
    const Fire& f = p_.neuron.fire;
    const int64_t sample = image_number(p_.tiling, block_);
    R* mems = reinterpret_cast<R*>(shared_ + p_.at.winners);
    const auto mem_of = [&](const PooledIndex& at) {
      const int m = at.y * f.pool_h * p_.tiling.w + at.x * f.pool_w;
      return thresholded<R>(f, f.place_at(sample, at.c, at.y, at.x), [&](int i, int j) {
        return mem_tile_.at(at.c, m + i * p_.tiling.w + j);
      });
    };
    int64_t* winner = p_.winner;
    if (winner != nullptr) winner += sample;
    fire_winner_of(f, image_of(f.spk, block_.t, block_.n), mem_of, mems,
                   reinterpret_cast<int*>(mems + resident::warps()), winner);
  }

  const ResidentForward& p_;
  unsigned char* shared_;
  BlockPlace& block_;
  const ForwardTile<R>& tile_;
  MemTile<R> mem_tile_;
};

// ---- on tensor cores ----------------------------------------------------------------------------

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

  // Writes the table of x, and that of mem behind it.
  SNNLSTM_DEVICE void fill_table() const {
    int* table = reinterpret_cast<int*>(shared_ + p_.at.table);
    if (p_.gathers)
      fill_taps(table, p_.walk[0].units * kPerStep, p_.x, p_.x.channels, p_.at.x);
    else
      fill_walk(table, p_.x, p_.at.x, p_.walk[0]);
    fill_walk(table + p_.table_of_mem, p_.x, p_.at.mem, p_.walk[1]);
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

  // Moves the sums of the next m16 tile to `sum`.
  SNNLSTM_DEVICE void take(float (&sum)[4][2][kHeld]) {
    ::snnlstm::cuda::take<Tiles>(acc_[0], sum);
    unrolled<kTiles, 4>([&](int nt, int r) { acc_[0][nt][r] = acc_[1][nt][r]; });
  }

 private:
  SNNLSTM_DEVICE void walk(int u, const SharedImage& image, int step_h, int step_w, int half,
                           const unsigned char* from, SharedPlace& b) {
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table) + half * p_.table_of_mem;
    const ResidentWalk<Element, kTiles> walk{p_.multiply, p_.tiling,           image,
                                             table,       p_.walk[half].units, p_.unit_bytes};
    walk.add(first_pixel(u), step_h, step_w, from, b, acc_);
  }

  // Multiplies an x of few channels, whose elements come to the fragments one by one.
  SNNLSTM_DEVICE void gather(int u, const unsigned char* from, SharedPlace& b) {
    const unsigned char* pixels[2][2];
    unrolled<2, 2>([&](int mi, int odd) {
      int y, x;
      locate(p_.tiling, p_.at.x, pixel(u, mi) + odd, p_.x.step_h, p_.x.step_w, y, x);
      pixels[mi][odd] = from + y + p_.at.x.pixel(0, x);
    });
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table);
#pragma unroll 1
    for (int step = 0; step < p_.walk[0].units; ++step) {
      uint32_t a[2][4];
      unrolled<2>([&](int half) {
        if constexpr (kHalf) {
          const int k = step * 16 + 2 * (lane_ % 4) + 8 * half;
          const int lo = table[k], hi = table[k + 1];
          unrolled<2, 2>([&](int mi, int odd) {
            const unsigned char* at = pixels[mi][odd];
            a[mi][2 * half + odd] = element(at, lo) | element(at, hi) << 16;
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
  if constexpr (arch::has_mma<Element>)
    run_resident<ResidentForwardBlock<Stored<Element>, float, 2 * Tiles>, ForwardTile<float>,
                 ResidentMma<Element, Tiles>>(p);
  else
    trap_without_mma();
}

// ---- without ------------------------------------------------------------------------------------

// A unit is 64 pixels x the 4 gates of 4 channels; a thread holds 8 pixels of one channel.
template <class R>
class ResidentFma {
 public:
  static constexpr int kPatches = 4;

  SNNLSTM_DEVICE ResidentFma(const ResidentForward& p, unsigned char* shared)
      : p_(p), shared_(shared), lane_(int(threadIdx.x) % 32) {}

  SNNLSTM_DEVICE int pixel(int u, int k) const {
    return int(p_.by_groups.divide(unsigned(u))) * 64 + 16 * k + 2 * (lane_ % 8);
  }
  SNNLSTM_DEVICE int channel(int u) const {
    unsigned rest = unsigned(u);
    return 4 * int(p_.by_groups.split(rest)) + lane_ / 8;
  }

  // The weights' rows, of x and then of mem, hold the gates of all channels that units have.
  SNNLSTM_DEVICE int columns() const { return 16 * int(p_.by_groups.value); }
  SNNLSTM_DEVICE int depth(int segment) const {
    return p_.x.taps() * (segment == 0 ? p_.x.channels : p_.neuron.C);
  }

  SNNLSTM_DEVICE void copy_weights() const {
    R* to = reinterpret_cast<R*>(shared_ + p_.at.weights);
    const R* from = static_cast<const R*>(p_.weight);
    const int of_block = p_.weight_columns, blocks = (columns() + of_block - 1) / of_block;
    copy_rows(to, from, depth(0), p_.weight_rows[0], columns(), of_block);
    copy_rows(to + depth(0) * columns(), from + blocks * p_.weight_rows[0] * of_block, depth(1),
              p_.weight_rows[1], columns(), of_block);
  }

  SNNLSTM_DEVICE void fill_table() const {
    int* table = reinterpret_cast<int*>(shared_ + p_.at.table);
    fill_taps(table, depth(0), p_.x, p_.x.channels, p_.at.x);
    fill_taps(table + depth(0), depth(1), p_.x, p_.neuron.C, p_.at.mem);
  }

  SNNLSTM_DEVICE void multiply(int u, const unsigned char* x, const unsigned char* mem) {
    clear<32>(&acc_[0][0][0]);
    const R* weight = reinterpret_cast<const R*>(shared_ + p_.at.weights) + 4 * channel(u);
    const int* table = reinterpret_cast<const int*>(shared_ + p_.at.table);
    const int first = pixel(u, 0);
    add_products(p_.tiling, p_.at.x, first, p_.x.step_h, p_.x.step_w, x, depth(0), table, weight,
                 columns(), acc_);
    add_products(p_.tiling, p_.at.mem, first, 1, 1, mem, depth(1), table + depth(0),
                 weight + depth(0) * columns(), columns(), acc_);
  }

  SNNLSTM_DEVICE void take(R (&sum)[4][2][1]) { take_pair(acc_, sum); }

 private:
  const ResidentForward& p_;
  unsigned char* shared_;
  int lane_;
  R acc_[4][2][4];
};

template <class R>
__global__ void __launch_bounds__(resident::threads(sizeof(R)), 1)
    resident_forward_fma(const __grid_constant__ ResidentForward p) {
  run_resident<ResidentForwardBlock<R, R, 1>, ForwardTile<R>, ResidentFma<R>>(p);
}

}  // namespace snnlstm::cuda
