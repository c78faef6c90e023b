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
SNNLSTM_DECLARE(avx2)
SNNLSTM_DECLARE(avx512)
SNNLSTM_DECLARE(wide)
#undef SNNLSTM_DECLARE

namespace cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const Kernels* for_few_channels;  // up to kFew channels leave long vectors mostly empty
};
constexpr int64_t kFew = 4;

// Lists the instruction sets that this processor can run, best last.
const std::vector<Isa>& usable() {
  static const std::vector<Isa> sets = [] {
    std::vector<Isa> s{{"baseline", &baseline::kernels, &baseline::kernels}};
#if SNNLSTM_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return s;
#if SNNLSTM_TESTING
    s.insert(s.begin(), {"wide", &wide::kernels, &wide::kernels});
#endif
    s.push_back({"avx2", &avx2::kernels, &avx2::kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      s.push_back({"avx512", &avx512::kernels, &avx2::kernels});
#endif
    return s;
  }();
  return sets;
}

const Isa& find(const std::string& name) {
  std::string names;
  for (const Isa& isa : usable()) {
    if (name == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not usable here; usable: " + names);
}

const Isa*& current() {
  static const Isa* isa = [] {
    const char* forced = std::getenv("SNNLSTM_ISA");
    return forced && *forced ? &find(forced) : &usable().back();
  }();
  return isa;
}

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : usable()) names.push_back(isa.name);
  return names;
}
std::string isa_name() { return current()->name; }
void set_isa(const std::string& name) { current() = &find(name); }

const Kernels& kernels(const Cell& cell) {
  return cell.C <= kFew ? *current()->for_few_channels : *current()->kernels;
}

}  // namespace cpu
}  // namespace snnlstm
