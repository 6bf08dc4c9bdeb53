// The threads of a block and what they wait for: barriers and warp collectives suspend a thread until the others have
// arrived; one that can never complete is an error. scheduler.hpp runs them.
#pragma once

#include <vector_types.h>

#include <cstdarg>
#include <cstdio>

#include "shared_memory.hpp"

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

constexpr int max_atomics = 64;

// random: threads and blocks are shuffled; in about half of the blocks each warp runs as far as it can before the next.
enum class ThreadOrder : std::uint8_t { forward, reverse, random };

struct Counters {
  std::uint64_t launches, blocks, threads, switches;
};

struct Site {  // a place in the source
  const char* file;
  int line;
  bool operator!=(const Site& other) const { return line != other.line || std::strcmp(file, other.file) != 0; }
};

enum class Status : std::uint8_t { ready, at_block_barrier, at_warp_collective, returned };

struct Thread {
  Fiber* fiber;
  uint3 index;  // threadIdx
  int rank;     // within the block
  Status status;
  bool fenced;
};

enum class Collective : std::uint8_t { syncwarp, shuffle, vote };

struct Warp {
  std::uint32_t present, returned, arrived;  // one bit per lane
  int n_syncwarps;
  // The value that each lane passes to the collective it waits in, and the result it receives.
  struct Call {
    std::uint32_t mask;
    Collective kind;
    int source_lane;
    std::uint64_t value, result;
    void* departure;
  } calls[warp_size];
};

// To ThreadSanitizer a fiber is the same thread forever, and a barrier orders its whole block. Blocks therefore
// alternate between disjoint sets of fibers: blocks of different sets stay unordered, so that races between them are
// detected.
#if defined(__SANITIZE_THREAD__)
constexpr int max_fibers = 2 * max_threads;
constexpr int fiber_sets(int n_threads) { return n_threads > 256 ? 2 : 4; }  // a fiber costs 0.8 MB and 0.5 ms there
#else
constexpr int max_fibers = max_threads;
constexpr int fiber_sets(int) { return 1; }
#endif

struct Machine {
  // The launch.
  const char* kernel;
  void (*body)(void*);
  void* arguments;
  dim3 grid_size, block_size;
  std::size_t dynamic_shared;
  bool more_shared_allowed;
  int n_threads, n_fiber_sets;
  // The block.
  uint3 block_index;
  Thread threads[max_threads];
  Warp warps[max_threads / warp_size];
  SharedMemory shared;
  int n_running, n_at_barrier, n_barriers;
  int votes, vote_result;      // of __syncthreads_count and its variants
  Site barrier;                // where the threads at the barrier wait
  void* atomics[max_atomics];  // the latest addresses of atomic operations
  int n_atomics;
  Thread* current;
  uint3 thread_index;  // of the current thread
  // Both.
  Fiber fibers[max_fibers];
  ThreadOrder order;
  std::uint64_t random_state;
  bool failed;
  char error[768];
  Counters counters;
  char starts, ends;  // addresses for release() and acquire()
};
inline Machine machine{};

// ---- errors -----------------------------------------------------------------------------------------------------

ONEPASS_HOST_UNCHECKED inline void set_error(const char* format, va_list values) {
  char message[512];
  std::vsnprintf(message, sizeof message, format, values);
  const uint3 b = machine.block_index, t = machine.current->index;
  std::snprintf(machine.error, sizeof machine.error, "%s: block (%u, %u, %u), thread (%u, %u, %u): %s", machine.kernel,
                b.x, b.y, b.z, t.x, t.y, t.z, message);
  machine.failed = true;
}

// Called by a thread: aborts the launch, which throws the message.
[[noreturn, gnu::format(printf, 1, 2)]] ONEPASS_HOST_UNCHECKED inline void fail(const char* format, ...) {
  if (machine.current == nullptr) {
    std::fputs("cuda_on_host: a device function was called outside of a kernel\n", stderr);
    std::abort();
  }
  va_list values;
  va_start(values, format);
  set_error(format, values);
  va_end(values);
  suspend(*machine.current->fiber, true);
  std::abort();
}

// Called by the scheduler, about a thread.
[[gnu::format(printf, 2, 3)]] ONEPASS_HOST_UNCHECKED inline void fail_thread(Thread& thread, const char* format, ...) {
  machine.current = &thread;
  va_list values;
  va_start(values, format);
  set_error(format, values);
  va_end(values);
}

// ---- what threads wait for --------------------------------------------------------------------------------------

// __syncthreads and its variants: the number of threads that voted yes.
ONEPASS_HOST_UNCHECKED inline int block_barrier(Site site, bool vote) {
  Machine& m = machine;
  Thread& me = *m.current;
  // Two alternate: a thread that leaves a barrier late must not be ordered after threads already at the next one.
  void* const sync = m.shared.sync(barrier_syncs + m.n_barriers % 2);
  release(sync);
  if (m.n_running != m.n_threads)
    fail("__syncthreads at %s:%d, but %d threads of the block have returned", site.file, site.line,
         m.n_threads - m.n_running);
  if (m.n_at_barrier == 0) m.barrier = site;
  if (m.barrier != site)
    fail("divergent __syncthreads: this thread is at %s:%d, others wait at %s:%d", site.file, site.line, m.barrier.file,
         m.barrier.line);
  m.votes += vote;
  if (++m.n_at_barrier < m.n_threads) {
    me.status = Status::at_block_barrier;
    suspend(*me.fiber);
  } else {
    for (int i = 0; i < m.n_threads; ++i) m.threads[i].status = Status::ready;
    m.vote_result = m.votes;
    m.n_at_barrier = m.votes = 0;
    ++m.n_barriers;
  }
  acquire(sync);
  return m.vote_result;
}

// The last lane has arrived: computes the result of every lane.
ONEPASS_HOST_UNCHECKED inline void complete(Warp& warp, std::uint32_t mask, Collective kind, int first_rank) {
  const int warp_sync = warp_syncs + first_rank / warp_size * syncs_per_warp;
  void* const departure = machine.shared.sync(warp_sync + warp_size + warp.n_syncwarps++ % warp_size);
  std::uint32_t ballot = 0;
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Warp::Call& call = warp.calls[lane];
    if (call.mask != mask || call.kind != kind)
      fail("lane %d came to a warp collective with mask %08x, this thread to %s with mask %08x", lane, call.mask,
           call.kind == kind ? "the same" : "another", mask);
    if (kind == Collective::shuffle && !(mask >> call.source_lane & 1))
      fail("shuffle: lane %d reads lane %d, which is not in mask %08x", lane, call.source_lane, mask);
    ballot |= static_cast<std::uint32_t>(call.value & 1) << lane;
    if (kind == Collective::syncwarp) acquire(machine.shared.sync(warp_sync + lane));
  }
  if (kind == Collective::syncwarp) release(departure);
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Warp::Call& call = warp.calls[lane];
    call.result = kind == Collective::shuffle ? warp.calls[call.source_lane].value : ballot;
    call.departure = departure;
    machine.threads[first_rank + lane].status = Status::ready;
  }
  warp.arrived &= ~mask;
}

// Every lane of the mask passes a value and receives the value of source_lane (shuffle), one bit of every lane (vote),
// or only an ordering (syncwarp, the only one that orders memory accesses).
ONEPASS_HOST_UNCHECKED inline std::uint64_t warp_collective(std::uint32_t mask, Collective kind, int source_lane,
                                                            std::uint64_t value) {
  Thread& me = *machine.current;
  const int lane = me.rank % warp_size, warp_index = me.rank / warp_size;
  Warp& warp = machine.warps[warp_index];
  if (!(mask >> lane & 1)) fail("warp collective: this thread is lane %d, which is not in mask %08x", lane, mask);
  if (mask & ~warp.present) fail("warp collective: mask %08x, but the warp has lanes %08x", mask, warp.present);
  if (mask & warp.returned) fail("warp collective: lanes %08x of the mask have returned", mask & warp.returned);
  Warp::Call& call = warp.calls[lane];
  call = {mask, kind, source_lane, value, 0, nullptr};
  if (kind == Collective::syncwarp) release(machine.shared.sync(warp_syncs + warp_index * syncs_per_warp + lane));
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) == mask) {
    complete(warp, mask, kind, me.rank - lane);
  } else {
    me.status = Status::at_warp_collective;
    suspend(*me.fiber);
  }
  if (kind == Collective::syncwarp) acquire(call.departure);
  return call.result;
}

// How blocks hand over data, as ThreadSanitizer is told: accesses of a thread before its fence and a following atomic
// operation on an address happen before accesses of another thread after its atomic operation on that address and a
// fence. After a barrier that fence may be any thread's of the block, as with fence.sc of PTX, hence one list per
// block.
ONEPASS_HOST_UNCHECKED inline void note_atomic([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  Machine& m = machine;
  if (m.current->fenced) release(address);
  const int n = m.n_atomics < max_atomics ? m.n_atomics : max_atomics;
  for (int i = 0; i < n; ++i)
    if (m.atomics[i] == address) return;
  m.atomics[m.n_atomics++ % max_atomics] = address;
#endif
}
ONEPASS_HOST_UNCHECKED inline void device_fence() {
  Machine& m = machine;
  for (int i = 0; i < m.n_atomics && i < max_atomics; ++i) acquire(m.atomics[i]);
  m.current->fenced = true;
}
// Within a block all fences count as ordered in the order in which they ran.
ONEPASS_HOST_UNCHECKED inline void block_fence() {
  acquire(machine.shared.sync(block_fence_sync));
  release(machine.shared.sync(block_fence_sync));
}

ONEPASS_HOST_UNCHECKED inline void require_aligned(const volatile void* address, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0)
    fail("misaligned address %p for an access of %zu bytes", const_cast<const void*>(address), alignment);
}

ONEPASS_HOST_UNCHECKED inline void* static_shared(const void* tag, std::size_t bytes) {
  void* const memory = machine.shared.static_array(tag, bytes);
  if (memory == nullptr)
    fail(
        "%zu bytes of static and dynamic shared memory; the limit is %zu in all, %zu static, unless "
        "allow_dynamic_shared() was called",
        machine.shared.total_bytes(), machine.more_shared_allowed ? shared_limit : default_shared_limit,
        default_shared_limit);
  return memory;
}

ONEPASS_HOST_UNCHECKED inline void* dynamic_shared() { return machine.shared.dynamic(); }

}  // namespace onepass::cuda_on_host
#pragma GCC visibility pop
