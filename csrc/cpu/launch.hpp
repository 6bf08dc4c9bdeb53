// What the binding asks of the CPU engines; the same for every instruction set.
#pragma once
#include "core/layers.hpp"
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass::cpu {

// Every function here is always inlined (ONEPASS_HD): an out-of-line copy of one would be shared between instruction
// sets.

// One update of a list of tensors of one dtype. The host knows every number.
struct Apply {
  DType dtype;
  const Item* items;
  std::int64_t n_items;
  const Use* uses;
  int n_uses;
  const double* hyper;  // in the order of the rule's hyper_names
  double grad_factor;
  int max_threads;
};
using ApplyFunction = void (*)(const Apply&);

// Uses of one Apply: their Steps stand on the stack. More of them are split over several.
constexpr int max_uses = 32;

// A total over a list of arrays of one dtype, in float64. The order of the additions depends on the sizes alone, so
// neither threads nor the instruction set change a bit of it.
struct Reduce {
  Reduction reduction;
  DType dtype;
  const void* const* data;
  const void* const* weights;  // the second streams of Total::weighted_squares, arrays as large and of the same dtype
  const std::int64_t* sizes;
  std::int64_t n_tensors;
  double* partials;  // workspace: the sum over the arrays of reduce_blocks(size)
  int max_threads;
};
using ReduceFunction = double (*)(const Reduce&);

constexpr std::int64_t reduce_block = 16384;
ONEPASS_HD constexpr std::int64_t reduce_blocks(std::int64_t size) { return (size + reduce_block - 1) / reduce_block; }

// The layers; max_threads comes last. Which numbers come out does not depend on it.
struct Layers {
  void (*dropout)(const DropoutCall&, int);
  void (*row_norm)(const RowNorm&, int);
  void (*row_norm_backward)(const RowNormBackward&, int);
  void (*batch_norm)(const BatchNorm&, int);
  void (*batch_norm_backward)(const BatchNormBackward&, int);
};

ONEPASS_HD constexpr std::int64_t row_norm_workspace(std::int64_t size, DType dtype) {
  return 2 * size * size_of(arithmetic_of(dtype));
}

// Blocks of rows with sums of their own: enough for many threads, few enough for their sums to be small beside the
// rows.
ONEPASS_HD constexpr std::int64_t row_norm_blocks(std::int64_t rows, std::int64_t size) {
  const std::int64_t by_work = rows * size >> 14, by_rows = (rows + 31) / 32;
  const std::int64_t blocks = by_work < by_rows ? by_work : by_rows;
  return blocks < 1 ? 1 : blocks < 64 ? blocks : 64;
}
ONEPASS_HD constexpr std::int64_t row_norm_backward_workspace(std::int64_t rows, std::int64_t size, DType dtype) {
  return (1 + 2 * row_norm_blocks(rows, size)) * size * size_of(arithmetic_of(dtype));
}

// Samples whose elements of one channel are looked at together: about as many elements as fit the first cache.
ONEPASS_HD constexpr std::int64_t batch_norm_samples(const BatchShape& s) {
  return s.space >= 4096 ? 1 : 4096 / s.space;
}
// Units whose statistics are joined, of each channel; see batch_norm.hpp.
ONEPASS_HD constexpr std::int64_t batch_norm_units(const BatchShape& s) {
  if (!s.channels_last) return (s.batch + batch_norm_samples(s) - 1) / batch_norm_samples(s);
  const std::int64_t blocks = s.batch * s.space * s.channels >> 16;
  return blocks < 1 ? 1 : blocks < 32 ? blocks : 32;
}
ONEPASS_HD constexpr std::int64_t batch_norm_constants_bytes(std::int64_t channels) { return 4 * 8 * channels; }
ONEPASS_HD constexpr std::int64_t batch_norm_workspace(const BatchShape& s) {
  return batch_norm_constants_bytes(s.channels) + 3 * 8 * s.channels * batch_norm_units(s);
}

// Below this many bytes of memory traffic for each thread a further one costs more than it brings: a team costs 1 us
// when its threads spin, 75 us when they sleep, and milliseconds when a neighbour has taken their core.
constexpr std::int64_t bytes_per_thread = 2 << 20;

ONEPASS_HD constexpr int threads_for(std::int64_t bytes, int max_threads) {
  const std::int64_t worth = bytes / bytes_per_thread;
  return worth < 2 ? 1 : worth < max_threads ? static_cast<int>(worth) : max_threads;
}

}  // namespace onepass::cpu
