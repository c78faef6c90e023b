// What the kernels of violations.cu and races.cu share: one small sin per case, each with the
// innocent form beside it (bad == 0). 64 threads a block.
#pragma once

#include "entry.h"
#include "primitives.cuh"

namespace violation {

struct Shared {
  float a[64];
  alignas(16) float b[64];
  alignas(16) float tiles[2][8][4];
};

struct Data {
  const float* in;  // 64 floats, registered read-only
  float* out;       // 64 floats, registered writable
  unsigned* counter;
  int bad;
};

struct Case {
  const char* name;
  void (*kernel)(Data);
  int blocks;
};

#define CASE(name) {#name, name, 1}
#define CASE_OF_TWO(name) {#name, name, 2}

// Runs the case of that name, if it is one of these.
template <int count>
bool run(const Case (&cases)[count], const std::string& name, const Data& data) {
  for (const Case& c : cases) {
    if (c.name != name) continue;
    snnlstm::cuda::launch({c.name, c.blocks, 64, sizeof(Shared)}, c.kernel, data);
    return true;
  }
  return false;
}

// Runs a case of races.cu.
bool run_race(const std::string& name, const Data& data);

}  // namespace violation
