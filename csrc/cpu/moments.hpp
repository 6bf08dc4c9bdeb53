// Mean and variance of contiguous numbers: a chunk that stays in the first cache is read twice, for its mean and for
// the distances from it; chunks are merged in order. Memory is read once.
#pragma once
#include "cpu/registers.hpp"
#include "rows/moments.hpp"

namespace onepass::cpu::ONEPASS_ISA {

constexpr std::int64_t moments_chunk = 4096;

// Several running sums: one alone waits for each addition to end.
template <class F>
struct Sums {
  static constexpr int count = 4;
  Reg<F> part[count] = {};

  F total() const { return sum_of<F>((part[0] + part[1]) + (part[2] + part[3])); }
};

// Calls visit(part, pack, number of lanes) over [0, n): whole packs, the sums in turn, then the tail.
template <class T, class Visit>
static inline __attribute__((always_inline)) void for_packs(const T* x, std::int64_t n, const Visit& visit) {
  constexpr int width = lanes<Arithmetic<T>>;
  std::int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width)
    for (int part = 0; part < 4; ++part) visit(part, load<true>(x + i + part * width, width), width);
  for (int part = 0; i + width <= n; i += width, ++part) visit(part, load<true>(x + i, width), width);
  if (i < n) visit(3, load<false>(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// Of `pieces` pieces of n numbers each, `stride` apart, all in all at most about a chunk.
template <class T>
static inline rows::Moments chunk_moments(const T* x, std::int64_t n, std::int64_t pieces, std::int64_t stride) {
  using F = Arithmetic<T>;
  const double total = double(n) * double(pieces);
  const F share = F(1 / total);  // multiplied first: the sum of huge numbers may overflow where their mean does not
  Sums<F> mean;
  for (std::int64_t p = 0; p < pieces; ++p)
    for_packs(x + p * stride, n,
              [&](int part, Reg<F> v, int) __attribute__((always_inline)) { mean.part[part] += v * share; });
  const F near = mean.total();
  Sums<F> sum, squares;
  for (std::int64_t p = 0; p < pieces; ++p)
    for_packs(x + p * stride, n, [&](int part, Reg<F> v, int count) __attribute__((always_inline)) {
      Reg<F> distance = v - near;
      if (count < lanes<F>) distance = first_of<F>(distance, count);
      sum.part[part] += distance;
      squares.part[part] += distance * distance;
    });
  return rows::Moments::about(near, total, sum.total(), squares.total());
}

template <class T>
static inline rows::Moments moments_of(const T* x, std::int64_t n) {
  if (n <= moments_chunk) return chunk_moments(x, n, 1, 0);
  rows::Moments all;
  for (std::int64_t i = 0; i < n; i += moments_chunk)
    all.merge(chunk_moments(x + i, n - i < moments_chunk ? n - i : moments_chunk, 1, 0));
  return all;
}

}  // namespace onepass::cpu::ONEPASS_ISA
