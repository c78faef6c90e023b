#include <initializer_list>

#include "../launch.cuh"
#include "../pass.h"
#include "leaky.cuh"

namespace snnlstm::cuda {

namespace {

// Launches a pass's kernel with(X{}, V) for the dtype of x and for V neurons a thread: 16 bytes of
// them in the compute type, or one if they are not so aligned. `x` is x or its gradient, and
// `others` is the call's other memory except the parameters'.
template <class Args, class F>
void launch_neurons(const char* name, const Args& a, const void* x,
                    std::initializer_list<const void*> others, void* stream, F&& with) {
  const auto run = [&](auto zero) {
    using X = decltype(zero);
    constexpr int kVector = 16 / sizeof(leaky::Real<X>);
    const auto aligned = [](const void* p, size_t bytes) {
      return reinterpret_cast<uintptr_t>(p) % bytes == 0;
    };
    bool vectors = a.n % kVector == 0 && aligned(x, kVector * sizeof(X));
    for (const void* p : others) vectors = vectors && aligned(p, 16);
    const int64_t block = int64_t(leaky::kThreads) * (vectors ? kVector : 1);
    const Launch how{name, (a.n + block - 1) / block, leaky::kThreads, 0, stream};
    launch(how,
           vectors ? with(zero, std::integral_constant<int, kVector>{})
                   : with(zero, std::integral_constant<int, 1>{}),
           a);
  };
  if (a.dtype == DType::float64) return run(double{});
  if (a.dtype == DType::float16) return run(fp16{});
  if (a.dtype == DType::bfloat16) return run(bf16{});
  run(float{});
}

}  // namespace

void Leaky::run(const Device& device, const LeakyForwardArgs& a, void* stream) {
  const OnDevice on(device.number);
  launch_neurons("leaky forward", a, a.x, {a.mem0, a.spk, a.mem}, stream,
                 [](auto x, auto V) { return &leaky_forward<decltype(x), decltype(V)::value>; });
}

void Leaky::run(const Device& device, const LeakyBackwardArgs& a, void* stream) {
  const OnDevice on(device.number);
  launch_neurons(
      "leaky backward", a, a.grad_x,
      {a.mem0, a.mem, a.grad_spk, a.grad_mem, a.grad_mem0, a.grad_beta, a.grad_threshold}, stream,
      [](auto x, auto V) { return &leaky_backward<leaky::Real<decltype(x)>, decltype(V)::value>; });
}

}  // namespace snnlstm::cuda
