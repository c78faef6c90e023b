// Chooses the instruction set, once at run time.
#include <cstdlib>
#include <stdexcept>

#if SNNLSTM_X86
#include <cpuid.h>
#endif

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
};

#if SNNLSTM_X86
// The vector instructions that the processor has and whose registers the system saves (Intel's
// manual, volume 1, chapters 14 and 15). The compilers' own __builtin_cpu_supports needs a run-time
// library that not all compilers provide.
struct Processor {
  bool avx2 = false, avx512 = false;

  Processor() {
    const auto has = [](unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; };
    // Leaf 1, ECX.
    constexpr unsigned kFma = 1u << 12;
    constexpr unsigned kXgetbv = 1u << 27;
    constexpr unsigned kAvx = 1u << 28;
    // Leaf 7, EBX: AVX2, and of AVX-512 F, DQ, BW and VL.
    constexpr unsigned kAvx2 = 1u << 5;
    constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    constexpr unsigned kYmm = 0x06, kZmm = 0xE6;  // XCR0
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, kFma | kXgetbv | kAvx)) return;
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = has(saved, kYmm) && has(b, kAvx2);
    avx512 = avx2 && has(saved, kZmm) && has(b, kAvx512);
  }
};
#endif

// Lists the instruction sets that this processor can run, best last.
const std::vector<Isa>& usable() {
  static const std::vector<Isa> sets = [] {
    std::vector<Isa> s{{"baseline", &baseline::kernels}};
#if SNNLSTM_X86
    const Processor processor;
    if (!processor.avx2) return s;
#if SNNLSTM_HAS_WIDE
    s.insert(s.begin(), {"wide", &wide::kernels});
#endif
    s.push_back({"avx2", &avx2::kernels});
    if (processor.avx512) s.push_back({"avx512", &avx512::kernels});
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
                              "' does not run here; accepted: " + names);
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

const Kernels& kernels() { return *current()->kernels; }

}  // namespace cpu
}  // namespace snnlstm
