// Fibers: many stacks on one operating-system thread, switched by hand. AddressSanitizer is told which stack runs; to
// ThreadSanitizer every fiber is a separate thread, ordered with the others only by the calls below.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__) || defined(ONEPASS_HOST_UCONTEXT)
#define ONEPASS_HOST_USE_UCONTEXT 1
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// All fibers share the scheduler's state without a lock, because only one runs at a time. Its functions are hidden from
// the sanitizers, which are to check the kernels only. For the same reason it uses plain arrays: functions of the
// standard library would be instrumented.
#define ONEPASS_HOST_UNCHECKED __attribute__((no_sanitize("address", "thread")))

#pragma GCC visibility push(hidden)  // two extensions in one process have a machine each
namespace onepass::cuda_on_host {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t stack_bytes = 256 << 10;
#else
constexpr std::size_t stack_bytes = 128 << 10;
#endif
constexpr std::size_t page_bytes = 4096;

// What is needed to switch back to a stack.
struct Context {
#if defined(ONEPASS_HOST_USE_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer;
#endif
  void* asan_fake_stack;
  void* tsan_fiber;
};

struct Fiber : Context {
  char* stack;  // lowest address; null until first used
};

// The stack on which launch() was called and which resumes the fibers.
struct Home : Context {
  const void* stack;
  std::size_t stack_size;
};
inline Home home;

#if !defined(ONEPASS_HOST_USE_UCONTEXT)
// Saves the callee-saved registers, changes stacks and returns on the other one. noipa: the compiler must not look
// inside and conclude that the other registers survive.
__attribute__((naked, noinline, noipa)) ONEPASS_HOST_UNCHECKED inline void switch_stacks(void** /*save: rdi*/,
                                                                                         void* /*load: rsi*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}
#endif

ONEPASS_HOST_UNCHECKED inline void switch_context(Context& from, Context& to) {
#if defined(ONEPASS_HOST_USE_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
}

// The first function that runs on a fiber.
ONEPASS_HOST_UNCHECKED inline void arrived_on_new_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.stack_size);
#endif
}

// Home -> fiber. Returns when the fiber suspends.
ONEPASS_HOST_UNCHECKED inline void resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&home.asan_fake_stack, fiber.stack, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  constexpr unsigned without_ordering = 1;
  __tsan_switch_to_fiber(fiber.tsan_fiber, without_ordering);
#endif
  switch_context(home, fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(home.asan_fake_stack, nullptr, nullptr);
#endif
}

// Fiber -> home. Returns when the fiber is resumed; never if it declared itself finished.
ONEPASS_HOST_UNCHECKED inline void suspend(Fiber& fiber, bool finished = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.asan_fake_stack, home.stack, home.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  constexpr unsigned without_ordering = 1;
  __tsan_switch_to_fiber(home.tsan_fiber, without_ordering);
#endif
  switch_context(fiber, home);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &home.stack, &home.stack_size);
#endif
  if (finished) std::abort();
}

// Makes `main` the next function to run on the fiber. It must end with suspend(fiber, true).
ONEPASS_HOST_UNCHECKED inline void prepare(Fiber& fiber, void (*main)()) {
  if (fiber.stack == nullptr) {
    void* const memory = mmap(nullptr, stack_bytes + page_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page_bytes, PROT_NONE);  // an overflow faults here
    fiber.stack = static_cast<char*>(memory) + page_bytes;
#if defined(__SANITIZE_THREAD__)
    fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  fiber.asan_fake_stack = nullptr;
#if defined(ONEPASS_HOST_USE_UCONTEXT)
  getcontext(&fiber.registers);
  fiber.registers.uc_stack.ss_sp = fiber.stack;
  fiber.registers.uc_stack.ss_size = stack_bytes;
  fiber.registers.uc_link = nullptr;
  makecontext(&fiber.registers, main, 0);
#else
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes);
  *--top = nullptr;  // where a return address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(main);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

// Makes a fiber usable again that was abandoned while running: the sanitizers remember frames that will never return.
ONEPASS_HOST_UNCHECKED inline void abandon(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  static_cast<void>(fiber);
}

ONEPASS_HOST_UNCHECKED inline void come_home() {
#if defined(__SANITIZE_THREAD__)
  home.tsan_fiber = __tsan_get_current_fiber();
#endif
}

// Ordering of memory accesses for ThreadSanitizer: accesses before a release of `sync` happen before those after an
// acquire of it. Without ThreadSanitizer these do nothing.
ONEPASS_HOST_UNCHECKED inline void release([[maybe_unused]] void* sync) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(sync);
#endif
}
ONEPASS_HOST_UNCHECKED inline void acquire([[maybe_unused]] void* sync) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(sync);
#endif
}

// The same on behalf of a fiber, called from home.
ONEPASS_HOST_UNCHECKED inline void release_from([[maybe_unused]] Fiber& fiber, [[maybe_unused]] void* sync) {
#if defined(__SANITIZE_THREAD__)
  constexpr unsigned without_ordering = 1;
  if (fiber.stack == nullptr) return;
  __tsan_switch_to_fiber(fiber.tsan_fiber, without_ordering);
  __tsan_release(sync);
  __tsan_switch_to_fiber(home.tsan_fiber, without_ordering);
#endif
}

}  // namespace onepass::cuda_on_host
#pragma GCC visibility pop
