// The threads of the process's own OpenMP runtime, which is torch's: found at run time, never linked, never a second
// pool.
#pragma once
#include <cstdint>

namespace onepass::cpu {

// Called once for each thread of a team of n_threads.
using JobBody = void (*)(void* context, int thread, int n_threads);

// Runs body on at most n_threads threads, on the calling one alone where no runtime was found, inside another parallel
// region, or in a forked child, where the parent's threads do not exist.
void run_team(int n_threads, JobBody body, void* context);

// "torch's OpenMP (libgomp.so.1)" or "none": for show_config().
const char* thread_runtime();

// [begin, end): the part of `total` that belongs to a thread; parts are multiples of `grain`, the last one's end is
// total.
inline __attribute__((always_inline)) void part_of(std::int64_t total, std::int64_t grain, int thread, int n_threads,
                                                   std::int64_t& begin, std::int64_t& end) {
  const std::int64_t grains = (total + grain - 1) / grain;
  begin = grains * thread / n_threads * grain;
  end = grains * (thread + 1) / n_threads * grain;
  if (begin > total) begin = total;
  if (end > total) end = total;
}

}  // namespace onepass::cpu
