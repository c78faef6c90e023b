// Stands in for the file of this name that CMake writes.
#pragma once

namespace snnlstm {

struct BuildFact {
  const char* name;
  const char* value;
};

inline constexpr BuildFact kBuildInfo[] = {
    {"version", "0+simt"},  {"isas", "simt"},     {"cuda", "emulated on the CPU"},
    {"cuda_version", ""},   {"cuda_archs", ""},
};

}  // namespace snnlstm
