// Which elements a dropout keeps, computed one Philox counter (4 elements) at a time; see core/philox.hpp.
#pragma once
#include "core/layers.hpp"
#include "core/philox.hpp"
#include "cuda/platform.cuh"

namespace onepass::cuda {

// Which of the elements 4 q to 4 q + 3 are kept; bit 0 is the first of them.
__device__ inline unsigned quad_bits(std::uint64_t seed, std::uint64_t threshold, std::uint64_t q) {
  const Philox words(seed, q);
  unsigned bits = 0;
  ONEPASS_UNROLL
  for (int i = 0; i < Philox::words; ++i) bits |= unsigned(words.word[i] >= threshold) << i;
  return bits;
}

// The same for elements i to i + n - 1; n is a power of two and divides i.
template <int n>
__device__ unsigned keep_bits(std::uint64_t seed, std::uint64_t threshold, std::int64_t i) {
  if constexpr (n < 4) return quad_bits(seed, threshold, std::uint64_t(i) / 4) >> i % 4 & ((1u << n) - 1);
  unsigned bits = 0;
  ONEPASS_UNROLL
  for (int j = 0; j < n / 4; ++j) bits |= quad_bits(seed, threshold, std::uint64_t(i) / 4 + j) << 4 * j;
  return bits;
}

// A thread's copy of a dropout; one without a seed keeps every element as it is.
template <class F>
struct DropoutBits {
  const Dropout& dropout;  // in the constant bank
  std::uint64_t seed;
  F scale;

  explicit __device__ DropoutBits(const Dropout& d)
      : dropout(d), seed(d.seed != nullptr ? std::uint64_t(*d.seed) : 0), scale(F(d.seed != nullptr ? d.scale : 1)) {}

  // keep_bits() of elements i to i + n - 1.
  template <int n>
  __device__ unsigned at(std::int64_t i) const {
    return dropout.seed != nullptr ? keep_bits<n>(seed, dropout.threshold, i) : ~0u;
  }
};

// x * scale, or 0 whatever x is.
template <class F>
__device__ F drop(unsigned bits, int element, F x, F scale) {
  return bits >> element & 1 ? x * scale : F(0);
}

}  // namespace onepass::cuda
