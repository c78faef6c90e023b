// Counts where the time of the kernels goes, for `python -m benchmarks --profile`.
#pragma once

#include <cstdint>

namespace snnlstm::cpu {

// The parts of a thread's work. `copies` moves numbers between the caller's tensors and the
// kernels' images, packs weights, adds up partial sums of gradients, and lists x's nonzeros.
enum class Part : int { products, transforms, pointwise, copies, waiting, all };
constexpr int kParts = int(Part::all) + 1;

// The nanoseconds of all threads, by part. `all` includes the time between the named parts.
struct Profile {
  int64_t spent[kParts] = {};
};

// The profile of all threads' calls. Without one (null) no clock is read.
inline Profile* profile = nullptr;

}  // namespace snnlstm::cpu
