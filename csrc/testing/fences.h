// Memory between the pieces of a workspace that AddressSanitizer lets nobody touch, in the
// sanitizers' build (tools/instrumented.py), which defines SNNLSTM_FENCES. Elsewhere there is none.
#pragma once

#include "../cpu/kernels/simd.h"
#if SNNLSTM_FENCES
#include <sanitizer/asan_interface.h>
#endif

SNNLSTM_BEGIN_ISA

#if SNNLSTM_FENCES
constexpr int64_t kFence = 128;
inline void fence(void* begin, int64_t bytes) { __asan_poison_memory_region(begin, size_t(bytes)); }
#else
constexpr int64_t kFence = 0;
inline void fence(void*, int64_t) {}
#endif

SNNLSTM_END_ISA
