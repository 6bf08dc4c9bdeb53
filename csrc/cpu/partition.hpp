// How the CPU engines divide their work: by sizes alone, so that neither the instruction set nor the number of threads
// changes a bit of a reduction's result.
#pragma once
#include "core/engine.hpp"
#include "core/value.hpp"

// Every function here is always inlined (ONEPASS_HD): instruction sets would share an out-of-line copy.
namespace onepass::cpu {

constexpr std::int64_t reduce_block = 16384;
ONEPASS_HD constexpr std::int64_t reduce_blocks(std::int64_t size) { return (size + reduce_block - 1) / reduce_block; }

// Blocks of rows, each with its own sums: enough for many threads, few enough for the sums to be small compared with
// the rows.
ONEPASS_HD constexpr std::int64_t row_norm_blocks(std::int64_t rows, std::int64_t size) {
  const std::int64_t by_work = rows * size >> 14, by_rows = (rows + 31) / 32;
  const std::int64_t blocks = by_work < by_rows ? by_work : by_rows;
  return blocks < 1 ? 1 : blocks < 64 ? blocks : 64;
}

// Samples per unit of one channel: about as many elements as fit the first-level cache.
ONEPASS_HD constexpr std::int64_t batch_norm_samples(const BatchShape& s) {
  return s.space >= 4096 ? 1 : 4096 / s.space;
}

// Units per channel, whose statistics are joined; see batch_norm.hpp.
ONEPASS_HD constexpr std::int64_t batch_norm_units(const BatchShape& s) {
  if (!s.channels_last) return (s.batch + batch_norm_samples(s) - 1) / batch_norm_samples(s);
  const std::int64_t blocks = s.batch * s.space * s.channels >> 16;
  return blocks < 1 ? 1 : blocks < 32 ? blocks : 32;
}
ONEPASS_HD constexpr std::int64_t batch_norm_constants_bytes(std::int64_t channels) { return 4 * 8 * channels; }

// With less memory traffic per thread, another thread costs more than it gains: starting threads takes 1 us if they
// spin, 75 us if they sleep, and milliseconds if another process has taken their core. Within a training step they
// spin: the operation before has used them.
constexpr std::int64_t bytes_per_thread = 1 << 19;

ONEPASS_HD constexpr int threads_for(std::int64_t bytes, int max_threads) {
  const std::int64_t worth = bytes / bytes_per_thread;
  return worth < 2 ? 1 : worth < max_threads ? static_cast<int>(worth) : max_threads;
}

}  // namespace onepass::cpu
