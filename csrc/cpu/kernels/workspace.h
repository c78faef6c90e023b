// The memory of a pass, cut into pieces.
#pragma once

#include "simd.h"
#if SNNLSTM_FENCES
#include <sanitizer/asan_interface.h>
#endif

SNNLSTM_BEGIN_ISA

// Only the build with AddressSanitizer (tools/instrumented.py) has fences between pieces, which no
// code may touch.
#if SNNLSTM_FENCES
constexpr int64_t kFence = 128;
inline void fence(void* begin, int64_t bytes) { __asan_poison_memory_region(begin, size_t(bytes)); }
#else
constexpr int64_t kFence = 0;
inline void fence(void*, int64_t) {}
#endif

// Hands out pieces of one allocation, each on a cache line of its own. A workspace without memory
// only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t size = count * int64_t(sizeof(T));
    const int64_t whole = ((size + 63) & ~int64_t(63)) + kFence;
    char* p = base_ ? base_ + (-reinterpret_cast<uintptr_t>(base_) & 63) + used_ : nullptr;
    if (p) fence(p + size, whole - size);
    used_ += whole;
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return used_ + 64; }

 private:
  char* base_;
  int64_t used_ = 0;
};

SNNLSTM_END_ISA
