#include "fibre.h"

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace simt {

namespace {

Fibre* next = nullptr;  // the one that is switched to
void* allocating[5];    // where allocate() goes on

// __builtin_longjmp may not stand beside __builtin_setjmp, nor be inlined there.
[[noreturn]] __attribute__((noinline)) void jump(void** registers) {
  __builtin_longjmp(registers, 1);
}

}  // namespace

// The lowest function on each stack. It notes its place for allocate(), and runs what is prepared
// whenever a jump leads there.
void Fibre::bottom() {
  if (__builtin_setjmp(next->bottom_) == 0) jump(allocating);
  next->entry_(next->argument_);
  __builtin_unreachable();
}

void Fibre::allocate(size_t bytes, size_t offset) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t all = (bytes + page - 1) / page * page + page;
  void* p = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no memory for the stack of an emulated thread");
  mprotect(p, page, PROT_NONE);
  low_ = static_cast<char*>(p) + page;
  // Stacks that start at equal offsets of a page would compete for the same cache lines.
  high_ = static_cast<char*>(p) + all - offset % page / 64 * 64;
  // setcontext() asks the system for the signals, so it goes to each stack once.
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = low_;
  context.uc_stack.ss_size = size_t(high_ - low_);
  context.uc_link = nullptr;
  makecontext(&context, bottom, 0);
  next = this;
  if (__builtin_setjmp(allocating) == 0) setcontext(&context);
}

void Fibre::adopt() {
  pthread_attr_t attributes;
  void* low = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &bytes);
  pthread_attr_destroy(&attributes);
  low_ = static_cast<char*>(low);
  high_ = low_ + bytes;
}

void Fibre::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry, argument_ = argument;
  std::copy(bottom_, bottom_ + 5, at_);
}

// A caller must not know which registers this function spares: the other fibre uses them all.
__attribute__((noipa)) void switch_fibre(Fibre& from, Fibre& to) {
  next = &to;
  if (__builtin_setjmp(from.at_) == 0) jump(to.at_);
}

}  // namespace simt
