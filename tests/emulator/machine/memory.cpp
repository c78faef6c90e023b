#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "checks.h"
#include "machine.h"

namespace simt {

namespace {

// Addresses shortly before and behind the block's belong to nothing else.
constexpr size_t margin = 1024;
char* const shared_start =
    static_cast<char*>(std::aligned_alloc(1024, most_shared_bytes + 2 * margin)) + margin;
size_t shared_bytes = 0;  // of this launch

// Begin and end of this module's loaded code, constants and variables, as the linker defines them.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

std::vector<Allocation> registry;  // sorted by start
size_t next_id = 1;
size_t last_hit = 0;

// On either side of an array: a mebibyte, and as much as the array has, for strides that are wrong.
// Nobody touches these pages, and so they take no memory.
size_t zone_of(size_t bytes) { return (size_t(1) << 20) + (bytes + 4095) / 4096 * 4096; }

size_t mapped(size_t bytes) { return zone_of(bytes) * 3; }

// Returns the first array that starts behind p.
auto behind(const char* p) {
  return std::upper_bound(registry.begin(), registry.end(), p,
                          [](const char* x, const Allocation& a) { return x < a.start; });
}

bool inside(const Fibre& fibre, const void* p) { return p >= fibre.low() && p < fibre.high(); }

}  // namespace

char* shared_base() { return shared_start; }
size_t shared_size() { return shared_bytes; }
std::vector<Allocation>& allocations() { return registry; }

Place locate(const void* p) {
  const Machine& m = machine();
  const char* c = static_cast<const char*>(p);
  const auto offset = size_t(c - shared_start);
  if (offset < shared_bytes) return {Space::shared, offset, nullptr};
  if (m.current != nullptr && inside(m.current->fibre, p)) return {Space::local, 0, nullptr};
  if (size_t(c - __ehdr_start) < size_t(_end - __ehdr_start)) return {Space::image, 0, nullptr};
  if (last_hit < registry.size()) {
    Allocation& a = registry[last_hit];
    if (size_t(c - a.start) < a.bytes) return {Space::global, size_t(c - a.start), &a};
  }
  auto next = behind(c);
  if (next != registry.begin()) {
    Allocation& a = *--next;
    if (size_t(c - a.start) < a.bytes) {
      last_hit = size_t(next - registry.begin());
      return {Space::global, size_t(c - a.start), &a};
    }
  }
  if (inside(m.host_fibre(), p)) return {Space::local, 0, nullptr};
  return {Space::unknown, 0, nullptr};
}

void register_allocation(const void* original, size_t bytes, std::string name, bool writable) {
  char* from = static_cast<char*>(const_cast<void*>(original));
  for (const Allocation& a : registry)
    if (from < a.original + a.bytes && a.original < from + bytes)
      throw std::runtime_error("the array '" + name + "' overlaps '" + a.name + "'");
  void* all = mmap(nullptr, mapped(bytes), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::runtime_error("no memory for a copy of '" + name + "'");
  // malloc aligns to 16 bytes; what an address has beyond that is chance.
  char* copy = static_cast<char*>(all) + zone_of(bytes) + reinterpret_cast<uintptr_t>(from) % 16;
  std::memcpy(copy, from, bytes);
  registry.insert(behind(copy),
                  Allocation{copy, bytes, std::move(name), writable, next_id++, from});
  last_hit = 0;
}

bool unregister_allocation(const void* original) {
  for (auto a = registry.begin(); a != registry.end(); ++a) {
    if (a->original != original) continue;
    if (a->writable) std::memcpy(a->original, a->start, a->bytes);
    forget_race_shadow(a->id);
    char* copy = const_cast<char*>(a->start);
    munmap(copy - reinterpret_cast<uintptr_t>(copy) % 16 - zone_of(a->bytes), mapped(a->bytes));
    registry.erase(a);
    last_hit = 0;
    return true;
  }
  return false;
}

const void* copy_of(const void* p) {
  const char* c = static_cast<const char*>(p);
  for (const Allocation& a : registry)
    if (size_t(c - a.original) < a.bytes) return a.start + (c - a.original);
  return p;
}

std::string describe_address(const void* p) {
  const char* c = static_cast<const char*>(p);
  if (size_t(c - shared_start + margin) < most_shared_bytes + 2 * margin)
    return text("byte ", c - shared_start, " of the block's ", shared_bytes,
                " bytes of shared memory");
  const Place place = locate(p);
  if (place.space == Space::global)
    return text("byte ", place.offset, " of '", place.allocation->name, "' (",
                place.allocation->bytes, " bytes)");
  const Allocation* nearest = nullptr;
  size_t distance = size_t(1) << 20;
  bool behind = false;
  for (const Allocation& a : registry) {
    const bool after = c >= a.start + a.bytes;
    const size_t d = after ? size_t(c - a.start) - a.bytes : size_t(a.start - c);
    if (d < distance) nearest = &a, distance = d, behind = after;
  }
  if (nearest == nullptr) return "no array that was registered";
  return text(distance, " bytes ", behind ? "behind the end" : "before the start", " of '",
              nearest->name, "' (", nearest->bytes, " bytes)");
}

void prepare_shared_memory(size_t bytes) {
  shared_bytes = bytes;
  std::memset(shared_start, 0xff, bytes);
}

// ---- what kernels call ------------------------------------------------------------------------

void* shared_memory(size_t bytes) {
  if (bytes > shared_bytes)
    machine().fail(text("the kernel uses ", bytes,
                        " bytes of shared memory, but was launched with ", shared_bytes));
  return shared_start;
}

void load(void* value, const void* p, size_t bytes) {
  access(*machine().current, p, bytes, Access::read, __builtin_return_address(0));
  std::memcpy(value, p, bytes);
}

void store(void* p, const void* value, size_t bytes) {
  access(*machine().current, p, bytes, Access::write, __builtin_return_address(0));
  std::memcpy(p, value, bytes);
}

// ---- asynchronous copies ----------------------------------------------------------------------

static void finish_copy(Thread& thread, const Copy& copy) {
  access(thread, copy.to, 16, Access::copy_done, copy.pc);
  if (copy.real)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

void cp_async(void* to, const void* from, bool real) {
  Machine& m = machine();
  Thread& thread = *m.current;
  const void* pc = __builtin_return_address(0);
  const auto refuse = [&](const std::string& why) {
    m.fail(text(m.name(thread), ": cp_async at ", describe_pc(pc), ": ", why));
  };
  if (simt_settings.compute_capability < 80) refuse("it needs sm_80");
  if (locate(to).space != Space::shared)
    refuse("the target is no shared memory but " + describe_address(to));
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) refuse("the source is misaligned");
  if (real) access(thread, from, 16, Access::copy_source, pc);
  access(thread, to, 16, Access::copy_issue, pc);
  std::memset(to, 0xff, 16);
  thread.copies.push_back({to, from, real, thread.committed, pc});
}

void cp_async_commit() { ++machine().current->committed; }

void cp_async_wait(int pending) {
  Thread& thread = *machine().current;
  size_t done = 0;
  while (done < thread.copies.size() &&
         int64_t(thread.copies[done].group) < int64_t(thread.committed) - pending) {
    finish_copy(thread, thread.copies[done++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(done));
}

}  // namespace simt
