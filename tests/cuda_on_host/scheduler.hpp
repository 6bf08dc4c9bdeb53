// Runs one block at a time: its threads are fibers, resumed in a chosen order until all have returned.
#pragma once
#include <cstdio>
#include <exception>

#include "block.hpp"

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

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

// The body of each fiber.
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
  if (threw) fail("exception: %s", message);  // outside the handler, because fail() never returns
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

// Lets a thread run until it waits or returns; false if it cannot run.
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

// Orders everything that the threads did before everything that follows, including the blocks still to run: the fewer
// such joins, the more races between blocks are detected.
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
