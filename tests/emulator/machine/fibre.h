// A fibre is a stack that the host thread can switch to. It keeps the stack and the registers that
// a function call preserves.
#pragma once

#include <cstddef>

namespace simt {

class Fibre {
 public:
  // Lowest and highest address of the stack; a page without access lies below it.
  const char* low() const { return low_; }
  const char* high() const { return high_; }

  void allocate(size_t bytes, size_t offset);
  // Makes this the fibre of the host thread's own stack.
  void adopt();
  // The next switch to this fibre calls entry(argument), which must never return.
  void prepare(void (*entry)(void*), void* argument);

 private:
  friend void switch_fibre(Fibre& from, Fibre& to);
  using Registers = void* [5];  // of __builtin_setjmp

  static void bottom();

  char* low_ = nullptr;
  char* high_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  Registers at_ = {}, bottom_ = {};  // where it goes on, and where it starts
};

// Continues in `to`. Returns when something switches back to `from`.
void switch_fibre(Fibre& from, Fibre& to);

}  // namespace simt
