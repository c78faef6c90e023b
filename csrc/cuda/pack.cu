// Packed weights and the sizes of all that the caller brings.
#include "launch.h"

namespace snnlstm::cuda {

void launch_pack_fma(const WeightMap& map, void* packed, Stream stream) {
  with_real(map.type, [&](auto real) {
    using R = decltype(real);
    const int channels = map.depth_channels();
    const int64_t depth = round_up(int64_t(map.taps) * channels, fma::kDepth);
    const Launch how{"pack weight (fma)",
                     dim3(unsigned(depth / fma::kDepth),
                          unsigned(ceil_div(map.columns(), fma::kColumns))),
                     dim3(fma::kThreads), 0, stream};
    launch(how, &pack_fma<R>, map, static_cast<R*>(packed), depth, channels);
  });
}

void launch_pack_mma(const MmaPacking& p, int column_blocks, void* packed, Stream stream) {
  const int64_t words = int64_t(p.units) * p.warp_columns * (p.tiles / 2) * 128;
  const Launch how{"pack weight (mma)", dim3(unsigned(ceil_div(words, 256)), column_blocks),
                   dim3(256), 0, stream};
  launch(how, &pack_mma<256>, p, static_cast<uint32_t*>(packed));
}

namespace {

// Packs, or without memory only counts the bytes.
struct Packer {
  const Cell& cell;
  const Target& target;
  const void* weight;
  char* packed;
  int64_t bytes = 0;

  WeightMap map(Use use) const {
    const Shape s(cell);
    return {weight, cell.dtype, int(cell.C), int(s.Cp), int(cell.Cin), int(s.taps), use};
  }
  Stream stream() const { return static_cast<Stream>(target.stream); }

  void fma(Use use) {
    const WeightMap m = map(use);
    if (packed) launch_pack_fma(m, packed + bytes, stream());
    bytes += round_up(m.columns(), fma::kColumns) *
             round_up(int64_t(m.taps) * m.depth_channels(), fma::kDepth) *
             std::max(bytes_of(cell.dtype), 4);
  }

  // Segments of one stream of weights.
  void mma(Multiply multiply, int tiles, int warps_n, int channels,
           std::initializer_list<std::pair<Use, MmaDepth>> segments) {
    const MmaBuilder builder(type_of(multiply), warps_n, tiles);
    int64_t units = 0, first = 0;
    for (const auto& s : segments) units += s.second.units();
    int64_t blocks = 0;
    for (const auto& [use, depth] : segments) {
      MmaPacking p;
      p.map = map(use);
      p.multiply = multiply;
      p.channels = int(depth.channels), p.patches = depth.patches;
      p.taps = int(depth.taps), p.units = int(depth.units());
      p.pitch = units * builder.unit_bytes() / 4;
      p.tiles = tiles, p.warp_columns = warps_n;
      blocks = ceil_div(p.map.forward() ? cell.C : p.map.columns(), channels);
      if (packed)
        launch_pack_mma(p, int(blocks), packed + bytes + first * builder.unit_bytes(), stream());
      first += p.units;
    }
    bytes += blocks * units * builder.unit_bytes();
  }

  void forward() {
    const ForwardPlan plan = plan_forward(cell, target);
    if (!plan.mma()) return fma(Use::x_to_gates), fma(Use::mem_to_gates);
    mma(plan.multiply, plan.tiles, plan.warps_n, plan.channels(),
        {{Use::x_to_gates, x_depth(cell, plan.multiply)},
         {Use::mem_to_gates, mem_depth(cell, plan.multiply)}});
  }
  void backward() { fma(Use::gates_to_x), fma(Use::gates_to_mem); }
};

}  // namespace

Sizes sizes(const Cell& cell, const Target& target) {
  const Shape s(cell);
  Packer forward{cell, target, nullptr, nullptr}, backward{cell, target, nullptr, nullptr};
  forward.forward(), backward.backward();
  Sizes z;
  z.packed_forward = forward.bytes, z.packed_backward = backward.bytes;
  z.saved_gates =
      cell.T * s.gates() * bytes_of(gate_type(plan_forward(cell, target).multiply, cell.dtype));
  z.saved_syn = std::max<int64_t>(cell.T - 1, 0) * s.state() * bytes_of(cell.dtype);
  z.forward_workspace = forward_workspace(cell, target);
  z.backward_workspace = backward_workspace(cell, target);
  return z;
}

void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed,
                 const Target& target) {
  Packer packer{cell, target, weight, static_cast<char*>(packed)};
  backward ? packer.backward() : packer.forward();
}

std::string algorithm_name(const Cell& cell, const Target& target) {
  return name_of(plan_forward(cell, target).multiply);
}

}  // namespace snnlstm::cuda
