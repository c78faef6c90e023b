// The cell's entry points (csrc/cuda/api.h) for Python: structs are passed as they are in memory,
// see cell.py.
#include "api.h"
#include "entry.h"

using namespace snnlstm;

ENTRY snnlstm_sizes(const Cell* cell, const cuda::Target* target, cuda::Sizes* out) {
  return guarded([&] { *out = cuda::sizes(*cell, *target); });
}
ENTRY snnlstm_pack_weight(const Cell* cell, const void* weight, int backward, void* packed,
                          const cuda::Target* target) {
  return guarded([&] { cuda::pack_weight(*cell, weight, backward != 0, packed, *target); });
}
ENTRY snnlstm_forward(const ForwardArgs* args, const cuda::Target* target) {
  return guarded([&] { cuda::forward(*args, *target); });
}
