// The order in which threads run, and the life of a launch.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "checks.h"
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

constexpr size_t stack_bytes = 256 * 1024;

Machine the_machine;
Settings simt_settings;

void run(const Geometry& geometry, void (*body)(void*), void* context) {
  machine().run(geometry, body, context);
}

void Machine::entry(void* argument) {
  auto& thread = *static_cast<Thread*>(argument);
  Machine& m = machine();
  m.body_(m.context_);
  if (!thread.copies.empty())
    m.fail(m.name(thread) + " returns with copies under way: cp_async without cp_async_wait at " +
           describe_pc(thread.copies.front().pc));
  thread.state = State::done;
  thread.warp->done |= 1u << thread.lane;
  ++m.finished;
  if (thread.warp->arrived != 0)
    m.fail(m.name(thread) + " returns while others of its warp wait for it in " +
           describe(*thread.warp));
  if (m.arrived > 0)
    m.fail(m.name(thread) + " returns while others wait for it in __syncthreads at " +
           describe(m.barrier_site));
  Thread* next = m.next_of_pass();
  if (next != nullptr) m.enter(*next);
  switch_fibre(thread.fibre, next != nullptr ? next->fibre : m.host_);
  __builtin_unreachable();
}

void Machine::fail(std::string message) {
  error = std::move(message);
  switch_fibre(current->fibre, host_);
  __builtin_unreachable();
}

Thread* Machine::next_of_pass() {
  while (at_ < pass_.size()) {
    Thread* next = pass_[at_++];
    if (next->state == State::ready) return next;
  }
  return nullptr;
}

void Machine::enter(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
}

void Machine::yield(bool to_host) {
  Fibre& own = current->fibre;
  Thread* next = to_host ? nullptr : next_of_pass();
  if (next != nullptr) {
    // Switches without a detour over the host, which would double the number of switches.
    enter(*next);
    switch_fibre(own, next->fibre);
  } else {
    switch_fibre(own, host_);
  }
}

bool Machine::run_pass() {
  bool progress = false;
  at_ = 0;
  while (Thread* thread = next_of_pass()) {
    progress = true;
    enter(*thread);
    switch_fibre(host_, thread->fibre);
    current = nullptr;
    if (failed()) break;
  }
  return progress;
}

void Machine::run(const Geometry& g, void (*body)(void*), void* context) {
  const auto refuse = [&](const auto&... why) {
    throw std::runtime_error(
        text("kernel '", g.name, "' launched at ", g.file, ":", g.line, ": ", why...));
  };
  const uint64_t size = g.block.count();
  if (size == 0 || size > 1024 || size % warp_size != 0)
    refuse("a block of ", size, " threads; accepted are multiples of 32 up to 1024");
  if (g.grid.x > 0x7fffffffu || g.grid.y > 65535 || g.grid.z > 65535)
    refuse("a grid of (", g.grid.x, ", ", g.grid.y, ", ", g.grid.z,
           ") blocks; accepted are up to (2147483647, 65535, 65535)");
  const int most = simt_settings.shared_bytes;
  if (g.shared_bytes > size_t(most))
    refuse(g.shared_bytes, " bytes of shared memory; a block of this card has at most ", most);
  if (current != nullptr) refuse("a launch inside a kernel");
  launches.push_back(g);
  if (simt_settings.dry) return;

  geometry = g;
  body_ = body;
  context_ = context;
  error.clear();
  blockDim = g.block;
  gridDim = g.grid;
  host_.adopt();
  random_.seed(simt_settings.seed);
  launch_epoch = ++epoch;

  if (threads.size() < size) {
    const size_t before = threads.size();
    threads.resize(size);
    for (size_t i = before; i < size; ++i) threads[i].fibre.allocate(stack_bytes, i * 448);
  }
  warps.resize(size / warp_size);
  begin_race_launch();

  std::vector<uint64_t> order(g.grid.count());
  std::iota(order.begin(), order.end(), uint64_t(0));
  std::shuffle(order.begin(), order.end(), random_);
  for (const uint64_t b : order) {
    prepare_block({unsigned(b % g.grid.x), unsigned(b / g.grid.x % g.grid.y),
                   unsigned(b / g.grid.x / g.grid.y)});
    run_block();
    if (failed()) break;
  }
  ++epoch;
  current = nullptr;
  if (failed()) refuse(error);
}

void Machine::prepare_block(uint3 block) {
  blockIdx = block;
  arrived = finished = 0;
  block_epoch = ++epoch;
  planned_epoch_ = 0;
  const auto size = unsigned(geometry.block.count());
  for (unsigned w = 0; w < warps.size(); ++w) {
    Warp& warp = warps[w];
    warp.id = w;
    warp.lanes = &threads[w * warp_size];
    warp.done = warp.at_barrier = warp.arrived = warp.events = 0;
  }
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = threads[i];
    t.id = i;
    t.lane = i % warp_size;
    t.warp = &warps[i / warp_size];
    t.index = {i % geometry.block.x, i / geometry.block.x % geometry.block.y,
               i / geometry.block.x / geometry.block.y};
    t.state = State::ready;
    t.copies.clear();
    t.committed = 0;
    t.fibre.prepare(entry, &t);
  }
  prepare_shared_memory(geometry.shared_bytes);
  begin_race_block();
}

void Machine::run_block() {
  const unsigned size = unsigned(warps.size()) * warp_size;
  while (finished < size && !failed()) {
    if (!round_ahead() && !failed()) error = stuck();
  }
}

// Between two barriers one random warp goes as far as it can before the others start. These follow
// in step or, every other time, one after the other, so that the last one lags behind all.
bool Machine::round_ahead() {
  if (planned_epoch_ != epoch) {
    planned_epoch_ = epoch;
    warp_order_.resize(warps.size());
    std::iota(warp_order_.begin(), warp_order_.end(), 0u);
    std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
    lockstep_ = random_() & 1;
    shuffle_lanes_ = random_() & 1;
  }
  bool progress = false;
  const uint32_t started = epoch;
  for (const unsigned w : warp_order_) {
    if (lockstep_ && w != warp_order_[0])
      progress |= resume_warp(warps[w], shuffle_lanes_);
    else
      while (epoch == started && !failed() && resume_warp(warps[w], shuffle_lanes_))
        progress = true;
    if (failed() || epoch != started) return true;
  }
  return progress;
}

bool Machine::resume_warp(Warp& warp, bool shuffle_lanes) {
  pass_.resize(warp_size);
  for (unsigned lane = 0; lane < warp_size; ++lane) pass_[lane] = &warp.lanes[lane];
  if (shuffle_lanes) std::shuffle(pass_.begin(), pass_.end(), random_);
  return run_pass();
}

std::string Machine::name_of(unsigned id) const {
  const unsigned x = geometry.block.x, y = geometry.block.y;
  return text("thread (", id % x, ", ", id / x % y, ", ", id / x / y, ") [warp ", id / warp_size,
              ", lane ", id % warp_size, "]");
}

std::string Machine::name(const Thread& thread) const {
  return text(name_of(thread.id), " of block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z,
              ")");
}

std::string Machine::stuck() const {
  std::string found = "the block is stuck:";
  for (const Warp& warp : warps) {
    const std::string number = text(" warp ", warp.id, " waits in ");
    if (warp.at_barrier != 0) found += number + "__syncthreads at " + describe(barrier_site) + ";";
    if (warp.arrived != 0)
      found += number + describe(warp) + " for lanes " + hex(~warp.arrived) + ";";
  }
  return found;
}

}  // namespace simt
