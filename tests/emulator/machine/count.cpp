#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "machine.h"

namespace simt {

namespace {

constexpr size_t sector_bytes = 32;
constexpr unsigned banks = 32, bank_bytes = 4;

// Counters by name. A request is a warp's, of one instruction.
//   global_{read, write}_{sectors, fewest}
//   bytes_read, bytes_written              distinct bytes of each launch
//   shared_{wavefronts, fewest}            a wavefront serves each bank once
//   mma_{fp16, bf16, tf32}                 a warp's each
using Totals = std::map<std::string, uint64_t>;

std::map<std::string, Totals> totals;
Totals* now = nullptr;

struct Request {
  Space space;
  Access kind;
  uint32_t lanes = 0;
  uint16_t bytes = 0;
  std::array<uintptr_t, warp_size> address;
};

// The n-th time that lanes pass one instruction is one request.
struct Instruction {
  std::array<uint32_t, warp_size> times{};
  std::vector<Request> requests;
};

using WarpLog = std::unordered_map<const void*, Instruction>;
std::vector<WarpLog> logs;

// The bytes that a launch has read and those that it has written, by the number of the allocation.
std::unordered_map<size_t, std::array<std::vector<bool>, 2>> touched;

// Returns how many of the numbers differ.
uint64_t distinct(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  return uint64_t(std::unique(numbers.begin(), numbers.end()) - numbers.begin());
}

void count_global(const Request& r) {
  std::vector<uintptr_t> bytes, sectors;
  for (unsigned lane = 0; lane < warp_size; ++lane)
    for (unsigned b = 0; b < r.bytes && (r.lanes >> lane & 1); ++b) {
      bytes.push_back(r.address[lane] + b);
      sectors.push_back(bytes.back() / sector_bytes);
    }
  const std::string kind = r.kind == Access::write ? "global_write_" : "global_read_";
  (*now)[kind + "sectors"] += distinct(sectors);
  (*now)[kind + "fewest"] += (distinct(bytes) + sector_bytes - 1) / sector_bytes;
}

// Half a warp accesses 8 bytes at once, a quarter of a warp 16 bytes.
void count_shared(const Request& r) {
  const unsigned lanes_at_once = r.bytes <= 4 ? 32 : r.bytes == 8 ? 16 : 8;
  for (unsigned first = 0; first < warp_size; first += lanes_at_once) {
    std::array<std::vector<uintptr_t>, banks> words;
    for (unsigned lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(r.lanes >> lane & 1)) continue;
      const uintptr_t low = r.address[lane] / bank_bytes;
      const uintptr_t high = (r.address[lane] + r.bytes - 1) / bank_bytes;
      for (uintptr_t word = low; word <= high; ++word) words[word % banks].push_back(word);
    }
    uint64_t most = 0;
    for (auto& of_bank : words) most = std::max(most, distinct(of_bank));
    (*now)["shared_wavefronts"] += most;
    (*now)["shared_fewest"] += most > 0;
  }
}

void count_log(WarpLog& log) {
  for (auto& item : log) {
    for (const Request& r : item.second.requests)
      if (r.space == Space::shared)
        count_shared(r);
      else
        count_global(r);
    item.second.requests.clear();
    item.second.times.fill(0);
  }
}

void touch(const Place& place, size_t bytes, bool write) {
  std::vector<bool>& seen = touched[place.allocation->id][write];
  seen.resize(place.allocation->bytes);
  uint64_t& distinct = (*now)[write ? "bytes_written" : "bytes_read"];
  for (size_t b = place.offset; b < place.offset + bytes; ++b) {
    distinct += !seen[b];
    seen[b] = true;
  }
}

}  // namespace

void begin_count_launch(const Geometry& g) {
  if (!simt_settings.counters) return;
  now = &totals[g.name];
  logs.clear();
  logs.resize(machine().warps.size());
  touched.clear();
}

void end_count_launch() {
  count_interval();
  now = nullptr;
}

void count_access(Thread& thread, const Place& place, size_t bytes, Access kind, const void* pc) {
  if (now == nullptr || kind == Access::copy_done) return;
  if (place.space == Space::global) touch(place, bytes, kind == Access::write);
  const bool source = kind == Access::copy_source;
  // cp.async is one instruction with two requests: one to either memory.
  const void* key = source ? static_cast<const char*>(pc) - 1 : pc;
  Instruction& instruction = logs[thread.warp->id][key];
  const uint32_t time = instruction.times[thread.lane]++;
  if (time == instruction.requests.size())
    instruction.requests.push_back({place.space, kind, 0, uint16_t(bytes), {}});
  Request& request = instruction.requests[time];
  request.lanes |= 1u << thread.lane;
  request.bytes = std::max(request.bytes, uint16_t(bytes));
  const size_t base =
      place.space == Space::shared ? 0 : reinterpret_cast<uintptr_t>(place.allocation->start);
  request.address[thread.lane] = base + place.offset;
}

void count_mma(int type) {
  constexpr const char* names[] = {"mma_fp16", "mma_bf16", "mma_tf32", "mma_fp16_k8"};
  if (now != nullptr) ++(*now)[names[type]];
}

void count_warp(Warp& warp) {
  if (now != nullptr) count_log(logs[warp.id]);
}

void count_interval() {
  if (now == nullptr) return;
  for (WarpLog& log : logs) count_log(log);
}

void forget_count_map(size_t id) { touched.erase(id); }

void reset_counters() { totals.clear(); }

std::string counters_as_text() {
  std::string found;
  for (const auto& [kernel, counters] : totals)
    for (const auto& [name, value] : counters) found += text(kernel, "\t", name, "\t", value, "\n");
  return found;
}

}  // namespace simt
