// The threads of the process's OpenMP runtime, which is torch's. It is found at run time and not linked, so there is
// never a second thread pool.
#pragma once
#include <cstdint>

namespace onepass::cpu {

// Called once per thread.
using JobBody = void (*)(void* context, int thread, int n_threads);

// Runs body on at most n_threads threads. Runs it on the calling thread alone if no runtime was found, inside another
// parallel region, and in a forked child, where the parent's threads do not exist.
void run_parallel(int n_threads, JobBody body, void* context);

// File name of the runtime, "libgomp.so.1" for example, or "none".
const char* thread_runtime();

// A thread's part [begin, end) of `total`. Parts begin at multiples of `grain`; the last one ends at total.
inline __attribute__((always_inline)) void part_of(std::int64_t total, std::int64_t grain, int thread, int n_threads,
                                                   std::int64_t& begin, std::int64_t& end) {
  const std::int64_t grains = (total + grain - 1) / grain;
  begin = grains * thread / n_threads * grain;
  end = grains * (thread + 1) / n_threads * grain;
  if (begin > total) begin = total;
  if (end > total) end = total;
}

}  // namespace onepass::cpu
