// The machine's memories: the block's shared memory and the arrays that kernels were given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct Allocation {
  const char* start = nullptr;
  size_t bytes = 0;
  std::string name;
  bool writable = true;
  size_t id = 0;             // never used twice
  char* original = nullptr;  // the caller's array, of which this is a copy
};

enum class Space : uint8_t { shared, global, local, image, unknown };

struct Place {
  Space space;
  size_t offset;           // into the shared memory or the allocation
  Allocation* allocation;  // of Space::global
};

// Says where p lies. The running thread's stack and the host's are local.
Place locate(const void* p);

// Registers an array that kernels may use: they get a copy, which lies between zones that belong to
// no array. Whether an access beside an array is noticed does not depend on what lies behind the
// original. While any array is registered, an access outside of all is an error. Arrays must not
// overlap.
void register_allocation(const void* original, size_t bytes, std::string name, bool writable);
// Copies what kernels have written to the original.
bool unregister_allocation(const void* original);
// Returns where the copy has what the registered arrays have at p; p, if none has it.
const void* copy_of(const void* p);
std::vector<Allocation>& allocations();
// Says where p lies with respect to the nearest array.
std::string describe_address(const void* p);

char* shared_base();
size_t shared_size();
// Fills the block's shared memory with 0xff: NaN for every floating point type, -1 for integers.
void prepare_shared_memory(size_t bytes);

}  // namespace simt
