// The forward pass of a sequence: which kernels, in which order, on which memory. One launch a step
// (and a second where the spike needs a whole sample or windows that cross tiles).
#include "launch.h"
#include "plan.h"

namespace snnlstm::cuda {

namespace {

class Forward {
 public:
  Forward(const ForwardArgs& args, const Target& target)
      : a_(args), target_(target), s_(args.cell), size_(size_of(args.cell.dtype)) {
    plan();
    Arena arena(args.workspace);
    carve(arena);
  }

  static int64_t workspace(const Cell& cell, const Target& target) {
    ForwardArgs args;
    args.cell = cell;
    Forward f(args, target);
    Arena arena(nullptr);
    f.carve(arena);
    return arena.bytes();
  }

  void run() {
    for (int64_t t = 0; t < s_.c.T; ++t) {
      step(t);
      if (!fires_) fire(t);
    }
  }

 private:
  static constexpr int kHeld = 1;  // channels that a thread of the FMA kernel holds

  void plan() {
    const Cell& c = s_.c;
    tiling_.images = c.N;
    tiling_.by_batch = Divisor(std::max<int64_t>(c.N, 1));
    tiling_.by_columns = Divisor(ceil_div(c.C, fma::kChannels));
    const bool windows = c.pool != Pool::none;
    fires_ = !c.inhibition && choose_tile(c, s_.Ho, s_.Wo, fma::kPixels, windows, tiling_);
    if (!fires_) choose_tile(c, s_.Ho, s_.Wo, fma::kPixels, false, tiling_);
  }

  // The states between two steps, where the caller keeps none.
  void carve(Arena& arena) {
    if (s_.c.T < 2) return;
    for (void*& mem : mem_) mem = arena.take(s_.state() * size_);
    syn_ = arena.take(s_.state() * size_);
  }

  bool training() const { return a_.saved_gates != nullptr; }
  bool writes_states(int64_t t) const { return a_.record || t == s_.c.T - 1; }

  Tensor state(const View& v, int64_t t) const {
    return tensor(v, size_, t, {1, s_.c.N, s_.c.C, s_.Ho, s_.Wo}, kHeld);
  }
  Tensor mem_before(int64_t t) const {
    if (t == 0) return state(a_.mem0, 0);
    return a_.record ? state(a_.mem, t - 1) : as_tensor(image(mem_[t & 1], s_));
  }
  Tensor syn_before(int64_t t) const {
    if (t == 0) return state(a_.syn0, 0);
    if (training()) return as_tensor(saved_syn(t - 1));
    return a_.record ? state(a_.syn, t - 1) : as_tensor(image(syn_, s_));
  }
  Image saved_syn(int64_t t) const {
    return image(static_cast<char*>(a_.saved_syn) + t * s_.state() * size_, s_);
  }
  Tensor mem_after(int64_t t) const {
    return writes_states(t) ? state(a_.mem, t) : as_tensor(image(mem_[(t + 1) & 1], s_));
  }

  NeuronForward neuron(int64_t t) const {
    const Cell& c = s_.c;
    NeuronForward n;
    n.C = int(c.C), n.Cp = int(s_.Cp), n.Ho = int(s_.Ho), n.Wo = int(s_.Wo);
    n.reset = c.reset;
    n.fires = fires_;
    n.bias = a_.bias;
    n.syn_in = syn_before(t), n.mem_in = mem_before(t);
    if (writes_states(t))
      n.syn_out = state(a_.syn, t), n.mem_out = state(a_.mem, t);
    else
      n.mem_keep = image(mem_[(t + 1) & 1], s_);
    if (t + 1 < s_.c.T) {
      if (training())
        n.syn_keep = saved_syn(t);
      else if (!a_.record)
        n.syn_keep = image(syn_, s_);
    }
    if (training())
      n.gates_out = image(static_cast<char*>(a_.saved_gates) + t * s_.gates() * size_, s_, 4);
    n.fire = fire_of(t);
    return n;
  }

  Fire fire_of(int64_t t) const {
    const Cell& c = s_.c;
    Fire f;
    f.C = int(c.C), f.Hp = int(c.Hp()), f.Wp = int(c.Wp());
    f.pool = c.pool, f.pool_h = c.pool_h, f.pool_w = c.pool_w;
    f.num_levels = c.num_levels, f.levels = a_.levels;
    f.threshold = a_.threshold, f.threshold_stride = a_.threshold_stride;
    f.graded = a_.graded;
    f.spk = tensor(a_.spk, size_, t, {1, c.N, c.C, c.Hp(), c.Wp()}, kHeld);
    return f;
  }

  void step(int64_t t) const {
    const Cell& c = s_.c;
    ForwardFma p;
    p.tiling = tiling_;
    p.neuron = neuron(t);
    const int64_t real = c.dtype == DType::float64 ? 8 : 4;
    p.x = window(tensor(a_.x, size_, t, {1, c.N, c.Cin, c.H, c.W}, 1), c.Cin, c.H, c.W);
    p.x.step_h = c.stride_h, p.x.step_w = c.stride_w;
    p.mem = window(p.neuron.mem_in, c.C, s_.Ho, s_.Wo);
    p.x.weight = a_.weight;
    p.x.weight_pitch = fma::depth(p.x) * fma::kColumns;
    p.mem.weight_pitch = fma::depth(p.mem) * fma::kColumns;
    p.mem.weight = static_cast<const char*>(a_.weight) +
                   ceil_div(4 * c.C, fma::kColumns) * p.x.weight_pitch * real;
    launch_forward_fma(c.dtype, p, static_cast<Stream>(target_.stream));
  }

  Segment window(const Tensor& src, int64_t channels, int64_t height, int64_t width) const {
    const Cell& c = s_.c;
    Segment s;
    s.src = src;
    s.channels = int(channels), s.height = int(height), s.width = int(width);
    s.taps_h = c.kernel_h, s.taps_w = c.kernel_w;
    s.dilation_h = c.dilation_h, s.dilation_w = c.dilation_w;
    s.pad_h = int(c.pad_h()), s.pad_w = int(c.pad_w());
    return s;
  }

  void fire(int64_t t) const {
    FireStep p;
    p.fire = fire_of(t);
    p.mem = mem_after(t);
    p.N = int(s_.c.N);
    p.winner = a_.winner ? a_.winner + t * s_.c.N : nullptr;
    launch_fire(s_.c.dtype, p, s_.c.inhibition, static_cast<Stream>(target_.stream));
  }

  const ForwardArgs& a_;
  const Target& target_;
  Shape s_;
  int size_;
  Tiling tiling_;
  bool fires_ = true;
  void *mem_[2] = {nullptr, nullptr}, *syn_ = nullptr;
};

}  // namespace

Sizes sizes(const Cell& cell, const Target& target) {
  const Shape s(cell);
  const int64_t size = size_of(cell.dtype), real = std::max<int64_t>(size, 4);
  const auto packed = [&](int64_t columns, int64_t channels) {
    return round_up(columns, fma::kColumns) * round_up(s.taps * channels, fma::kDepth) * real;
  };
  Sizes z;
  z.packed_forward = packed(4 * cell.C, cell.Cin) + packed(4 * cell.C, cell.C);
  z.packed_backward = packed(cell.Cin, 4 * s.Cp) + packed(cell.C, 4 * s.Cp);
  z.saved_gates = cell.T * s.gates() * size;
  z.saved_syn = std::max<int64_t>(cell.T - 1, 0) * s.state() * size;
  z.forward_workspace = Forward::workspace(cell, target);
  z.backward_workspace = 0;
  return z;
}

void pack_weight(const Cell& cell, const void* weight, bool backward, void* packed,
                 const Target& target) {
  const Shape s(cell);
  const int64_t real = std::max<int64_t>(size_of(cell.dtype), 4);
  char* to = static_cast<char*>(packed);
  for (const Use use : {backward ? Use::gates_to_x : Use::x_to_gates,
                        backward ? Use::gates_to_mem : Use::mem_to_gates}) {
    const WeightMap map{weight, int(cell.C), int(s.Cp), int(cell.Cin), int(s.taps), use};
    launch_pack_fma(cell.dtype, map, to, static_cast<Stream>(target.stream));
    to += round_up(map.columns(), fma::kColumns) *
          round_up(s.taps * map.depth_channels(), fma::kDepth) * real;
  }
}

void forward(const ForwardArgs& args, const Target& target) { Forward(args, target).run(); }

}  // namespace snnlstm::cuda
