// Every access of a kernel to memory passes here, to be checked: whether it is inside an array,
// aligned, and ordered with respect to what other threads did; and how well it coalesces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "memory.h"
#include "simt.h"

namespace simt {

struct Thread;
struct Warp;

enum class Access : uint8_t { read, write, atomic, copy_source, copy_issue, copy_done };

// Called before the access; ends the launch with an error if it must not be.
void access(Thread& thread, const void* p, size_t bytes, Access kind, const void* pc);
// The 16-byte row that a lane hands to ldmatrix; `receive` of its parts follow.
void check_matrix_row(Thread& owner, const void* row, const void* pc);
std::string describe_pc(const void* pc);

// ---- race.cpp: accesses of different threads that no barrier, __syncwarp or fence with an atomic
// orders. All of it does nothing without instrumentation, or where races are not asked for.

void begin_race_launch();
void begin_race_block();
void check_race(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc);
// A part of a row that ldmatrix reads: it may never have been written (and is NaN then).
void check_matrix_part(Thread& reader, const void* p, size_t bytes, const void* pc);
// An atomic operation on p: what the thread published before a fence becomes visible to whoever
// comes later to the same p.
void order_by_atomic(Thread& thread, const void* p);
void forget_race_shadow(size_t allocation_id);

// ---- count.cpp: what a launch costs on a GPU, as far as it can be counted: requests and sectors
// of global memory, bytes touched, wavefronts of shared memory, tensor core instructions. By kernel
// name. All of it does nothing where counters are not asked for.

void begin_count_launch(const Geometry& geometry);
void end_count_launch();
void count_access(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc);
void count_mma(int type);
// Called when all warps of the block, so many, have met at __syncthreads.
void count_barrier(size_t warps);
// Called when all lanes of the warp are at the same place: their accesses so far can be matched.
void count_warp(Warp& warp);
// Matches the accesses of all warps.
void count_interval();
void forget_count_map(size_t allocation_id);

void reset_counters();
// Lines of fields with tabs between: kernel, name of the counter, number.
std::string counters_as_text();
// By instruction: kernel, place, "shared" or "global", requests, cost, fewest; cost in wavefronts
// or sectors.
std::string spots_as_text();

}  // namespace simt
