// Seeded faults: the tests break a kernel at such a place on purpose, and must notice it.
//
//   if (!fault(Fault::missing_wait)) cp_async_wait<0>();
//   const int row = y + dy - pad + (fault(Fault::wrong_halo) ? 1 : 0);
//
// fault() is the constant `false` in every build but the emulation's with -DSNNLSTM_FAULT_SWITCH,
// which chooses one fault at run time; so it stands in `if` and `?:`, not in `if constexpr`. The
// places of one kind of fault are numbered: fault(Fault::missing_wait, 1).
#pragma once

namespace snnlstm::cuda {

enum class Fault : int {
  none = 0,
  missing_wait = 1,               // data is used before the wait for its cp.async or its launch
  missing_barrier_read = 2,       // no barrier between a write of shared memory and others' reads
  missing_barrier_overwrite = 3,  // no barrier between reads and the next overwrite
  missing_syncwarp = 4,           // lanes of a warp exchange data without __syncwarp
  wrong_halo = 5,                 // an index into the neighbourhood off by one
  wrong_tail_mask = 6,            // the mask of the last, partial tile is off by one
  swapped_gates = 7,              // two of the four gates change places
  wrong_fragment_row = 8,         // an accumulator is taken for that of another row
  missing_zero_fill = 9,          // padding is left as it was
  wrong_split_k = 10,             // a part of the split sum is dropped or counted twice
  wrong_stride = 11,              // a stride of another dimension
  missing_reset = 12,             // the reset of the membrane potential is left out
};

#if defined(SNNLSTM_FAULT_SWITCH) && !defined(__CUDACC__)

// Defined by the emulation.
extern int chosen_fault, chosen_fault_place;

inline bool fault(Fault which, int place = 0) {
  return int(which) == chosen_fault && place == chosen_fault_place;
}

#else

#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr bool fault(Fault, int = 0) {
  return false;
}

#endif

}  // namespace snnlstm::cuda
