// Chooses the instruction set, once at run time.
#include <cstdlib>
#include <stdexcept>

#include "api.h"

namespace snnlstm {

#define SNNLSTM_DECLARE(isa)         \
  namespace isa {                    \
  extern const cpu::Kernels kernels; \
  }
SNNLSTM_DECLARE(baseline)
#if defined(__x86_64__)
SNNLSTM_DECLARE(avx2)
SNNLSTM_DECLARE(avx512)
#if SNNLSTM_TESTING
SNNLSTM_DECLARE(wide)
#endif
#endif
#undef SNNLSTM_DECLARE

namespace cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const Kernels* for_few_channels;  // up to kFew channels leave long vectors mostly empty
  bool usable;
  bool chosen_by_itself;
};
constexpr int64_t kFew = 4;

// Best last. `wide` is AVX-512's tiles in AVX2's instructions: slow, but it lets the tiles be
// tested on machines without AVX-512.
const std::vector<Isa>& all() {
  static const std::vector<Isa> sets = [] {
    std::vector<Isa> s;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw");
#if SNNLSTM_TESTING
    s.push_back({"wide", &wide::kernels, &wide::kernels, avx2, false});
#endif
    s.push_back({"baseline", &baseline::kernels, &baseline::kernels, true, true});
    s.push_back({"avx2", &avx2::kernels, &avx2::kernels, avx2, true});
    s.push_back({"avx512", &avx512::kernels, &avx2::kernels, avx512, true});
#else
    s.push_back({"baseline", &baseline::kernels, &baseline::kernels, true, true});
#endif
    return s;
  }();
  return sets;
}

const Isa& find(const std::string& name) {
  std::string usable;
  for (const Isa& isa : all()) {
    if (!isa.usable) continue;
    if (name == isa.name) return isa;
    usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not usable here; usable: " + usable);
}

const Isa* best() {
  const Isa* chosen = nullptr;
  for (const Isa& isa : all())
    if (isa.usable && isa.chosen_by_itself) chosen = &isa;
  return chosen;
}

const Isa*& current() {
  static const Isa* isa = [] {
    const char* forced = std::getenv("SNNLSTM_ISA");
    return forced && *forced ? &find(forced) : best();
  }();
  return isa;
}

const Kernels& kernels(const Cell& cell) {
  return cell.C <= kFew ? *current()->for_few_channels : *current()->kernels;
}

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.usable) names.push_back(isa.name);
  return names;
}
std::string isa_name() { return current()->name; }
void set_isa(const std::string& name) { current() = &find(name); }

bool has_tiles(const Cell& cell) { return kernels(cell).has_tiles(cell); }
double sparse_cost(const Cell& cell, double density) {
  return kernels(cell).sparse_cost(cell, density);
}
int64_t forward_workspace(const Cell& cell, int threads) {
  return kernels(cell).forward_workspace(cell, threads);
}
int64_t backward_workspace(const Cell& cell, int threads, bool weight) {
  return kernels(cell).backward_workspace(cell, threads, weight);
}
int64_t weight_gradient_workspace(const Cell& cell, int threads) {
  return kernels(cell).weight_gradient_workspace(cell, threads);
}
int64_t padded_channels(const Cell& cell) { return kernels(cell).padded_channels(cell); }
int64_t packed_bytes(const Cell& cell, Form form) { return kernels(cell).packed_bytes(cell, form); }
void pack_weight(const Cell& cell, Form form, int threads, const void* weight, void* packed) {
  kernels(cell).pack_weight(cell, form, threads, weight, packed);
}
void forward(const ForwardArgs& args) { kernels(args.cell).forward(args); }
void backward(const BackwardArgs& args) { kernels(args.cell).backward(args); }
void weight_gradient(const WeightGradArgs& args) { kernels(args.cell).weight_gradient(args); }

}  // namespace cpu
}  // namespace snnlstm
