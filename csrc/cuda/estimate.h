// Estimates how long a launch takes, from what its blocks do. The plans choose by this; nothing is
// measured. A multiprocessor is taken to do one thing at its rate and to hide all that is faster:
//
//   products   of all blocks that it gets, with what pads channels, pixels and K, by tensor cores
//              or plain ones; slower if too few warps are at work
//   cache      what its blocks read from the level-2 cache
//   neurons    behind the products, since blocks that run together are in step
//   memory     of the whole launch, at the card's bandwidth
//
// Blocks come in rounds: the multiprocessor with the most blocks decides.
#pragma once

#include <algorithm>
#include <cmath>

#include "cards.h"
#include "mma.cuh"

namespace snnlstm::cuda {

// What a launch does.
struct Work {
  int64_t blocks = 0;
  int warps = 4;  // of a block, as the next four
  int64_t shared_bytes = 0;
  double products = 0;     // multiply-adds, of padding too
  double cache_bytes = 0;  // read from the level-2 cache
  double cycles = 0;       // of a multiprocessor, beside the products
  double memory = 0;       // bytes of the launch
};

struct Estimate {
  const Device& device;
  Model model;
  Rates rates;
  int lanes;

  explicit Estimate(const Device& of)
      : device(of), model(of.model), rates(of), lanes(card_of(of).fp32) {}

  // Returns the multiply-adds a second that our kernels reach at best; three products of 3xTF32
  // are one. Float64 counts as float32: it is as slow for cuDNN.
  double rate(Multiply m) const {
    if (m == Multiply::fma)
      return rates.fp32 * (lanes > 64 ? model.fma_part_of_128 : model.fma_part);
    const double of_type = is_half(m)              ? rates.half
                           : m == Multiply::tf32x3 ? rates.tf32 / 3
                                                   : rates.tf32;
    return of_type * rates.mma_sync * model.mma_part;
  }

  // Returns the multiply-adds a second of cuDNN in the numbers that it would multiply. winograd:
  // whether it may take Winograd's form for float32.
  double cudnn_rate(DType states, Matrix matrix, bool winograd) const {
    const bool tensor_cores = device.compute_capability >= 80;
    if (states == DType::float16 || matrix == Matrix::float16) return rates.half * model.cudnn_part;
    if (states == DType::bfloat16 || matrix == Matrix::bfloat16)
      return (tensor_cores ? rates.half : rates.fp32 / 4) * model.cudnn_part;  // a guess
    if (matrix == Matrix::tf32 && tensor_cores) return rates.tf32 * model.cudnn_part;
    return rates.fp32 * (winograd ? model.cudnn_winograd : model.cudnn_part);
  }

  double moving(double bytes) const { return bytes / (rates.bytes * model.memory_part); }

  // Returns the blocks that a multiprocessor holds at once; each thread has 128 registers. From 8.0
  // on the system keeps a KiB of shared memory for each block, and the first is not the block's.
  int64_t at_once(const Work& work) const {
    const int64_t kept = device.compute_capability >= 80 ? 1024 : 0;
    const int64_t by_shared =
        (device.shared_bytes + kept) / std::max<int64_t>(work.shared_bytes + kept, 1);
    return std::max<int64_t>(std::min<int64_t>(16 / std::max(work.warps, 1), by_shared), 1);
  }

  // Returns the seconds of a launch's blocks, if memory hands on all in time.
  double working(const Work& work, Multiply multiply) const {
    const int64_t blocks = ceil_div(work.blocks, device.multiprocessors);  // of the busiest one
    const int64_t together = std::min(at_once(work), blocks);
    const double busy = std::min(1.0, double(work.warps * together) / model.warps);
    const double products = work.products * device.multiprocessors / (rate(multiply) * busy);
    const double cache = work.cache_bytes / (model.cache_bytes * rates.cycles);
    const double block = std::max(products, cache) + work.cycles / rates.cycles;
    const double rounds = double(ceil_div(blocks, std::max<int64_t>(together, 1)));
    return double(blocks) * block + rounds * model.block;
  }

  // Returns the seconds of a launch without the launch itself.
  double seconds(const Work& work, Multiply multiply) const {
    return std::max(working(work, multiply), moving(work.memory));
  }
};

// Returns whether three tf32 products take less time than one product in float32.
inline bool tensor_cores_beat_fma(const Device& device) {
  const Estimate e(device);
  return device.compute_capability >= 80 && e.rate(Multiply::tf32x3) > e.rate(Multiply::fma);
}

}  // namespace snnlstm::cuda
