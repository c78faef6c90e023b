// Every access of a kernel to memory passes here, to be checked: whether it is inside an array,
// aligned, and ordered with respect to what other threads did; and how well it coalesces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "simt.h"

namespace simt {

struct Thread;
struct Warp;

enum class Access : uint8_t { read, write, atomic, copy_source, copy_issue, copy_done };

struct Checks {
  bool instrumented = false;  // plain accesses are reported too (the build with hooks)
  bool bounds = true;
  bool races = true;  // only in the instrumented build
  bool counters = false;
};

Checks& checks();

// Called before the access; ends the launch with an error if it must not be.
void access(Thread& thread, const void* p, size_t bytes, Access kind, const void* pc);
// The 16-byte row that a lane hands to ldmatrix; `receive` of its parts follow.
void check_matrix_row(Thread& owner, const void* row, const void* pc);
void check_matrix_part(Thread& reader, const void* p, size_t bytes, const void* pc);

// An atomic operation on p: what the thread published before a fence becomes visible to whoever
// comes later to the same p.
void synchronise_atomic(Thread& thread, const void* p);

void begin_launch_checks(const Geometry& geometry);
void end_launch_checks();
void begin_block_checks();
// Called at the end of a block; returns an error or "".
std::string end_block_checks();
// Called when a barrier is complete; when all lanes of a warp are at the same place.
void end_interval();
void converged(Warp& warp);

void forget_allocation(size_t id);

}  // namespace simt
