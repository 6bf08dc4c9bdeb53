// One block at a time: its threads are fibers, resumed in a chosen order until all have returned. Barriers and warp
// collectives suspend a thread until the others have come; what can never complete is an error.
#pragma once

#include <vector_types.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>

#include "shared_memory.hpp"

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

constexpr int max_atomics = 64;

// random: threads and blocks are shuffled; in about half of the blocks one warp runs as far as it can before the next.
enum class ThreadOrder : std::uint8_t { forward, reverse, random };

struct Counters {
  std::uint64_t launches, blocks, threads, switches;
};

struct Site {  // in the source
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
  std::uint32_t present, returned, arrived;  // one bit a lane
  int n_syncwarps;
  // What each lane brought to the collective that it waits in, and what it takes away.
  struct Call {
    std::uint32_t mask;
    Collective kind;
    int source_lane;
    std::uint64_t value, result;
    void* departure;
  } calls[warp_size];
};

// To ThreadSanitizer a fiber is one thread for ever, and a barrier orders all of its block. So blocks take turns with
// disjoint sets of fibers: those that do not share a set stay unordered, and races between them show.
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
  int votes, vote_result;      // of __syncthreads_count and its kin
  Site barrier;                // where those at the barrier wait
  void* atomics[max_atomics];  // the latest addresses of atomic operations
  int n_atomics;
  Thread* current;
  uint3 thread_index;  // the current one's
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

// From a thread: gives up on the launch, which throws the message.
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

// From the scheduler, about a thread.
[[gnu::format(printf, 2, 3)]] ONEPASS_HOST_UNCHECKED inline void fail_thread(Thread& thread, const char* format, ...) {
  machine.current = &thread;
  va_list values;
  va_start(values, format);
  set_error(format, values);
  va_end(values);
}

// ---- what threads wait for --------------------------------------------------------------------------------------

// __syncthreads and its kin: how many threads voted yes.
ONEPASS_HOST_UNCHECKED inline int block_barrier(Site site, bool vote) {
  Machine& m = machine;
  Thread& me = *m.current;
  // Two in turn: whoever leaves a barrier late must not be ordered after those who are at the next one already.
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

// The last lane has come: everyone's result.
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

// Every lane of the mask brings a value; it gets the value of source_lane (shuffle), one bit of every lane (vote), or
// nothing but order (syncwarp: the only one that orders memory accesses).
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

// How blocks hand over data, as ThreadSanitizer is told: what a thread did before its fence and a following atomic
// operation on an address comes before what another does after its atomic operation on that address and a fence. Behind
// a barrier that fence may be of any thread of the block, as fence.sc of PTX has it, hence one list a block.
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
// Within a block all fences are taken to be ordered as they ran.
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

// ---- the scheduler ----------------------------------------------------------------------------------------------

ONEPASS_HOST_UNCHECKED inline void thread_returned() {
  Thread& me = *machine.current;
  Warp& warp = machine.warps[me.rank / warp_size];
  const std::uint32_t bit = 1u << me.rank % warp_size;
  if (machine.n_at_barrier > 0)
    fail("returned, but %d threads of the block wait at __syncthreads (%s:%d)", machine.n_at_barrier,
         machine.barrier.file, machine.barrier.line);
  for (int lane = 0; lane < warp_size; ++lane)
    if (warp.arrived >> lane & 1 && warp.calls[lane].mask & bit)
      fail("returned, but lane %d of its warp waits for it in a warp collective with mask %08x", lane,
           warp.calls[lane].mask);
  me.status = Status::returned;
  warp.returned |= bit;
  --machine.n_running;
}

// What each fiber runs.
ONEPASS_HOST_UNCHECKED inline void thread_main() {
  arrived_on_new_fiber();
  acquire(&machine.starts);
  char message[256];
  bool threw = true;
  try {
    machine.body(machine.arguments);
    threw = false;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
  }
  if (threw) fail("exception: %s", message);  // from outside the handler: nobody returns to it
  thread_returned();
  suspend(*machine.current->fiber, true);
}

ONEPASS_HOST_UNCHECKED inline std::uint32_t random_below(std::uint32_t n) {  // xorshift64
  std::uint64_t& x = machine.random_state;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return static_cast<std::uint32_t>((x >> 32) * n >> 32);
}

ONEPASS_HOST_UNCHECKED inline void arrange(std::uint32_t* items, std::uint32_t n) {
  for (std::uint32_t i = 0; i < n; ++i) items[i] = machine.order == ThreadOrder::reverse ? n - 1 - i : i;
  if (machine.order != ThreadOrder::random) return;
  for (std::uint32_t i = n; i > 1; --i) {
    const std::uint32_t j = random_below(i), item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

// Lets a thread run until it waits or returns; false if it cannot.
ONEPASS_HOST_UNCHECKED inline bool run(Thread& thread) {
  if (thread.status != Status::ready || machine.failed) return false;
  machine.current = &thread;
  machine.thread_index = thread.index;
  ++machine.counters.switches;
  resume(*thread.fiber);
  return true;
}

ONEPASS_HOST_UNCHECKED inline bool run_all_once() {
  std::uint32_t ranks[max_threads];
  arrange(ranks, machine.n_threads);
  bool any = false;
  for (int i = 0; i < machine.n_threads; ++i) any |= run(machine.threads[ranks[i]]);
  return any;
}

ONEPASS_HOST_UNCHECKED inline bool run_warps_ahead() {
  std::uint32_t warps[max_threads / warp_size];
  const int n_warps = (machine.n_threads + warp_size - 1) / warp_size;
  arrange(warps, n_warps);
  bool any = false;
  for (int w = 0; w < n_warps; ++w) {
    const int first = warps[w] * warp_size;
    for (bool again = true; again; any |= again) {
      again = false;
      for (int rank = first; rank < first + warp_size && rank < machine.n_threads; ++rank)
        again |= run(machine.threads[rank]);
    }
  }
  return any;
}

ONEPASS_HOST_UNCHECKED inline void begin_block(std::uint64_t number) {
  Machine& m = machine;
  m.block_index.x = number % m.grid_size.x;
  m.block_index.y = number / m.grid_size.x % m.grid_size.y;
  m.block_index.z = static_cast<unsigned>(number / (std::uint64_t{m.grid_size.x} * m.grid_size.y));
  m.shared.begin_block(m.dynamic_shared, m.more_shared_allowed);
  m.n_running = m.n_threads;
  m.n_at_barrier = m.n_barriers = m.votes = m.n_atomics = 0;
  for (int first = 0; first < m.n_threads; first += warp_size) {
    Warp& warp = m.warps[first / warp_size];
    const int lanes = m.n_threads - first < warp_size ? m.n_threads - first : warp_size;
    warp.present = ~0u >> (warp_size - lanes);
    warp.returned = warp.arrived = 0;
    warp.n_syncwarps = 0;
  }
  const int first_fiber = static_cast<int>(m.counters.blocks % m.n_fiber_sets) * m.n_threads;
  for (int rank = 0; rank < m.n_threads; ++rank) {
    Thread& thread = m.threads[rank];
    thread.fiber = &m.fibers[first_fiber + rank];
    thread.rank = rank;
    thread.status = Status::ready;
    thread.fenced = false;
    thread.index.x = rank % m.block_size.x;
    thread.index.y = rank / m.block_size.x % m.block_size.y;
    thread.index.z = rank / (m.block_size.x * m.block_size.y);
    prepare(*thread.fiber, thread_main);
  }
  ++m.counters.blocks;
  m.counters.threads += m.n_threads;
  release(&m.starts);
}

// All that the threads did comes before what follows, blocks still to run included: the fewer of these, the more races
// between blocks show.
ONEPASS_HOST_UNCHECKED inline void join() {
  for (int i = 0; i < machine.n_fiber_sets * machine.n_threads; ++i) release_from(machine.fibers[i], &machine.ends);
  acquire(&machine.ends);
  machine.shared.free_retired();
}

ONEPASS_HOST_UNCHECKED inline void run_block(std::uint64_t number) {
  begin_block(number);
  const bool warps_ahead = machine.order == ThreadOrder::random && random_below(2) == 1;
  while (machine.n_running > 0 && !machine.failed) {
    if (warps_ahead ? run_warps_ahead() : run_all_once()) continue;
    int waiting = 0;
    while (machine.threads[waiting].status == Status::returned) ++waiting;
    fail_thread(machine.threads[waiting], "deadlock: waits at %s; %d threads are at __syncthreads, %d have returned",
                machine.threads[waiting].status == Status::at_block_barrier ? "__syncthreads" : "a warp collective",
                machine.n_at_barrier, machine.n_threads - machine.n_running);
  }
  if (!machine.failed && !machine.shared.intact())
    fail_thread(machine.threads[0], "the block wrote beyond the end of a shared array");
  machine.shared.end_block();
  if (machine.shared.should_join() || machine.failed) join();
  if (machine.failed)
    for (int rank = 0; rank < machine.n_threads; ++rank) abandon(*machine.threads[rank].fiber);
}

}  // namespace onepass::cuda_on_host
#pragma GCC visibility pop
