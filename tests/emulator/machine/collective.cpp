// Barriers and warp collectives: threads wait for each other, and divergence is an error.
#include <algorithm>
#include <cstring>
#include <iomanip>

#include "checks.h"
#include "machine.h"

namespace simt {

namespace {

constexpr const char* operations[] = {"__syncwarp", "a shuffle", "ldmatrix", "mma"};

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

Thread& self() { return *machine().current; }

void check_mask(unsigned mask, Operation operation, Site site) {
  if (mask == all_lanes) return;
  machine().fail(text(operations[int(operation)], " at ", describe(site), " with mask ", hex(mask),
                      "; accepted is the whole warp"));
}

}  // namespace

std::string hex(unsigned mask) {
  return text("0x", std::hex, std::setw(8), std::setfill('0'), mask);
}

std::string describe(Site site) { return text(site.file, ":", site.line); }

std::string describe(const Warp& warp) {
  return operations[int(warp.operation)] + (" at " + describe(warp.site));
}

// ---- the block's barrier ----------------------------------------------------------------------

void Machine::barrier(Site site) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const auto refuse = [&](const std::string& why) {
    fail(name(thread) + " waits in __syncthreads at " + describe(site) + why);
  };
  if (finished > 0)
    refuse(", but " + std::to_string(finished) + " threads of the block have returned");
  if (warp.arrived != 0) refuse(" while others of its warp wait for it in " + describe(warp));
  if (arrived == 0)
    barrier_site = site;
  else if (!same(barrier_site, site))
    refuse(", others at " + describe(barrier_site) + ": divergent barriers");
  thread.state = State::at_barrier;
  warp.at_barrier |= 1u << thread.lane;
  if (++arrived == warps.size() * warp_size) release_barrier();
  yield(true);
}

void Machine::release_barrier() {
  arrived = 0;
  ++epoch;
  for (Warp& warp : warps) {
    warp.at_barrier = 0;
    warp.events = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane) warp.lanes[lane].state = State::ready;
  }
}

// ---- collectives ------------------------------------------------------------------------------

void Machine::collective(Operation operation, int variant, Site site, void (*finish)(Warp&)) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const bool joins = warp.arrived != 0 && warp.operation == operation && warp.variant == variant &&
                     same(warp.site, site);
  if (!joins) {
    const auto refuse = [&](const std::string& why) {
      fail(name(thread) + " calls " + operations[int(operation)] + " at " + describe(site) + why);
    };
    if (warp.done != 0) refuse("; lanes " + hex(warp.done) + " have returned");
    if (warp.at_barrier != 0)
      refuse("; lanes " + hex(warp.at_barrier) + " wait in __syncthreads at " +
             describe(barrier_site));
    if (warp.arrived != 0)
      refuse("; lanes " + hex(warp.arrived) + " wait in " + describe(warp) +
             ": divergent collectives");
    warp.operation = operation, warp.variant = variant, warp.site = site;
  }
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived != all_lanes) {
    thread.state = State::at_collective;
    return yield(false);
  }
  warp.arrived = 0;
  finish(warp);
  for (unsigned lane = 0; lane < warp_size; ++lane) warp.lanes[lane].state = State::ready;
}

// ---- what kernels call ------------------------------------------------------------------------

void barrier(Site site) { machine().barrier(site); }

void sync_warp(Site site) {
  machine().collective(Operation::sync, 0, site, [](Warp& warp) { ++warp.events; });
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site) {
  check_mask(mask, Operation::shuffle, site);
  Offer& offer = self().offer;
  offer.value = value, offer.lanes = lanes;
  machine().collective(Operation::shuffle, 0, site, [](Warp& warp) {
    uint64_t values[warp_size];
    for (unsigned l = 0; l < warp_size; ++l) values[l] = warp.lanes[l].offer.value;
    for (unsigned l = 0; l < warp_size; ++l) {
      Offer& own = warp.lanes[l].offer;
      own.value = values[(l ^ unsigned(own.lanes)) % warp_size];
    }
  });
  return offer.value;
}

}  // namespace simt
