// What the binding asks of the CPU engines; the same for every instruction set.
#pragma once
#include "core/types.hpp"

namespace onepass::cpu {

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
constexpr std::int64_t reduce_blocks(std::int64_t size) { return (size + reduce_block - 1) / reduce_block; }

// Below this many bytes of memory traffic for each thread a further one costs more than it brings: a team costs 1 us
// when its threads spin, 75 us when they sleep, and milliseconds when a neighbour has taken their core.
constexpr std::int64_t bytes_per_thread = 2 << 20;

constexpr int threads_for(std::int64_t bytes, int max_threads) {
  const std::int64_t worth = bytes / bytes_per_thread;
  return worth < 2 ? 1 : worth < max_threads ? static_cast<int>(worth) : max_threads;
}

}  // namespace onepass::cpu
