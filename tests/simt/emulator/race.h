// Finds accesses of different threads that no barrier, __syncwarp or fence with an atomic orders.
#pragma once

#include <cstddef>

#include "checks.h"
#include "memory.h"

namespace simt {

void begin_race_launch();
void begin_race_block();
void check_race(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc);
// Checks a part of a tile row that ldmatrix reads; it may never have been written (and is NaN
// then).
void check_matrix_race(Thread& thread, const Place& place, size_t bytes, const void* pc);
void order_by_atomic(Thread& thread, const void* p);
void forget_race_shadow(size_t allocation_id);

}  // namespace simt
