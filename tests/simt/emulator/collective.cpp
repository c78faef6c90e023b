// Barriers and warp collectives: which threads wait for each other, and what is an error.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "count.h"
#include "machine.h"
#include "memory.h"

namespace simt {

std::string describe(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

const char* describe(Operation operation) {
  switch (operation) {
    case Operation::sync:
      return "__syncwarp";
    case Operation::shuffle:
      return "a shuffle";
    case Operation::vote:
      return "a vote";
    case Operation::ldmatrix:
      return "ldmatrix";
    case Operation::mma:
      return "mma";
  }
  return "?";
}

namespace {

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

Thread& self() { return *machine().current; }

}  // namespace

// ---- the block's barrier ----------------------------------------------------------------------

void Machine::barrier(Site site) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  if (finished > 0) {
    fail(name(thread) + " waits in __syncthreads at " + describe(site) + ", but " +
         std::to_string(finished) + " threads of the block have returned");
  }
  for (const Group& group : warp.groups) {
    if (group.mask >> thread.lane & 1) {
      fail(name(thread) + " waits in __syncthreads at " + describe(site) +
           " while others of its warp wait for it in " + describe(group.operation) + " at " +
           describe(group.site));
    }
  }
  if (arrived == 0) {
    barrier_site = site;
  } else if (!same(barrier_site, site)) {
    fail("divergent barriers: " + name(thread) + " waits in __syncthreads at " + describe(site) +
         ", others wait at " + describe(barrier_site));
  }
  thread.state = State::at_barrier;
  warp.at_barrier |= 1u << thread.lane;
  if (++arrived == warps.size() * warp_size) release_barrier();
  yield(true);
}

void Machine::release_barrier() {
  count_barrier(warps.size());
  end_interval();
  arrived = 0;
  ++epoch;
  for (Warp& warp : warps) {
    warp.at_barrier = 0;
    warp.events = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      warp.lanes[lane].state = State::ready;
      std::fill(std::begin(warp.lanes[lane].seen), std::end(warp.lanes[lane].seen), 0u);
    }
  }
}

// ---- collectives ------------------------------------------------------------------------------

void Machine::check_collective(const Thread& thread, Operation operation, int variant,
                               unsigned mask, Site site) {
  const Warp& warp = *thread.warp;
  const std::string here = name(thread) + " calls " + describe(operation) + " at " + describe(site);
  if (!(mask >> thread.lane & 1)) {
    fail(here + " with mask " + hex(mask) + ", which lacks its own lane");
  }
  if (mask & warp.done) {
    fail(here + " with mask " + hex(mask) + "; lanes " + hex(mask & warp.done) + " have returned");
  }
  if (mask & warp.at_barrier) {
    fail(here + " with mask " + hex(mask) + "; lanes " + hex(mask & warp.at_barrier) +
         " wait in __syncthreads at " + describe(barrier_site));
  }
  for (const Group& group : warp.groups) {
    if (!(group.mask & mask)) continue;
    if (group.mask == mask && group.operation == operation && group.variant == variant &&
        same(group.site, site)) {
      continue;
    }
    fail("divergent collectives: " + here + " with mask " + hex(mask) + "; lanes " +
         hex(group.arrived) + " wait in " + describe(group.operation) + " at " +
         describe(group.site) + " with mask " + hex(group.mask) +
         (group.variant != variant && group.operation == operation ? ", in another form" : ""));
  }
}

void Machine::collective(Operation operation, int variant, unsigned mask, Site site,
                         void (*finish)(Machine&, Warp&, unsigned)) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const unsigned bit = 1u << thread.lane;
  Group* group = nullptr;
  // The common case first: one group, and this is one of it.
  if (warp.groups.size() == 1 && warp.groups[0].mask == mask && (mask & bit) &&
      warp.groups[0].operation == operation && warp.groups[0].variant == variant &&
      same(warp.groups[0].site, site)) {
    group = &warp.groups[0];
  } else {
    if (!warp.groups.empty() || (mask & (warp.done | warp.at_barrier)) || !(mask & bit)) {
      check_collective(thread, operation, variant, mask, site);
    }
    for (Group& g : warp.groups) {
      if (g.mask == mask) group = &g;
    }
    if (group == nullptr) {
      warp.groups.push_back({operation, variant, mask, 0u, site});
      group = &warp.groups.back();
    }
  }
  group->arrived |= bit;
  if (group->arrived != mask) {
    thread.state = State::at_collective;
    yield(false);
    return;
  }
  warp.groups.erase(warp.groups.begin() + (group - warp.groups.data()));
  finish(*this, warp, mask);
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if ((mask & ~bit) >> lane & 1) warp.lanes[lane].state = State::ready;
  }
  if (mask == 0xffffffffu) converged(warp);
}

// ---- what kernels call ------------------------------------------------------------------------

void barrier(Site site) { machine().barrier(site); }

void sync_warp(unsigned mask, Site site) {
  machine().collective(Operation::sync, 0, mask, site, [](Machine&, Warp& warp, unsigned m) {
    const uint32_t event = ++warp.events;
    uint32_t joint[warp_size] = {};
    for (unsigned t = 0; t < warp_size; ++t) {
      if (!(m >> t & 1)) continue;
      for (unsigned l = 0; l < warp_size; ++l) {
        joint[l] = std::max(joint[l], warp.lanes[t].seen[l]);
      }
    }
    for (unsigned l = 0; l < warp_size; ++l) {
      if (m >> l & 1) joint[l] = event;
    }
    for (unsigned t = 0; t < warp_size; ++t) {
      if (m >> t & 1) std::copy(joint, joint + warp_size, warp.lanes[t].seen);
    }
  });
}

uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int lane, int width, Site site) {
  Machine& m = machine();
  Thread& thread = self();
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    m.fail("a shuffle at " + describe(site) + " with width " + std::to_string(width) +
           "; accepted are 1, 2, 4, 8, 16 and 32");
  }
  thread.offer.value = value;
  thread.offer.lane = lane;
  thread.offer.width = width;
  static const auto finish = [](Shuffle how, Machine& m, Warp& warp, unsigned mask) {
    uint64_t values[warp_size];
    for (unsigned l = 0; l < warp_size; ++l) values[l] = warp.lanes[l].offer.value;
    for (unsigned l = 0; l < warp_size; ++l) {
      if (!(mask >> l & 1)) continue;
      Offer& offer = warp.lanes[l].offer;
      // A segment is `width` lanes; a source outside of what the mode may reach gives the lane's
      // own value (PTX ISA, shfl.sync).
      const int first = int(l) & ~(offer.width - 1), last = first + offer.width - 1;
      int from = 0;
      bool reachable = true;
      switch (how) {
        case Shuffle::index:
          from = first | (offer.lane & (offer.width - 1));
          break;
        case Shuffle::down:
          from = int(l) + offer.lane;
          reachable = from <= last;
          break;
        case Shuffle::exclusive_or:
          from = int(l) ^ offer.lane;
          reachable = from <= last;
          break;
      }
      if (!reachable) from = int(l);
      if (from < 0 || from >= int(warp_size) || !(mask >> from & 1)) {
        m.fail(m.name(warp.lanes[l]) + " shuffles from lane " + std::to_string(from) +
               ", which mask " + hex(mask) + " lacks");
      }
      offer.value = values[from];
    }
  };
  using Finish = void (*)(Machine&, Warp&, unsigned);
  static const Finish by_mode[] = {
      [](Machine& m, Warp& w, unsigned k) { finish(Shuffle::index, m, w, k); },
      [](Machine& m, Warp& w, unsigned k) { finish(Shuffle::down, m, w, k); },
      [](Machine& m, Warp& w, unsigned k) { finish(Shuffle::exclusive_or, m, w, k); }};
  m.collective(Operation::shuffle, int(mode), mask, site, by_mode[int(mode)]);
  return thread.offer.value;
}

bool any(unsigned mask, bool predicate, Site site) {
  Thread& thread = self();
  thread.offer.value = predicate;
  machine().collective(Operation::vote, 0, mask, site, [](Machine&, Warp& warp, unsigned m) {
    uint64_t found = 0;
    for (unsigned l = 0; l < warp_size; ++l) {
      if (m >> l & 1) found |= warp.lanes[l].offer.value;
    }
    for (unsigned l = 0; l < warp_size; ++l) {
      if (m >> l & 1) warp.lanes[l].offer.value = found;
    }
  });
  return thread.offer.value != 0;
}

unsigned active_mask() {
  machine().fail("__activemask() says nothing reliable: compute the mask from what is masked");
}

void fence() { fence_memory(self()); }

}  // namespace simt
