// Ends a long call of the kernels before its time.
#pragma once

namespace snnlstm::cpu {

struct Interruption {
  // The calling thread calls look() before each phase of a call. look() may set stop.
  void (*look)(Interruption&) = nullptr;
  // Once stop is 1 no thread begins another task: the call returns with unfinished results.
  int stop = 0;
};

// The interruption of this thread's calls. Without one (null) they run to their end.
inline thread_local Interruption* interruption = nullptr;

}  // namespace snnlstm::cpu
