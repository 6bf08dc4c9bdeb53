// The decisions of a dropout, in whole counters of core/philox.hpp.
#pragma once
#include "core/philox.hpp"
#include "cuda/platform.cuh"

namespace onepass::cuda {

// Which of the elements 4 q to 4 q + 3 are kept, the first in the lowest bit.
__device__ inline unsigned quad_bits(std::uint64_t seed, std::uint64_t threshold, std::uint64_t q) {
  const Philox words(seed, q);
  unsigned bits = 0;
  ONEPASS_UNROLL
  for (int i = 0; i < Philox::words; ++i) bits |= unsigned(words.word[i] >= threshold) << i;
  return bits;
}

// The same of n elements from i on, a multiple of n; n is a power of two.
template <int n>
__device__ unsigned keep_bits(std::uint64_t seed, std::uint64_t threshold, std::int64_t i) {
  if constexpr (n < 4) return quad_bits(seed, threshold, std::uint64_t(i) / 4) >> i % 4 & ((1u << n) - 1);
  unsigned bits = 0;
  ONEPASS_UNROLL
  for (int j = 0; j < n / 4; ++j) bits |= quad_bits(seed, threshold, std::uint64_t(i) / 4 + j) << 4 * j;
  return bits;
}

// x * scale, or 0 whatever x was.
template <class F>
__device__ F drop(unsigned bits, int element, F x, F scale) {
  return bits >> element & 1 ? x * scale : F(0);
}

}  // namespace onepass::cuda
