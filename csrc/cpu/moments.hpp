// Mean and variance of contiguous numbers: sums of distances from a number near the mean, a chunk at a time; chunks are
// merged in order.
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

// Calls visit(part, pack, number of lanes) over [0, n): whole packs, the sums in turn, then the tail. What is `ahead`
// is fetched meanwhile: the processor's own prefetching stops at the end of a page.
template <class T, class Visit>
static inline __attribute__((always_inline)) void for_packs(const T* x, std::int64_t n, const Visit& visit,
                                                            std::int64_t ahead = 0) {
  constexpr int width = lanes<Arithmetic<T>>;
  std::int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width)
    for (int part = 0; part < 4; ++part) {
      if (ahead != 0) __builtin_prefetch(x + i + part * width + ahead);
      visit(part, load<true>(x + i + part * width, width), width);
    }
  for (int part = 0; i + width <= n; i += width, ++part) visit(part, load<true>(x + i, width), width);
  if (i < n) visit(3, load<false>(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// Of `pieces` pieces of n numbers each, `stride` apart, all in all about a chunk. Distances are taken from the mean of
// the first few numbers, m of them: it is at most sqrt(chunk / m) deviations from the mean of all, whatever they are,
// so that squares of distances lose no more than a digit.
template <class T>
static inline rows::Moments chunk_moments(const T* x, std::int64_t n, std::int64_t pieces, std::int64_t stride) {
  using F = Arithmetic<T>;
  const std::int64_t few = n < 64 ? n : 64;
  const F share =
      F(1 / double(few));  // multiplied first: the sum of huge numbers may overflow where their mean does not
  Sums<F> mean;
  for_packs(x, few, [&](int part, Reg<F> v, int) __attribute__((always_inline)) { mean.part[part] += v * share; });
  const F near = mean.total();
  Sums<F> sum, squares;
  for (std::int64_t p = 0; p < pieces; ++p)
    for_packs(
        x + p * stride, n,
        [&](int part, Reg<F> v, int count) __attribute__((always_inline)) {
          Reg<F> distance = v - near;
          if (count < lanes<F>) distance = first_of<F>(distance, count);
          sum.part[part] += distance;
          squares.part[part] += distance * distance;
        },
        stride);
  return rows::Moments::about(near, double(n) * double(pieces), sum.total(), squares.total());
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
