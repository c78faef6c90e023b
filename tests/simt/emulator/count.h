// What a launch costs on a GPU, as far as it can be counted: requests and sectors of global memory,
// bytes touched, wavefronts of shared memory, tensor core instructions. By kernel name.
#pragma once

#include <cstddef>
#include <string>

#include "checks.h"
#include "memory.h"

namespace simt {

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
// {"kernel": {"launches": ..., ...}, ...}
std::string counters_as_json();
// [[kernel, place, "shared" or "global", requests, cost, fewest], ...] by instruction; cost in
// wavefronts or sectors.
std::string spots_as_json();

}  // namespace simt
