// g++ calls these functions before every access to memory (-fsanitize=thread) and on errors
// (-fsanitize=bounds, signed-integer-overflow and others). They report to the emulator, and take
// the place of the sanitisers' own libraries.
#include <cstddef>
#include <cstdint>
#include <string>

#include "checks.h"
#include "machine.h"

using simt::Access;

namespace {

// Most accesses go to the thread's own stack, whose contents are in registers on a GPU.
__attribute__((always_inline)) inline void note(void* p, size_t bytes, Access kind,
                                                const void* pc) {
  simt::Thread* thread = simt::machine().current;
  if (thread == nullptr) return;
  const auto offset = size_t(static_cast<const char*>(p) - thread->fibre.low());
  if (offset < size_t(thread->fibre.high() - thread->fibre.low())) return;
  simt::access(*thread, p, bytes, kind, pc);
}

struct SourceLocation {  // of the sanitisers' interface
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void stop(const char* what, const void* data, const std::string& details = "") {
  const auto& where = *static_cast<const SourceLocation*>(data);
  simt::Machine& m = simt::machine();
  const std::string text =
      std::string(what) + details + " at " + where.file + ":" + std::to_string(where.line);
  if (m.current == nullptr) {
    std::fprintf(stderr, "%s\n", text.c_str());
    std::abort();
  }
  m.fail(text + ", in " + m.name(*m.current));
}

}  // namespace

#define SIMT_HOOK(name, bytes, kind)                           \
  extern "C" void __tsan_##name(void* p) {                     \
    note(p, bytes, Access::kind, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(bytes)                       \
  SIMT_HOOK(read##bytes, bytes, read)           \
  SIMT_HOOK(write##bytes, bytes, write)         \
  SIMT_HOOK(unaligned_read##bytes, bytes, read) \
  SIMT_HOOK(unaligned_write##bytes, bytes, write)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_read_range(void* p, size_t bytes) {
  note(p, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  note(p, bytes, Access::write, __builtin_return_address(0));
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(void* data, uintptr_t index) {
  stop("index out of bounds: ", data, std::to_string(intptr_t(index)));
}
#define SIMT_STOP(handler, what) \
  [[noreturn]] void __ubsan_handle_##handler##_abort(void* data, void*, void*) { stop(what, data); }
SIMT_STOP(add_overflow, "signed overflow in an addition")
SIMT_STOP(sub_overflow, "signed overflow in a subtraction")
SIMT_STOP(mul_overflow, "signed overflow in a multiplication")
SIMT_STOP(negate_overflow, "signed overflow in a negation")
SIMT_STOP(divrem_overflow, "division by zero or overflow in a division")
SIMT_STOP(shift_out_of_bounds, "shift by a negative or too large number")
}
