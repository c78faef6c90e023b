#include "checks.h"

#include <dlfcn.h>

#include "machine.h"

namespace simt {

// Returns "<path+0x12ab>", which library.py turns into a function and a line.
std::string describe_pc(const void* pc) {
  Dl_info info{};
  if (pc == nullptr || dladdr(pc, &info) == 0) return "an unknown place";
  // The call lies before the address that it returns to.
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  return text("<", info.dli_fname, "+0x", std::hex, offset, ">");
}

void access(Thread& thread, const void* p, size_t bytes, Access kind, const void* pc) {
  const Place place = locate(p);
  const bool writes = kind == Access::write;
  const auto refuse = [&](const char* what) {
    constexpr const char* verbs[] = {"reads", "writes", "copies asynchronously from",
                                     "copies asynchronously to", "copies asynchronously to"};
    Machine& m = machine();
    m.fail(text(what, ": ", m.name(thread), " ", verbs[int(kind)], " ", bytes, " bytes at ",
                describe_address(p), ", at ", describe_pc(pc)));
  };
  switch (place.space) {
    case Space::local:
      return;
    case Space::image:
      if (writes) refuse("write to a static variable");
      return;
    case Space::unknown:
      if (!allocations().empty() || kind == Access::copy_issue) refuse("out of bounds");
      return;
    case Space::shared:
      if (place.offset + bytes > shared_size()) refuse("out of bounds");
      break;
    case Space::global:
      if (place.offset + bytes > place.allocation->bytes) refuse("out of bounds");
      if (writes && !place.allocation->writable) refuse("write to an input");
      break;
  }
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && kind != Access::copy_source &&
      reinterpret_cast<uintptr_t>(p) % bytes != 0)
    refuse("misaligned");
  check_race(thread, place, bytes, kind, pc);
}

void check_matrix_row(Thread& owner, const void* row, const void* pc) {
  const Place place = locate(row);
  const auto refuse = [&](const char* what) {
    machine().fail(text(what, ": ", machine().name(owner), " hands over ", describe_address(row),
                        ", at ", describe_pc(pc)));
  };
  if (place.space != Space::shared || place.offset + 16 > shared_size())
    refuse("ldmatrix out of bounds");
  if (place.offset % 16 != 0) refuse("misaligned ldmatrix");
  check_matrix_part(owner, row, 16, pc);
}

}  // namespace simt
