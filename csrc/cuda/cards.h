// The GPUs that people have, by NVIDIA's data sheets, and the constants of the estimate.
//
// A device that is none of them counts as the card of its compute capability (or of the next older
// one) whose number of multiprocessors is nearest, with its own number of them, and its own clock
// and bandwidth if the driver tells them.
#pragma once

#include <cstdlib>
#include <map>
#include <string>

#include "plan.h"

namespace snnlstm::cuda {

// Rates are multiply-adds a cycle of a multiprocessor, on tensor cores with dense operands and sums
// in float32. GeForce cards do those at half the rate of their sums in float16.
struct Card {
  const char *name, *title;
  int compute_capability, multiprocessors, shared_kib;  // the most shared memory of a block
  double gigahertz, gigabytes;                          // boost clock; of memory, a second
  int fp32, half, tf32;
  const char* source;
};

constexpr Card kCards[] = {
    {"t4", "Tesla T4", 75, 40, 64, 1.59, 320, 64, 512, 0,
     "NVIDIA T4 data sheet, 2019: 8.1 and 65 TFLOP/s, 320 GB/s; Turing white paper WP-09183-001"},
    {"2080ti", "GeForce RTX 2080 Ti", 75, 68, 64, 1.545, 616, 64, 256, 0,
     "Turing white paper WP-09183-001, appendix: 13.4 and 53.8 TFLOP/s, 616 GB/s"},
    {"a100", "A100 SXM4 40 GB", 80, 108, 163, 1.41, 1555, 64, 1024, 512,
     "A100 white paper, 2020: 19.5, 312 and 156 TFLOP/s, 1555 GB/s"},
    {"3090", "GeForce RTX 3090", 86, 82, 99, 1.695, 936, 128, 256, 128,
     "GA102 white paper, 2021: 35.6, 71 and 35.6 TFLOP/s, 936 GB/s"},
    {"4090", "GeForce RTX 4090", 89, 128, 99, 2.52, 1008, 128, 256, 128,
     "Ada white paper, 2023: 82.6, 165 and 82.6 TFLOP/s, 1008 GB/s"},
    {"l4", "L4", 89, 58, 99, 2.04, 300, 128, 512, 256,
     "NVIDIA L4 data sheet, 2023: 30.3, 121 and 60 TFLOP/s, 300 GB/s"},
    {"h100", "H100 SXM5", 90, 132, 227, 1.83, 3352, 128, 2048, 1024,
     "H100 white paper, 2023: 989 and 495 TFLOP/s, 3352 GB/s"},
    {"b200", "B200", 100, 148, 227, 1.85, 8000, 128, 4096, 2048,
     "DGX B200 data sheet, 2024: 2250 and 1125 TFLOP/s, 8 TB/s; the clock follows from these"},
    {"5090", "GeForce RTX 5090", 120, 170, 99, 2.41, 1792, 128, 256, 128,
     "RTX Blackwell white paper, 2025: 104.8, 209.5 and 104.8 TFLOP/s, 1792 GB/s"},
};

// Returns the card that a device counts as.
inline const Card& card_of(const Device& device) {
  const Card* best = nullptr;
  for (const Card& card : kCards) {
    if (card.compute_capability > device.compute_capability && best != nullptr) break;
    const auto apart = [&](const Card& c) {
      return std::abs(c.multiprocessors - device.multiprocessors);
    };
    if (best == nullptr || card.compute_capability > best->compute_capability ||
        apart(card) < apart(*best))
      best = &card;
  }
  return *best;
}

// The constants by name, for Python.
inline const std::map<std::string, double Model::*>& model_constants() {
  static const std::map<std::string, double Model::*> names = {
      {"cudnn_part", &Model::cudnn_part},
      {"cudnn_winograd", &Model::cudnn_winograd},
      {"mma_part", &Model::mma_part},
      {"fma_part", &Model::fma_part},
      {"fma_part_of_128", &Model::fma_part_of_128},
      {"warps", &Model::warps},
      {"cache_bytes", &Model::cache_bytes},
      {"memory_part", &Model::memory_part},
      {"neuron", &Model::neuron},
      {"neuron_backward", &Model::neuron_backward},
      {"launch", &Model::launch},
      {"block", &Model::block},
      {"host", &Model::host},
  };
  return names;
}

// What a device does in a second.
struct Rates {
  double fp32, half, tf32;  // multiply-adds, all multiprocessors together
  double bytes;             // of memory
  double cycles;
  double mma_sync;  // the part of the tensor cores' rate that mma.sync can reach

  explicit Rates(const Device& device) {
    const Card& card = card_of(device);
    cycles = device.clock > 0 ? device.clock : 1e9 * card.gigahertz;
    bytes = device.bandwidth > 0 ? device.bandwidth : 1e9 * card.gigabytes;
    const double all = cycles * device.multiprocessors;
    fp32 = all * card.fp32, half = all * card.half, tf32 = all * card.tf32;
    // 1 if mma.sync is the newest instruction; on sm_90 what Luo et al. 2024 measure of it,
    // https://arxiv.org/abs/2402.13499; on sm_100 a guess.
    const int capability = device.compute_capability;
    mma_sync = capability >= 120 ? 1.0 : capability >= 100 ? 0.5 : capability >= 90 ? 0.62 : 1.0;
  }
};

}  // namespace snnlstm::cuda
