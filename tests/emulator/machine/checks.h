// Checks every access of a kernel to memory: whether the access is inside an array, aligned, and
// ordered with respect to other threads' accesses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "memory.h"
#include "simt.h"

namespace simt {

struct Thread;
struct Warp;

enum class Access : uint8_t { read, write, copy_source, copy_issue, copy_done };

// Called before an access. Ends the launch with an error if the access is not allowed.
void access(Thread& thread, const void* p, size_t bytes, Access kind, const void* pc);
// Checks the 16-byte row that a lane hands to ldmatrix; check_matrix_part() follows for its parts.
void check_matrix_row(Thread& owner, const void* row, const void* pc);
std::string describe_pc(const void* pc);

// ---- race.cpp: accesses of different threads that neither a barrier nor a __syncwarp orders.
// These functions do nothing where races are not asked for.

void begin_race_launch();
void begin_race_block();
void check_race(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc);
// Checks a part of a row that ldmatrix reads. Nobody need have written it; then it is NaN.
void check_matrix_part(Thread& reader, const void* p, size_t bytes, const void* pc);
void forget_race_shadow(size_t allocation_id);

}  // namespace simt
