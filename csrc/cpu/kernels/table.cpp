// Lists this instruction set's entry points for ../dispatch.cpp, and defines the small ones.
#include "../api.h"
#include "entry.h"
#include "lanes.h"
#include "look.h"
#include "pack.h"
#include "sparse.h"

SNNLSTM_BEGIN_ISA

static int64_t padded_channels(const Cell& cell) {
  return with_lanes(cell, [&](auto lanes) {
    constexpr int VL = decltype(lanes)::count;
    return (cell.C + VL - 1) / VL * VL;
  });
}

static bool has_tiles(const Cell& c) {
  return with_lanes(c, [](auto lanes) {
    using L = decltype(lanes);
    return kHasWinograd<typename L::Scalar, L::count>;
  });
}

static double sparse_cost(const Cell& cell, double density) {
  return with_lanes(cell, [&](auto lanes) {
    const typename decltype(lanes)::template Of<Layout> l(cell);
    const typename decltype(lanes)::template Of<SparseInput> sparse(l, l.strip_rows());
    return sparse.fits() ? sparse.cycles(density) / sparse.direct_cycles() : double(INFINITY);
  });
}

using cpu::Form;

static int64_t packed_bytes(const Cell& cell, Form form) {
  return with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    const typename L::template Of<Layout> l(cell);
    const int64_t tiles = l.tile_weights() * 4 * l.Cp;
    const int64_t counts[] = {l.packed_forward(),  tiles * cell.C, tiles * cell.Cin,
                              l.packed_backward(), tiles * l.Cp,   tiles * l.x.blocks * L::count};
    return counts[int(form)] * int64_t(sizeof(typename L::Scalar));
  });
}

static void pack_weight(const Cell& cell, Form form, int threads, const void* weight,
                        void* packed) {
  with_lanes(cell, [&](auto lanes) {
    using L = decltype(lanes);
    using T = typename L::Scalar;
    using P = Packing<T, L::count>;
    const Layout<T, L::count> l(cell);
    const T* from = static_cast<const T*>(weight);
    T* to = static_cast<T*>(packed);
    if (form == Form::forward) return P::forward(l, threads, from, to);
    if (form == Form::backward) return P::backward(l, threads, from, to);
    if constexpr (kHasWinograd<T, L::count>) switch (form) {
        case Form::forward_mem_tiles:
          return P::forward_tiles(l, threads, from, cell.Cin, cell.C, to);
        case Form::forward_x_tiles:
          return P::forward_tiles(l, threads, from, 0, cell.Cin, to);
        case Form::backward_mem_tiles:
          return P::backward_tiles(l, threads, from, cell.Cin, cell.C, l.Cb, to);
        case Form::backward_x_tiles:
          return P::backward_tiles(l, threads, from, 0, cell.Cin, l.x.blocks, to);
        default:
          return;
      }
  });
}

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {has_tiles,
                              sparse_cost,
                              look_at,
                              forward_workspace,
                              backward_workspace,
                              padded_channels,
                              packed_bytes,
                              pack_weight,
                              forward,
                              backward,
                              convolve,
                              convolution_workspace,
                              leaky_forward,
                              leaky_backward,
                              pool_forward,
                              pool_backward,
                              batch_norm_workspace,
                              batch_norm_forward,
                              batch_norm_backward,
                              linear_look,
                              linear_bytes,
                              linear_pack,
                              linear_workspace,
                              linear_forward,
                              linear_backward,
#if SNNLSTM_TESTING
                              evaluate
#endif
};

SNNLSTM_END_ISA
