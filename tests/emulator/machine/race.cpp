// The race detector. No access of a block is ordered with respect to those of other blocks of the
// launch.
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "machine.h"

namespace simt {

namespace {

// An access. epoch: barriers before it; event: the warp's __syncwarp calls since the last barrier.
struct Record {
  uint32_t epoch = 0, event = 0;
  int32_t pc = 0;  // relative to a symbol of this module
  uint16_t thread = 0;
};

int32_t shorten(const void* pc) {
  return int32_t(static_cast<const char*>(pc) - reinterpret_cast<const char*>(&threadIdx));
}
const void* lengthen(int32_t pc) { return reinterpret_cast<const char*>(&threadIdx) + pc; }

// The accesses to a piece of memory with which a later access can race.
struct Shadowed {
  Record write;
  Record read;                     // the last one
  uint32_t read_lanes = 0;         // lanes of that warp that read with the same epoch and event
  Record read_elsewhere;           // another warp's in this block
  Record other_read, other_write;  // another block's in this launch
  uint32_t flight_epoch = 0;       // of a cp.async under way, or 0
  int32_t flight_pc = 0;
  uint16_t flight_thread = 0;
};

// A word of 4 bytes has one cell, or four cells once it was accessed in parts.
class Shadow {
 public:
  explicit Shadow(size_t bytes) : words_((bytes + 3) / 4), split_(words_.size(), 0) {}

  template <class Visit>
  __attribute__((always_inline)) void each(size_t offset, size_t bytes, Visit&& visit) {
    if (bytes == 4 && offset % 4 == 0 && !split_[offset / 4]) {
      visit(words_[offset / 4], offset);
      return;
    }
    size_t at = offset;
    const size_t end = offset + bytes;
    while (at < end) {
      const size_t word = at / 4;
      const size_t stop = std::min(end, 4 * word + 4);
      const bool whole = stop - at == 4;
      if (whole && !split_[word]) {
        visit(words_[word], at);
      } else {
        if (!split_[word]) split(word);
        for (size_t b = at; b < stop; ++b) visit(parts_[b], b);
      }
      at = stop;
    }
  }

  // The next launch or block starts with whole words again, and without what the parts tell.
  void join() {
    for (const size_t word : split_words_) split_[word] = 0;
    split_words_.clear();
  }

 private:
  std::vector<Shadowed> words_;
  std::vector<uint8_t> split_;
  std::vector<Shadowed> parts_;
  std::vector<size_t> split_words_;

  void split(size_t word) {
    if (parts_.empty()) parts_.resize(words_.size() * 4);
    split_[word] = 1;
    split_words_.push_back(word);
    for (size_t b = 4 * word; b < 4 * word + 4; ++b) parts_[b] = words_[word];
  }
};

Shadow shared_shadow(most_shared_bytes);
std::unordered_map<size_t, Shadow> global_shadows;  // by the number of the allocation

// Whether the access is that of another block of this launch.
bool from_other_block(const Record& r) {
  const Machine& m = machine();
  return r.epoch >= m.launch_epoch && r.epoch < m.block_epoch;
}

// Returns whether nothing orders the access of r before what `thread` does now.
bool races(const Record& r, const Thread& thread, bool global) {
  const Machine& m = machine();
  if (r.epoch < m.block_epoch) return global && from_other_block(r);
  if (r.epoch < m.epoch || r.thread == thread.id) return false;
  if (r.thread / warp_size != thread.warp->id) return true;
  return thread.warp->events <= r.event;
}

[[noreturn]] void report(const char* first, const Record& r, const char* second,
                         const Thread& thread, const char* address, const void* pc) {
  Machine& m = machine();
  const char* remedy = "no barrier between them";
  const bool other = from_other_block(r);
  if (other)
    remedy = "nothing orders blocks";
  else if (r.thread / warp_size == thread.warp->id)
    remedy = "neither a barrier nor a __syncwarp between them";
  m.fail(text("race: ", m.name(thread), " ", second, " ", describe_address(address), " at ",
              describe_pc(pc), "; ", m.name_of(r.thread), other ? " of an earlier block " : " ",
              first, " it at ", describe_pc(lengthen(r.pc)), ", ", remedy));
}

struct Context {
  Thread& thread;
  const char* start;  // of the memory that the shadow describes
  bool global;
  const void* pc;
};

Record now(const Context& c) {
  return {machine().epoch, c.thread.warp->events, shorten(c.pc), uint16_t(c.thread.id)};
}

[[noreturn]] __attribute__((noinline)) void report_flight(const Shadowed& cell, const Context& c,
                                                          const char* what, size_t offset) {
  Machine& m = machine();
  const bool own = cell.flight_thread == c.thread.id;
  m.fail(text("race: ", m.name(c.thread), " ", what, " ", describe_address(c.start + offset),
              " at ", describe_pc(c.pc), " while a cp_async of ",
              own ? "its own" : m.name_of(cell.flight_thread), " to it is under way, issued at ",
              describe_pc(lengthen(cell.flight_pc)),
              ": cp_async_wait is missing or waits for too little"));
}

// Copies of other blocks were checked there.
inline void check_flight(const Shadowed& cell, const Context& c, const char* what, size_t offset) {
  if (cell.flight_epoch >= machine().block_epoch) report_flight(cell, c, what, offset);
}

// Reports the access of r if nothing orders it before what the thread does now.
inline void must_follow(const Record& r, const char* did, const Context& c, const char* does,
                        size_t offset) {
  if (races(r, c.thread, c.global)) report(did, r, does, c.thread, c.start + offset, c.pc);
}

void check_read(const Shadowed& cell, const Context& c, bool must_be_written, size_t offset) {
  must_follow(cell.write, "writes", c, "reads", offset);
  if (c.global) must_follow(cell.other_write, "writes", c, "reads", offset);
  if (must_be_written && cell.write.epoch < machine().block_epoch)
    machine().fail("uninitialised: " + machine().name(c.thread) + " reads " +
                   describe_address(c.start + offset) + ", which nobody has written, at " +
                   describe_pc(c.pc));
}

inline void on_read(Shadowed& cell, const Context& c, bool must_be_written, size_t offset) {
  const Machine& m = machine();
  const Thread& thread = c.thread;
  check_flight(cell, c, "reads", offset);
  // A block mostly reads what it wrote before the last barrier: that needs no check.
  if (c.global || cell.write.epoch < m.block_epoch || cell.write.epoch >= m.epoch)
    check_read(cell, c, must_be_written, offset);
  Record& last = cell.read;
  const uint32_t bit = 1u << thread.lane;
  const bool same_warp = last.thread / warp_size == thread.warp->id;
  if (last.epoch == m.epoch && same_warp && last.event == thread.warp->events) {
    cell.read_lanes |= bit;
  } else {
    if (last.epoch == m.epoch && !same_warp) cell.read_elsewhere = last;
    if (c.global && from_other_block(last)) cell.other_read = last;
    cell.read_lanes = bit;
  }
  last = now(c);
}

void on_write(Shadowed& cell, const Context& c, const char* what, size_t offset) {
  const Machine& m = machine();
  check_flight(cell, c, what, offset);
  must_follow(cell.write, "writes", c, what, offset);
  if (c.global) {
    must_follow(cell.other_write, "writes", c, what, offset);
    must_follow(cell.other_read, "reads", c, what, offset);
  }
  Record read = cell.read;
  if (read.epoch == m.epoch && read.thread / warp_size == c.thread.warp->id) {
    const uint32_t others = cell.read_lanes & ~(1u << c.thread.lane);
    const unsigned lane = others != 0 ? unsigned(__builtin_ctz(others)) : c.thread.lane;
    read.thread = uint16_t(c.thread.warp->id * warp_size + lane);
  }
  must_follow(read, "reads", c, what, offset);
  must_follow(cell.read_elsewhere, "reads", c, what, offset);
  if (c.global && from_other_block(cell.write)) cell.other_write = cell.write;
  cell.write = now(c);
}

}  // namespace

void check_race(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc) {
  if (simt_settings.races == 0) return;
  const bool global = place.space == Space::global;
  Shadow& shadow =
      global
          ? global_shadows.try_emplace(place.allocation->id, place.allocation->bytes).first->second
          : shared_shadow;
  const Context c{thread, global ? place.allocation->start : shared_base(), global, pc};
  const auto written = [&](const char* what) {
    shadow.each(place.offset, bytes,
                [&](Shadowed& cell, size_t at) { on_write(cell, c, what, at); });
  };
  switch (kind) {
    case Access::read:
    case Access::copy_source:
      shadow.each(place.offset, bytes,
                  [&](Shadowed& cell, size_t at) { on_read(cell, c, !global, at); });
      break;
    case Access::write:
      written("writes");
      break;
    case Access::copy_issue:
      written("copies asynchronously to");
      shadow.each(place.offset, bytes, [&](Shadowed& cell, size_t) {
        cell.flight_epoch = machine().epoch;
        cell.flight_pc = shorten(pc);
        cell.flight_thread = uint16_t(thread.id);
      });
      break;
    case Access::copy_done:
      // The copy may happen as late as now.
      shadow.each(place.offset, bytes, [&](Shadowed& cell, size_t) {
        cell.flight_epoch = 0;
        cell.write = now(c);
      });
      break;
  }
}

void check_matrix_part(Thread& thread, const void* p, size_t bytes, const void* pc) {
  if (simt_settings.races == 0) return;
  const Context c{thread, shared_base(), false, pc};
  shared_shadow.each(locate(p).offset, bytes,
                     [&](Shadowed& cell, size_t at) { on_read(cell, c, false, at); });
}

void begin_race_block() { shared_shadow.join(); }

void begin_race_launch() {
  for (auto& shadow : global_shadows) shadow.second.join();
}

void forget_race_shadow(size_t id) { global_shadows.erase(id); }

}  // namespace simt
