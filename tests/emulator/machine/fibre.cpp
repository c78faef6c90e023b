#include "fibre.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#define SIMT_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#if defined(SIMT_ASSEMBLY)
// In the System V ABI a callee keeps rbx, rbp, r12 to r15 and the stack pointer. All fibres have
// the same floating point control words.
extern "C" void simt_switch(void** save, void* next);
extern "C" void simt_start();
asm(R"(
.text
.type simt_switch,@function
.hidden simt_switch
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
.type simt_start,@function
.hidden simt_start
.globl simt_start
simt_start:
  movq %r12, %rdi
  callq *%r13
  ud2
.size simt_start,.-simt_start
)");
#endif

namespace simt {

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
#if !defined(SIMT_ASSEMBLY)
  state_ = std::malloc(sizeof(ucontext_t));
#endif
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

#if defined(SIMT_ASSEMBLY)

void Fibre::prepare(void (*entry)(void*), void* argument) {
  auto* stack = reinterpret_cast<void**>(high_);
  *--stack = nullptr;  // keeps the stack pointer 16-byte aligned at simt_start's call
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(simt_start);
  *--stack = nullptr;                         // rbp
  *--stack = nullptr;                         // rbx
  *--stack = argument;                        // r12
  *--stack = reinterpret_cast<void*>(entry);  // r13
  *--stack = nullptr;                         // r14
  *--stack = nullptr;                         // r15
  state_ = stack;
}

static void swap(void** from, void* to) { simt_switch(from, to); }

#else

static void trampoline(unsigned a, unsigned b, unsigned c, unsigned d) {
  const auto entry = reinterpret_cast<void (*)(void*)>(uintptr_t(a) | uintptr_t(b) << 32);
  entry(reinterpret_cast<void*>(uintptr_t(c) | uintptr_t(d) << 32));
}

void Fibre::prepare(void (*entry)(void*), void* argument) {
  auto* context = static_cast<ucontext_t*>(state_);
  getcontext(context);
  context->uc_stack.ss_sp = low_;
  context->uc_stack.ss_size = size_t(high_ - low_);
  context->uc_link = nullptr;
  const auto e = reinterpret_cast<uintptr_t>(entry), v = reinterpret_cast<uintptr_t>(argument);
  makecontext(context, reinterpret_cast<void (*)()>(trampoline), 4, unsigned(e), unsigned(e >> 32),
              unsigned(v), unsigned(v >> 32));
}

static void swap(void** from, void* to) {
  if (*from == nullptr) *from = std::malloc(sizeof(ucontext_t));  // the scheduler's own
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

#endif

void switch_fibre(Fibre& from, Fibre& to) { swap(&from.state_, to.state_); }

}  // namespace simt
