// Seeded faults: the tests break a kernel at such a place on purpose and must notice it.
//
//   if (!fault(Fault::no_chunk_wait)) cp_async_wait<0>();
//   const int row = y + dy - pad + (fault(Fault::wrong_mma_halo) ? 1 : 0);
//
// fault() is the constant `false` in every build except the emulation with -DSNNLSTM_FAULT_SWITCH,
// which chooses one fault at run time. Therefore it stands in `if` and `?:`, not in `if constexpr`.
// Each fault has one place.
#pragma once

namespace snnlstm::cuda {

enum class Fault : int {
  none,
  // Data is used before the wait for its copy.
  no_chunk_wait,
  no_weight_tile_wait,
  // No barrier stands between a write of shared memory and others' reads.
  no_chunk_barrier,
  no_weight_tile_barrier,
  no_fma_chunk_barrier,
  no_vectors_barrier,
  no_bias_barrier,
  // Nothing stands between reads and the next overwrite.
  no_reuse_barrier,
  wrong_fma_buffer,
  // An index is off by one, or of another dimension.
  wrong_mma_halo,
  wrong_source_halo,
  wrong_fma_halo,
  wrong_fragment_row,
  wrong_tail_mask,
  wrong_row_stride,
  wrong_tap_stride,
  // Something is skipped, or changes places.
  no_border_zeros,
  no_reset,
  swapped_gates,
  lost_part,
  lost_totals,
  lost_bias_row,
  // Wrong numbers, which benchmarks/gpu_smoke.py must notice.
  wrong_mem_buffer,
  early_syn_forward,
  early_syn_backward,
  lost_taps,
  early_leaky_x,
  early_leaky_gradient,
  no_scalar_leaky_spikes,
  one_leaky_threshold,
  one_leaky_feature,
  // The same, on ways that some users' calls take.
  lost_last_gradient,
  first_tile_column,
  first_chunk,
  first_input_chunk,
  unturned_kernel,
  unjoined_rows,
  untrimmed_kernel,
  no_graded_factor,
  narrow_argmax,
  lost_levels,
};

#if defined(SNNLSTM_FAULT_SWITCH) && !defined(__CUDACC__)

extern int chosen_fault;  // defined by the emulation

inline bool fault(Fault which) { return int(which) == chosen_fault; }

#else

#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr bool fault(Fault) {
  return false;
}

#endif

}  // namespace snnlstm::cuda
