// Counts the time of a part of the kernels (../profile.h).
#pragma once

#include "../../platform.h"
#include "../profile.h"
#include "simd.h"

SNNLSTM_BEGIN_ISA

using cpu::Part;

// The time from its beginning to its end. Spans of named parts do not overlap in a thread. Without
// a profile a span costs two predictable branches.
class Span {
 public:
  explicit SNNLSTM_INLINE Span(Part part) : profile_(cpu::profile), part_(part) {
    if (profile_) begin_ = nanoseconds();
  }
  SNNLSTM_INLINE ~Span() { end(); }
  SNNLSTM_INLINE void end() {
    if (profile_)
      __atomic_fetch_add(&profile_->spent[int(part_)], nanoseconds() - begin_, __ATOMIC_RELAXED);
    profile_ = nullptr;
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  cpu::Profile* profile_;
  Part part_;
  int64_t begin_ = 0;
};

SNNLSTM_END_ISA
