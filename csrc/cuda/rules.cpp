// Written rules: what multiplies float32 at full precision, which algorithm runs a pass, which
// blocks and tiles a step has, and in how many parts the weight's gradient is summed.
//
// No GPU has been timed. The rules come from counts (of PTX, machine code, rounds of blocks) and
// from a paper model of nine cards, whose choices they match within some 15 %, the model's own
// error. "measure" times the candidates on the GPU at hand, the rules' choice first.
// tests/emulator/test_rules.py has the layers that decided.
#include "planning.h"

namespace snnlstm::cuda {

namespace rules {

// Says whether 3xTF32 is faster than float32 without tensor cores from 8.0 on. The large
// chips (8.0, 9.0, 10.x, 11.x) multiply tf32 at 4 to 8 times the rate of float32, so three
// products are faster than one. The others (8.6, 8.7, 8.9, 12.x) reach at most twice the rate.
bool three_products_beat_one(int compute_capability) {
  const int major = compute_capability / 10;
  return compute_capability == 80 || (major >= 9 && major <= 11);
}

// Returns the outputs (pixels x channels) that the busiest multiprocessor computes, as a measure of
// time. Blocks come in rounds, and the multiprocessor with the most blocks decides. A warp computes
// equally many outputs in every kind of block. Six warps keep a multiprocessor busy: registers have
// room for eight or more of each kernel, but shared memory may not. With fewer warps the products
// take longer, but the neurons after them do not. So outputs count once for the neurons, and once
// or more for the products.
double busiest(const Device& device, const Load& load) {
  constexpr double kBusy = 6;
  const int64_t blocks = ceil_div(load.blocks, device.multiprocessors);
  // From 8.0 on the system reserves a KiB of shared memory for each block, and one in total.
  const int64_t kept = device.compute_capability >= 80 ? 1024 : 0;
  const int64_t warps = load.threads / 32;
  const int64_t by_shared =
      (device.shared_bytes + kept) / std::max<int64_t>(load.shared_bytes + kept, 1);
  const int64_t at_once = std::min(blocks, by_shared);
  const double waiting = std::max(1.0, kBusy / double(std::max<int64_t>(at_once, 1) * warps));
  return double(blocks * load.outputs) * (1 + waiting);
}

// Returns in how many parts the pixels of all steps are summed, of `blocks` blocks each. Of 2 to 8
// rounds it takes the fewest that leave less than a tenth of the multiprocessors idle. A part has
// at least 256 pixels, so that a block's start costs little. There are at most 1024 parts,
// because they are written and read again.
int64_t splits(const Device& device, int64_t blocks, int64_t pixels) {
  const int64_t most = std::clamp<int64_t>(pixels / 256, 1, 1024);
  int64_t best = 1;
  double filled = 0;
  for (int rounds = 2; rounds <= 8 && filled < 0.9; ++rounds) {
    const int64_t parts = std::clamp<int64_t>(rounds * device.multiprocessors / blocks, 1, most);
    const double part =
        double(parts * blocks) / double(round_up(parts * blocks, device.multiprocessors));
    if (part > filled + 0.05) {
      best = parts;
      filled = part;
    }
  }
  return best;
}

// Returns the algorithm of a pass. The same rules hold forward and backward, except where
// `backward` is tested. fma: the step kernels multiply without tensor cores; tf32x3: in 3xTF32.
// share: the part of their tiles' pixels that lies in images.
Algorithm algorithm(const Cell& c, const Device& device, Matrix matrix, bool fma, bool tf32x3,
                    double share, bool backward) {
  const int capability = device.compute_capability;
  const int64_t channels = c.Cin + c.C;
  const double depth = double(c.kernel_h) * c.kernel_w * double(channels);
  const double neurons =
      double(c.N) * double(c.Ho() * c.Wo()) * double(c.C) / device.multiprocessors;
  const double products = neurons * 4 * depth;  // of a multiprocessor

  // cuDNN has nothing better for float64, nor for bfloat16 before 8.0: these use no tensor cores.
  const bool bfloat16 = c.dtype == DType::bfloat16 || matrix == Matrix::bfloat16;
  if (c.dtype == DType::float64 || (fma && bfloat16)) return Algorithm::fused;

  // With cuDNN, Python and torch take some 40 us a step, 60 backward. Our steps take less up to
  // about so many products. A graph that replays a call costs the host nothing, and cuDNN would win
  // earlier there, but the rules do not know what will be captured.
  const bool large_chip = capability == 75 || three_products_beat_one(capability);
  if (products < (fma || !large_chip ? 1e6 : 2e6)) return Algorithm::fused;

  // Tiles lie in one image, or in a batch of rows. cuDNN's rows run over images.
  if (share <= 0.5) return Algorithm::cudnn;

  // Backward a column of the tiles is a channel: 16 at least.
  if (backward && c.C < 4) return Algorithm::cudnn;

  // A block goes through all of K by itself. Where multiprocessors have few neurons each, cuDNN
  // shares a long K among blocks.
  if (neurons < 2048 && depth >= 800) return Algorithm::cudnn;

  // Without tensor cores cuDNN's Winograd for 3x3 kernels has 2.25 times fewer products, but
  // only forward. It gains nothing if x has one or two channels, whose products it pads. From 8.6
  // on, though, a multiprocessor has 128 lanes of float32, and our kernels' loads feed no more than
  // 40 % of them.
  const bool winograd = !backward && c.kernel_h == 3 && c.kernel_w == 3 && c.stride_h == 1 &&
                        c.stride_w == 1 && c.dilation_h == 1 && c.dilation_w == 1;
  if (fma && c.Cin > 2 && (winograd || capability >= 80)) return Algorithm::cudnn;

  // On 9.0 and 10.x mma.sync reaches half to two thirds of the rate of wgmma and tcgen05, which
  // cuDNN uses. That matters if channels are many and our products take longer than the launches
  // around cuDNN, some 40 us: a multiprocessor computes 0.85 million products a us in tf32, and 1.4
  // million in half types. 3xTF32 beats cuDNN's float32 without tensor cores.
  const bool half = gate_type(c.dtype, matrix) != DType::float32;
  if (capability >= 90 && capability < 120 && channels >= 96 && !fma && !tf32x3 &&
      products > (half ? 56e6 : 34e6))
    return Algorithm::cudnn;

  return Algorithm::fused;
}

}  // namespace rules

}  // namespace snnlstm::cuda
