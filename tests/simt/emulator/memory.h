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
  size_t id = 0;  // never used twice
};

enum class Space : uint8_t { shared, global, local, image, unknown };

struct Place {
  Space space;
  size_t offset;           // into the shared memory or the allocation
  Allocation* allocation;  // of Space::global
};

// Says where p lies. The running thread's stack and the host's are local.
Place locate(const void* p);

// Registers an array that kernels may use. While any is registered, an access outside of all arrays
// is an error. Arrays must not overlap.
void register_allocation(const void* start, size_t bytes, std::string name, bool writable);
bool unregister_allocation(const void* start);
std::vector<Allocation>& allocations();
// Says where p lies with respect to the nearest array.
std::string describe_address(const void* p);

char* shared_base();
size_t shared_size();
// Fills the block's shared memory with 0xff: NaN for every floating point type, -1 for integers.
void prepare_shared_memory(size_t bytes);
// Says what was overwritten behind the shared memory; "" if nothing was.
std::string check_shared_guard();

}  // namespace simt
