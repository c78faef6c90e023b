// Launches the kernels of a sequence's backward pass, last step first, and lays out their memory:
// one launch for every step, then one for the gradients of x and of the first mem, and a few for
// those of the parameters.
//
// mem before the first step lies apart from mem before the others, as in forward.cu.
#include "../launchers.h"
#include "../steps.h"
#include "backward.cuh"

namespace snnlstm::cuda {

namespace {

class Backward {
 public:
  Backward(const BackwardSteps& steps, const BackwardArgs& args, void* stream)
      : steps_(steps), a_(args), s_(steps.s), stream_(stream), arena_(args.workspace) {
    const auto state = [&](DType type, int64_t count) {
      return arena_.take(count * s_.state() * bytes_of(type));
    };
    d_syn_ = state(steps.real, 1);
    sums_ = arena_.take(threshold_blocks() * threshold_pitch() * bytes_of(steps.real));
    if (s_.c.pool != Pool::none) spikes_ = state(steps.real, 1);
    from_.lengths = args.lengths;
    from_.d_gates = state(steps.gates, 4 * s_.c.T);
    mem_ = state(steps.gates, std::max<int64_t>(s_.c.T - 1, 0));
    const WeightBlocks& weights = steps.weights;
    from_.parts[0] = arena_.take(weights.part_bytes(weights.x, steps.real));
    if (weights.mma()) from_.parts[1] = arena_.take(weights.part_bytes(weights.mem, steps.real));
    from_.bias_parts = arena_.take(steps.bias_splits * 4 * s_.Cp * bytes_of(steps.real));
  }

  int64_t workspace() const { return arena_.bytes(); }

  void run() {
    const Cell& c = s_.c;
    for (int64_t t = c.T - 1; t >= 0; --t) step(t);
    data_gradients();
    from_.x = tensor(a_.x, steps_.type, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
    from_.mem = state_tensor(c, a_.mem0, 0, 4);
    if (c.T > 1) from_.mem_later = image(mem_, s_, steps_.gates);
    AddGradients add;
    weight_gradient(steps_, from_, a_.grad_weight, a_.grad_bias, add, stream_);
    add.sums[1] = {sums_,    threshold_blocks(), 1,          int(threshold_pitch()),
                   int(c.C), a_.grad_threshold,  steps_.type};
    launch_add_gradients(add, steps_.real, stream_);
  }

 private:
  int64_t threshold_blocks() const { return steps_.to_mem.tiling.tiles(); }
  int64_t threshold_pitch() const { return steps_.to_mem.tiling.columns * steps_.to_mem.channels; }

  // Returns the memory for mem after each step, or null if it is not needed.
  void* mem_for_weight() const { return a_.grad_weight ? mem_ : nullptr; }

  Tensor d_gates(int64_t t) const { return image(from_.d_gates, s_, steps_.gates, 4, t); }
  NeuronBackward neuron(int64_t t) const {
    const Cell& c = s_.c;
    NeuronBackward n = neuron_backward(a_, t);
    n.gates = image(a_.saved_gates, s_, steps_.gates, 4, t);
    const int64_t before = t >= 3 && fault(Fault::early_syn_backward) ? 0 : t - 1;
    if (t > 0) n.syn_prev = image(a_.saved_syn, s_, steps_.type, 1, before);
    if (t < c.T - 1) n.d_syn_in = image(d_syn_, s_, steps_.real);
    if (t > 0)
      n.d_syn_out = image(d_syn_, s_, steps_.real);
    else
      n.grad_syn0 = state_tensor(c, a_.grad_syn0, 0, 4);
    n.d_gates = d_gates(t);
    if (mem_for_weight() && t < c.T - 1) n.mem_for_weight = image(mem_, s_, steps_.gates, 1, t);
    if (a_.grad_threshold) n.sums = sums_;
    n.first_sums = t == c.T - 1;
    if (!a_.record && fault(Fault::lost_last_gradient)) n.grad_mem = Tensor();
    return n;
  }

  Segment transposed(const Tensor& gates, bool is_x) const {
    Segment s = gates_segment(s_.c, is_x);
    s.src = gates;
    return s;
  }

  MmaConv conv(const StepBlocks& step, const PackedPart& part, const Segment& s) const {
    MmaConv found;
    if (s.channels > 0) found = mma_conv({mma_segment(s, step.multiply, step.tiling)});
    found.weight = part.in(a_.weight);
    found.weight_pitch = part.pitch;
    return found;
  }

  void step(int64_t t) {
    const Cell& c = s_.c;
    const StepBlocks& step = steps_.to_mem;
    const PackedPart& packed = steps_.packed.mem;
    NeuronBackward n = neuron(t);
    if (c.pool != Pool::none) launch_spread(n, image(spikes_, s_, steps_.real), c.N, stream_);
    Segment s;  // absent for the last step, t = T - 1, which has nothing to convolve
    if (t < c.T - 1) s = transposed(d_gates(t + 1), false);
    if (!step.mma()) {
      BackwardFma p;
      p.tiling = step.tiling;
      p.d_gates = packed.with_weight(s, a_.weight);
      p.neuron = n;
      return with_real(steps_.type, [&](auto real) {
        using R = decltype(real);
        const Launch how{"backward step (fma)", step.tiling.blocks(), kThreads,
                         sizeof(fma::GemmShared<R>), stream_};
        launch(how, &backward_fma<R>, p);
      });
    }
    BackwardMma p;
    p.tiling = step.tiling;
    p.conv = conv(step, packed, s);
    p.neuron = n;
    const Launch how{"backward step (mma)", step.tiling.blocks(), kThreads,
                     size_t(p.conv.shared_bytes()), stream_};
    with_element(step.multiply,
                 [&](auto element) { launch(how, &backward_mma<decltype(element)>, p); });
  }

  // Computes the gradients of x, at all steps, and of the first mem in one launch, or in two if
  // only one of them can use tensor cores.
  void data_gradients() const {
    const Cell& c = s_.c;
    Jobs<DataGradientFma> fma;
    Jobs<DataGradientMma> mma;
    Multiply multiply = Multiply::fma;
    int bytes = 0;
    const auto add = [&](int k, const StepBlocks& step, const PackedPart& part, const Tensor& out,
                         int64_t height, int64_t width) {
      if (!out.present()) return;
      const Segment s = transposed(d_gates(0), part.use == Use::gates_to_x);
      const auto fill = [&](auto& job) {
        job.tiling = step.tiling;
        job.blocks = int(step.tiling.blocks());
        job.out = out;
        job.height = int(height);
        job.width = int(width);
        job.lengths = a_.lengths;
      };
      if (step.mma()) {
        fill(mma.job[k]);
        mma.job[k].conv = conv(step, part, s);
        multiply = step.multiply;
        bytes = std::max(bytes, mma.job[k].conv.shared_bytes());
      } else {
        fill(fma.job[k]);
        fma.job[k].d_gates = part.with_weight(s, a_.weight);
      }
    };
    const Tensor x = tensor(a_.grad_x, steps_.type, 0, {c.T, c.N, c.Cin, c.H, c.W}, 4);
    add(0, steps_.to_x, steps_.packed.x, x, c.H, c.W);
    add(1, steps_.to_mem, steps_.packed.mem, state_tensor(c, a_.grad_mem0, 0, 4), s_.Ho, s_.Wo);
    const auto blocks = [](const auto& jobs) { return jobs.job[0].blocks + jobs.job[1].blocks; };
    with_real(steps_.type, [&](auto real) {
      using R = decltype(real);
      const Launch how{"data gradient (fma)", blocks(fma), kThreads, sizeof(fma::GemmShared<R>),
                       stream_};
      launch(how, &data_gradient_fma<R>, fma);
    });
    static_assert(sizeof(mma) <= 4096, "a kernel takes at most 4096 bytes of arguments");
    const Launch how{"data gradient (mma)", blocks(mma), kThreads, size_t(bytes), stream_};
    with_element(multiply,
                 [&](auto element) { launch(how, &data_gradient_mma<decltype(element)>, mma); });
  }

  const BackwardSteps& steps_;
  const BackwardArgs& a_;
  const Shape& s_;
  void* stream_;
  Arena arena_;
  void *mem_ = nullptr, *d_syn_ = nullptr, *sums_ = nullptr, *spikes_ = nullptr;
  WeightSources from_;
};

}  // namespace

BackwardSteps::BackwardSteps(const Cell& cell, const Device& device, Matrix matrix)
    : Steps(cell, matrix),
      to_mem(data_blocks(s.c, device, matrix, false)),
      to_x(data_blocks(s.c, device, matrix, true)),
      weights(weight_blocks(s.c, device, matrix)),
      bias_splits(int(std::clamp<int64_t>(pixels() / 1024, 1, 4 * device.multiprocessors))) {
  packed = packed_backward(s.c, to_x, to_mem);
  workspace = Backward(*this, BackwardArgs(), nullptr).workspace();
  multiply = to_mem.multiply;
  blocks = std::max({to_mem.tiling.blocks(), to_x.tiling.blocks(),
                     s.c.N * ceil_div(s.c.C * s.pixels, kSpreadThreads)});
  shared_bytes = channel_pitch(s.taps) * bytes_of(real);  // add_gradients, one input channel
}

void BackwardSteps::backward(const BackwardArgs& args, void* stream) const {
  Backward(*this, args, stream).run();
}

}  // namespace snnlstm::cuda
