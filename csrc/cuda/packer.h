// Packed weights: what lies in them, how many bytes, and the launches that fill them.
#pragma once

#include "launch.h"

namespace snnlstm::cuda {

// Packs, or without memory only counts the bytes.
class Packer {
 public:
  Packer(const Cell& cell, const Target& target, const void* weight = nullptr,
         void* packed = nullptr)
      : cell_(cell), target_(target), weight_(weight), packed_(static_cast<char*>(packed)) {}

  int64_t bytes() const { return bytes_; }

  void forward() {
    const ForwardPlan plan = plan_forward(cell_, target_);
    if (!plan.mma()) return fma(Use::x_to_gates), fma(Use::mem_to_gates);
    mma(plan.multiply, plan.tiles, plan.warps_n, plan.channels(),
        {{Use::x_to_gates, x_depth(cell_, plan.multiply)},
         {Use::mem_to_gates, mem_depth(cell_, plan.multiply)}});
    flush();
  }
  // First for the gradient of x, then for that of mem.
  void backward(const BackwardPlan& plan) {
    transposed(plan.to_x, Use::gates_to_x);
    transposed(plan.to_mem, Use::gates_to_mem);
    flush();
  }
  void transposed(const DataPlan& plan, Use use) {
    if (!plan.mma()) return fma(use);
    mma(plan.multiply, plan.tiles, plan.warps_n, plan.channels(),
        {{use, gates_depth(cell_, plan.multiply)}});
  }

 private:
  WeightMap map(Use use) const {
    const Shape s(cell_);
    return {weight_, cell_.dtype, int(cell_.C), int(s.Cp), int(cell_.Cin), int(s.taps), use};
  }
  Stream stream() const { return static_cast<Stream>(target_.stream); }

  void fma(Use use) {
    const WeightMap m = map(use);
    if (packed_) launch_pack_fma(m, packed_ + bytes_, stream());
    bytes_ += round_up(m.columns(), fma::kColumns) *
              round_up(int64_t(m.taps) * m.depth_channels(), fma::kDepth) *
              std::max(bytes_of(cell_.dtype), 4);
  }

  // Segments of one stream of weights. channels: of a column block.
  void mma(Multiply multiply, int tiles, int warps_n, int channels,
           std::initializer_list<std::pair<Use, MmaDepth>> segments) {
    const MmaBuilder builder(type_of(multiply), warps_n, tiles);
    int64_t units = 0, first = 0, blocks = 0;
    for (const auto& s : segments) units += s.second.units();
    for (const auto& [use, depth] : segments) {
      MmaPacking p;
      p.map = map(use);
      p.multiply = multiply;
      p.channels = int(depth.channels), p.patches = depth.patches;
      p.taps = int(depth.taps), p.units = int(depth.units());
      p.first_unit = int(first);
      p.pitch = units * builder.unit_bytes() / 4;
      p.tiles = tiles, p.warp_columns = warps_n;
      blocks = ceil_div(p.map.forward() ? cell_.C : p.map.columns(), channels);
      p.chunks = int(depth.chunks), p.pairs = int(blocks * warps_n * (tiles / 2));
      if (packed_) {
        p.packed = reinterpret_cast<uint32_t*>(packed_ + bytes_);
        jobs_.job[count_++] = p;
      }
      first += p.units;
    }
    bytes_ += blocks * units * builder.unit_bytes();
  }

  void flush() {
    if (count_ > 0) launch_pack_mma(jobs_, count_, stream());
    count_ = 0;
  }

  const Cell& cell_;
  const Target& target_;
  const void* weight_;
  char* packed_;
  int64_t bytes_ = 0;
  MmaPackings jobs_;
  int count_ = 0;
};

}  // namespace snnlstm::cuda
