// The forward pass of a sequence in one launch, without tensor cores.
#pragma once

#include "forward_fma.cuh"
#include "resident_fma.cuh"
#include "resident_forward.cuh"

namespace snnlstm::cuda {

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

  // Rows of K, of x and then of mem, each the gates of all channels that units hold.
  SNNLSTM_DEVICE int columns() const { return 16 * int(p_.by_groups.value); }
  SNNLSTM_DEVICE int depth(int segment) const {
    return p_.x.taps() * (segment == 0 ? p_.x.channels : p_.neuron.C);
  }

  SNNLSTM_DEVICE void copy_weights() const {
    R* to = reinterpret_cast<R*>(shared_ + p_.at.weights);
    const R* from = static_cast<const R*>(p_.weight);
    const int blocks = (columns() + fma::kColumns - 1) / fma::kColumns;
    copy_rows(to, from, depth(0), p_.weight_rows[0], columns());
    copy_rows(to + depth(0) * columns(), from + blocks * p_.weight_rows[0] * fma::kColumns,
              depth(1), p_.weight_rows[1], columns());
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
  auto* shared = &shared_memory<unsigned char>();
  Block block = resident_block();
  const auto tile = resident_tile<R>(p, shared, block);
  ResidentForwardBlock<R, R, 1> sequence(p, shared, block, tile);
  ResidentFma<R> unit(p, shared);
  sequence.run(unit);
}

}  // namespace snnlstm::cuda
