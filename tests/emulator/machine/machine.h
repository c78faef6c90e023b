// The emulated machine: one block at a time, its threads as fibres, its warps as collectives.
#pragma once

#include <cstdint>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fibre.h"
#include "simt.h"

namespace simt {

constexpr int most_shared_bytes = 227 * 1024;  // of one block, on sm_90

// Python sets these; library.py has the same fields.
struct Settings {
  uint64_t seed = 0;  // of the schedule
  int races = 1;      // look for races
  int compute_capability = 80;
  int truncates = 0;                     // mma cuts the terms of its sums (fragment.cpp)
  int dry = 0;                           // launches are checked and listed, but nothing runs
  int shared_bytes = most_shared_bytes;  // the most of a block
};
extern "C" __attribute__((visibility("default"))) Settings simt_settings;

enum class State : uint8_t { ready, at_collective, at_barrier, done };
enum class Operation : uint8_t { sync, shuffle, ldmatrix, mma };

// What a thread brings to a collective, and the places of its results.
struct Offer {
  uint64_t value = 0;  // of a shuffle
  int lanes = 0;
  const void* row = nullptr;
  const uint32_t *a = nullptr, *b = nullptr;
  uint32_t* r = nullptr;
  float* d = nullptr;
  const void* pc = nullptr;
};

struct Copy {  // one cp.async under way, of 16 bytes
  void* to;
  const void* from;
  bool real;
  unsigned group;
  const void* pc;
};

struct Warp;

struct Thread {
  Fibre fibre;
  uint3 index{};
  unsigned id = 0, lane = 0;
  Warp* warp = nullptr;
  State state = State::ready;
  Offer offer;
  std::vector<Copy> copies;
  unsigned committed = 0;  // groups so far
};

struct Warp {
  unsigned id = 0;
  Thread* lanes = nullptr;
  unsigned done = 0, at_barrier = 0;
  uint32_t events = 0;  // __syncwarp calls since the last barrier
  // The collective in which the lanes `arrived` wait. All lanes must agree on the variant.
  unsigned arrived = 0;
  Operation operation = Operation::sync;
  int variant = 0;
  Site site{};
};

class Machine {
 public:
  Geometry geometry{};             // of the launch
  std::vector<Geometry> launches;  // since Python has asked for them
  uint32_t epoch = 0;              // barriers of all blocks and launches so far
  uint32_t block_epoch = 0;        // epoch at the start of this block
  uint32_t launch_epoch = 0;       // epoch at the start of this launch
  std::vector<Thread> threads;     // of this block
  std::vector<Warp> warps;
  Thread* current = nullptr;           // null: the host runs
  unsigned arrived = 0, finished = 0;  // threads at the barrier; threads that have returned
  Site barrier_site{};
  std::string error;

  void run(const Geometry& geometry, void (*body)(void*), void* context);
  // Ends the launch with an error; called on a thread's fibre.
  [[noreturn]] void fail(std::string message);
  // Lets the next thread of this pass run; to_host: the thread that the schedule chooses.
  void yield(bool to_host);
  std::string name_of(unsigned thread_id) const;  // by the number in the block
  std::string name(const Thread& thread) const;   // and the block

  void barrier(Site site);
  // Waits until all lanes of the warp have called this; the last one runs finish(warp).
  void collective(Operation operation, int variant, Site site, void (*finish)(Warp&));

  bool failed() const { return !error.empty(); }
  const Fibre& host_fibre() const { return host_; }

 private:
  Fibre host_;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  std::mt19937_64 random_;

  static void entry(void* thread);
  void prepare_block(uint3 block);
  void run_block();
  // Runs each ready thread of pass_ to its next collective or barrier. Returns whether any ran.
  bool run_pass();
  Thread* next_of_pass();
  void enter(Thread& thread);
  bool resume_warp(Warp& warp, bool shuffle_lanes);
  bool round_ahead();
  void release_barrier();
  std::string stuck() const;
  std::vector<Thread*> pass_;
  size_t at_ = 0;  // the next of pass_
  std::vector<unsigned> warp_order_;
  uint32_t planned_epoch_ = 0;
  bool lockstep_ = false, shuffle_lanes_ = false;
};

extern Machine the_machine;
inline Machine& machine() { return the_machine; }

// Joins the parts.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream joint;
  (joint << ... << parts);
  return joint.str();
}
std::string describe(Site site);
// Describes the collective in which lanes of the warp wait.
std::string describe(const Warp& warp);
std::string hex(unsigned mask);

}  // namespace simt
