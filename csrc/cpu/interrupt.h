// How a long call of the kernels is ended before its time.
#pragma once

namespace snnlstm::cpu {

struct Interruption {
  // The calling thread calls this before each phase of a call; it may set stop.
  void (*look)(Interruption&) = nullptr;
  // Once this is 1 no thread begins another task: the call returns, its results unfinished.
  int stop = 0;
};

// Of the calls that this thread makes; null: they are not interrupted.
inline thread_local Interruption* interruption = nullptr;

}  // namespace snnlstm::cpu
