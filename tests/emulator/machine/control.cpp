// The functions that Python calls through ctypes. Python writes the settings directly.
#include <exception>
#include <string>

#include "checks.h"
#include "machine.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace snnlstm::cuda {
int chosen_fault = 0;
}

namespace {
std::string answer;  // to the last call
}

SIMT_EXPORT void simt_fault(int which) { snnlstm::cuda::chosen_fault = which; }

// Returns lines of fields with tabs between, for the launches since the last call: kernel, blocks,
// threads, bytes of shared memory.
SIMT_EXPORT const char* simt_launches() {
  answer.clear();
  for (const simt::Geometry& g : simt::machine().launches)
    answer +=
        simt::text(g.name, "\t", g.grid.count(), "\t", g.block.count(), "\t", g.shared_bytes, "\n");
  simt::machine().launches.clear();
  return answer.c_str();
}

// Returns null, or what is wrong.
SIMT_EXPORT const char* simt_register(const void* start, size_t bytes, const char* name,
                                      int writable) {
  try {
    simt::register_allocation(start, bytes, name, writable != 0);
    return nullptr;
  } catch (const std::exception& e) {
    return (answer = e.what()).c_str();
  }
}

SIMT_EXPORT const void* simt_copy_of(const void* p) { return simt::copy_of(p); }

SIMT_EXPORT int simt_unregister(const void* start) { return simt::unregister_allocation(start); }
