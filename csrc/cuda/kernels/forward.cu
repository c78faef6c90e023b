// Launches the kernels of a sequence's forward pass, and lays out their memory: one launch for
// every step, and a second if the cell pools.
//
// The states before the first step stay in the caller's layout, apart from the others. In front of
// our own images they would make all steps alike, but would need a copy in each call.
#include "../launchers.h"
#include "../steps.h"
#include "forward.cuh"

namespace snnlstm::cuda {

namespace {

class Forward {
 public:
  Forward(const ForwardSteps& steps, const ForwardArgs& args, void* stream)
      : steps_(steps), a_(args), s_(steps.s), stream_(stream), arena_(args.workspace) {
    if (s_.c.T < 2) return;
    // States between two steps, which the caller may not ask for.
    for (void*& mem : mem_) mem = s_.c.spiking ? take_state() : nullptr;
    syn_ = take_state();
  }

  int64_t workspace() const { return arena_.bytes(); }

  void run() {
    for (int64_t t = 0; t < s_.c.T; ++t) {
      step(t);
      if (s_.c.pool != Pool::none) fire(t);
    }
  }

 private:
  void* take_state() { return arena_.take(s_.state() * bytes_of(steps_.type)); }

  int channels_per_thread() const { return steps_.step.mma() ? 4 : 1; }
  bool training() const { return a_.saved_gates != nullptr; }
  // Says whether the caller's states are those of all samples after step t.
  bool writes_states(int64_t t) const {
    return a_.record || (t == s_.c.T - 1 && (t == 0 || !a_.lengths));
  }

  Tensor state(const View& v, int64_t t) const {
    return state_tensor(s_.c, v, t, channels_per_thread());
  }
  bool keeps_mem() const { return a_.record || a_.spk_is_mem(); }
  Tensor mem_before(int64_t t) const {
    if (t == 0) return state(a_.mem0, 0);
    if (!keeps_mem())
      return image(mem_[fault(Fault::wrong_mem_buffer) ? 1 : t & 1], s_, steps_.type);
    return state(a_.spk_is_mem() ? a_.spk : a_.mem, t - 1);
  }
  Tensor syn_before(int64_t t) const {
    if (t == 0) return state(a_.syn0, 0);
    if (training()) return saved_syn(t >= 3 && fault(Fault::early_syn_forward) ? 0 : t - 1);
    return a_.record ? state(a_.syn, t - 1) : image(syn_, s_, steps_.type);
  }
  Tensor saved_syn(int64_t t) const { return image(a_.saved_syn, s_, steps_.type, 1, t); }

  NeuronForward neuron(int64_t t) const {
    NeuronForward n = neuron_forward(a_, t, channels_per_thread());
    n.syn_in = syn_before(t);
    n.mem_in = mem_before(t);
    if (!writes_states(t) && !keeps_mem()) n.own_mem = image(mem_[(t + 1) & 1], s_, steps_.type);
    if (t + 1 < s_.c.T) {
      if (training())
        n.own_syn = saved_syn(t);
      else if (!a_.record)
        n.own_syn = image(syn_, s_, steps_.type);
    }
    if (training()) n.gates_out = image(a_.saved_gates, s_, steps_.gates, 4, t);
    return n;
  }

  void step(int64_t t) {
    const Cell& c = s_.c;
    const StepBlocks& step = steps_.step;
    const Packed& packed = steps_.packed;
    const NeuronForward n = neuron(t);
    Segment x = x_segment(c), mem = mem_segment(c);
    x.src = tensor(a_.x, steps_.type, t, {1, c.N, c.Cin, c.H, c.W}, 4);
    mem.src = n.mem_in;
    if (!step.mma()) {
      ForwardFma p;
      p.tiling = step.tiling;
      p.neuron = n;
      p.x = packed.x.with_weight(x, a_.weight);
      p.mem = packed.mem.with_weight(mem, a_.weight);
      return with_real(steps_.type, [&](auto real) {
        using R = decltype(real);
        const Launch how{"forward step (fma)", step.tiling.blocks(), kThreads,
                         sizeof(fma::GemmShared<R>), stream_};
        launch(how, &forward_fma<R>, p);
      });
    }
    ForwardMma p;
    p.tiling = step.tiling;
    p.neuron = n;
    p.conv = mma_conv(
        {mma_segment(x, step.multiply, step.tiling), mma_segment(mem, step.multiply, step.tiling)});
    p.conv.weight = packed.x.in(a_.weight);
    p.conv.weight_pitch = packed.x.pitch;
    const Launch how{"forward step (mma)", step.tiling.blocks(), kThreads,
                     size_t(p.conv.shared_bytes()), stream_};
    with_element(step.multiply,
                 [&](auto element) { launch(how, &forward_mma<decltype(element)>, p); });
  }

  void fire(int64_t t) const {
    const NeuronForward n = neuron(t);
    launch_fire({n.fire, n.own_mem.present() ? n.own_mem : n.mem_out, int(s_.c.N)}, stream_);
  }

  const ForwardSteps& steps_;
  const ForwardArgs& a_;
  const Shape& s_;
  void* stream_;
  Arena arena_;
  void *mem_[2] = {nullptr, nullptr}, *syn_ = nullptr;
};

}  // namespace

ForwardSteps::ForwardSteps(const Cell& cell, const Device& device, Matrix matrix)
    : Steps(cell, matrix), step(forward_blocks(s.c, device, matrix)) {
  packed = packed_forward(s.c, step);
  workspace = Forward(*this, ForwardArgs(), nullptr).workspace();
  multiply = step.multiply;
  blocks = std::max(step.tiling.blocks(), s.c.N * ceil_div(s.c.C * s.pixels, kFireThreads));
}

void ForwardSteps::forward(const ForwardArgs& args, void* stream) const {
  Forward(*this, args, stream).run();
}

}  // namespace snnlstm::cuda
