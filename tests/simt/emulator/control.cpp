// What Python calls through ctypes: settings, registration of arrays, counters, faults.
#include <cstring>
#include <string>

#include "checks.h"
#include "count.h"
#include "machine.h"
#include "memory.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace snnlstm::cuda {
int chosen_fault = 0, chosen_fault_place = 0;
}

namespace {
std::string text;
}

// policy: 0 in order, 1 shuffled, 2 one random warp ahead.
SIMT_EXPORT void simt_schedule(int policy, uint64_t seed) {
  simt::machine().policy = simt::Policy(policy);
  simt::machine().seed = seed;
}

SIMT_EXPORT void simt_checks(int bounds, int races, int counters) {
  simt::Checks& c = simt::checks();
  c.bounds = bounds != 0;
  c.races = races != 0;
  c.counters = counters != 0;
}

SIMT_EXPORT int simt_instrumented() { return simt::checks().instrumented; }

SIMT_EXPORT void simt_compute_capability(int value) { simt::machine().compute_capability = value; }

SIMT_EXPORT void simt_truncate(int on) { simt::machine().truncates = on != 0; }

SIMT_EXPORT void simt_dry(int on) { simt::machine().dry = on != 0; }

// [[kernel, blocks, threads, bytes of shared memory], ...] of the dry runs since the last call.
SIMT_EXPORT const char* simt_launches() {
  text = "[";
  for (const simt::Geometry& g : simt::machine().launches) {
    if (text.size() > 1) text += ", ";
    text += std::string("[\"") + g.name + "\", " +
            std::to_string(uint64_t(g.grid.x) * g.grid.y * g.grid.z) + ", " +
            std::to_string(uint64_t(g.block.x) * g.block.y * g.block.z) + ", " +
            std::to_string(g.shared_bytes) + "]";
  }
  simt::machine().launches.clear();
  text += "]";
  return text.c_str();
}

SIMT_EXPORT void simt_fault(int which, int place) {
  snnlstm::cuda::chosen_fault = which;
  snnlstm::cuda::chosen_fault_place = place;
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

SIMT_EXPORT const char* simt_counters() {
  text = simt::counters_as_json();
  return text.c_str();
}

SIMT_EXPORT const char* simt_spots() {
  text = simt::spots_as_json();
  return text.c_str();
}
