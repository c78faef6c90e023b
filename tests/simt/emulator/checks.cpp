#include "checks.h"

#include <dlfcn.h>

#include <cstdio>

#include "count.h"
#include "machine.h"
#include "memory.h"
#include "race.h"

namespace simt {

Checks& checks() {
  static Checks the_checks;
  return the_checks;
}

// "<path+0x12ab>", which the Python side turns into a function and a line.
std::string describe_pc(const void* pc) {
  Dl_info info{};
  if (pc == nullptr || dladdr(pc, &info) == 0) return "an unknown place";
  char text[32];
  // The call lies before the address that it returns to.
  std::snprintf(
      text, sizeof(text), "+0x%zx>",
      size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1);
  return std::string("<") + info.dli_fname + text;
}

namespace {

const char* verb(Access kind) {
  switch (kind) {
    case Access::read:
      return "reads";
    case Access::write:
      return "writes";
    case Access::atomic:
      return "atomically changes";
    case Access::copy_source:
      return "copies asynchronously from";
    case Access::copy_issue:
    case Access::copy_done:
      return "copies asynchronously to";
  }
  return "?";
}

[[noreturn]] void fail_access(const char* what, const Thread& thread, const void* p, size_t bytes,
                              Access kind, const void* pc) {
  Machine& m = machine();
  m.fail(std::string(what) + ": " + m.name(thread) + " " + verb(kind) + " " +
         std::to_string(bytes) + " bytes at " + describe_address(p) + ", at " + describe_pc(pc));
}

bool is_write(Access kind) { return kind == Access::write || kind == Access::atomic; }

void check_global(const Thread& thread, const Place& place, const void* p, size_t bytes,
                  Access kind, const void* pc) {
  if (place.offset + bytes > place.allocation->bytes) {
    fail_access("out of bounds", thread, p, bytes, kind, pc);
  }
  if (is_write(kind) && !place.allocation->writable) {
    fail_access("write to an input", thread, p, bytes, kind, pc);
  }
}

}  // namespace

void access(Thread& thread, const void* p, size_t bytes, Access kind, const void* pc) {
  const Checks& c = checks();
  const Place place = locate(p);
  switch (place.space) {
    case Space::local:
      return;
    case Space::image:
      if (is_write(kind)) fail_access("write to a static variable", thread, p, bytes, kind, pc);
      return;
    case Space::unknown:
      if (c.bounds && (!allocations().empty() || kind == Access::copy_issue)) {
        fail_access("out of bounds", thread, p, bytes, kind, pc);
      }
      return;
    case Space::shared:
      if (place.offset + bytes > shared_size()) {
        fail_access("out of bounds", thread, p, bytes, kind, pc);
      }
      break;
    case Space::global:
      if (c.bounds) check_global(thread, place, p, bytes, kind, pc);
      break;
  }
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && kind != Access::copy_source &&
      reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail_access("misaligned", thread, p, bytes, kind, pc);
  }
  if (c.races && c.instrumented) check_race(thread, place, bytes, kind, pc);
  if (c.counters) count_access(thread, place, bytes, kind, pc);
}

void check_matrix_row(Thread& owner, const void* row, const void* pc) {
  const Place place = locate(row);
  if (place.space != Space::shared || place.offset + 16 > shared_size()) {
    fail_access("ldmatrix out of bounds", owner, row, 16, Access::read, pc);
  }
  if (place.offset % 16 != 0) fail_access("misaligned ldmatrix", owner, row, 16, Access::read, pc);
  if (checks().races && checks().instrumented) check_matrix_race(owner, place, 16, pc);
  if (checks().counters) count_access(owner, place, 16, Access::read, pc);
}

void check_matrix_part(Thread& reader, const void* p, size_t bytes, const void* pc) {
  if (checks().races && checks().instrumented) check_matrix_race(reader, locate(p), bytes, pc);
}

void begin_launch_checks(const Geometry& geometry) {
  begin_race_launch();
  if (checks().counters) begin_count_launch(geometry);
}

void end_launch_checks() {
  if (checks().counters) end_count_launch();
}

void begin_block_checks() { begin_race_block(); }

std::string end_block_checks() {
  if (checks().counters) count_interval();
  return check_shared_guard();
}

void end_interval() {
  if (checks().counters) count_interval();
}

void converged(Warp& warp) {
  if (checks().counters) count_warp(warp);
}

void forget_allocation(size_t id) {
  forget_race_shadow(id);
  forget_count_map(id);
}

void synchronise_atomic(Thread& thread, const void* p) {
  if (checks().races && checks().instrumented) order_by_atomic(thread, p);
}

}  // namespace simt
