// What Python calls through ctypes; the settings it writes itself.
#include <exception>
#include <string>

#include "checks.h"
#include "machine.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace snnlstm::cuda {
int chosen_fault = 0, chosen_fault_place = 0;
}

namespace {
std::string text;  // of the last answer
}

SIMT_EXPORT void simt_fault(int which, int place) {
  snnlstm::cuda::chosen_fault = which;
  snnlstm::cuda::chosen_fault_place = place;
}

// Lines of fields with tabs between, of the dry runs since the last call: kernel, blocks, threads,
// bytes of shared memory.
SIMT_EXPORT const char* simt_launches() {
  text.clear();
  for (const simt::Geometry& g : simt::machine().launches)
    text += std::string(g.name) + "\t" + std::to_string(uint64_t(g.grid.x) * g.grid.y * g.grid.z) +
            "\t" + std::to_string(uint64_t(g.block.x) * g.block.y * g.block.z) + "\t" +
            std::to_string(g.shared_bytes) + "\n";
  simt::machine().launches.clear();
  return text.c_str();
}

// Returns null, or what is wrong.
SIMT_EXPORT const char* simt_register(const void* start, size_t bytes, const char* name,
                                      int writable) {
  try {
    simt::register_allocation(start, bytes, name, writable != 0);
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

SIMT_EXPORT int simt_unregister(const void* start) { return simt::unregister_allocation(start); }

SIMT_EXPORT void simt_reset_counters() { simt::reset_counters(); }

SIMT_EXPORT const char* simt_counters() { return (text = simt::counters_as_text()).c_str(); }

SIMT_EXPORT const char* simt_spots() { return (text = simt::spots_as_text()).c_str(); }
