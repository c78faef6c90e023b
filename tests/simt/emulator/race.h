// Which accesses of different threads are not ordered by a barrier, a __syncwarp or a fence with
// an atomic.
#pragma once

#include <cstddef>

#include "checks.h"
#include "memory.h"

namespace simt {

void begin_race_launch();
void begin_race_block();
void check_race(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc);
// A part of a tile row, read by ldmatrix: may never have been written (its data is NaN then).
void check_matrix_race(Thread& thread, const Place& place, size_t bytes, const void* pc);
void order_by_atomic(Thread& thread, const void* p);
void forget_race_shadow(size_t allocation_id);

}  // namespace simt
