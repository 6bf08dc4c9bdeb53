// Mean and variance of contiguous numbers: sums of distances from a number near the mean, a chunk at a time; chunks are
// merged in order.
#pragma once
#include "cpu/lane_ops.hpp"
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

// visit(whole or not, element, number of lanes, which of several sums) for every pack of elements [begin, end).
template <class F, int sums = Sums<F>::count, class Visit>
static inline __attribute__((always_inline)) void for_packs(std::int64_t begin, std::int64_t end, const Visit& visit) {
  constexpr int width = lanes<F>;
  std::int64_t i = begin;
  for (; i + sums * width <= end; i += sums * width)
#pragma GCC unroll 4
    for (int part = 0; part < sums; ++part) visit(Whole<true>{}, i + part * width, width, part);
  if constexpr (sums > 1)
    for (; i + width <= end; i += width) visit(Whole<true>{}, i, width, 0);
  if (i < end) visit(Whole<false>{}, i, static_cast<int>(end - i), sums - 1);
}

// Fetches what a visitor of for_packs() will need later: the processor's own prefetching stops at the end of a page,
// and at the end of a short row. Where packs are short, twice a cache line, because a first request may be dropped:
// once is 7 % slower on arrays larger than the caches.
template <int for_writing = 0, class T>
static inline __attribute__((always_inline)) void fetch(const T* p, int part) {
  if (part * lanes<Compute<T>> * sizeof(T) % 32 == 0) __builtin_prefetch(p, for_writing);
}

// Whether a sum of squares in F is a number; an infinite one, or NaN, may only have been too large for F.
template <class F>
static inline bool fits(F squares) {
  return squares - squares == 0;
}

// The moments in double, number by number: where F overflowed.
template <class T>
static inline __attribute__((noinline)) rows::Moments wide_moments(const T* x, std::int64_t n, std::int64_t pieces,
                                                                   std::int64_t stride) {
  rows::Moments all;
  for (std::int64_t p = 0; p < pieces; ++p)
    for (std::int64_t i = 0; i < n; ++i) all.merge({1, number_at<T>(x + p * stride, i), 0});
  return all;
}

// Of `pieces` pieces of n numbers each, `stride` apart, all in all about a chunk. Distances are taken from the mean of
// the first numbers, one in 64 of them: it is at most 8 deviations from the mean of all, whatever they are, so that
// squares of distances lose no more than a digit or two.
template <class T>
static inline rows::Moments chunk_moments(const T* x, std::int64_t n, std::int64_t pieces, std::int64_t stride) {
  using F = Compute<T>;
  const std::int64_t few = (n * pieces / 64 + lanes<F>)&-static_cast<std::int64_t>(lanes<F>);
  const std::int64_t of_piece = few < n ? few : n, needed = (few + n - 1) / n;
  const std::int64_t first_pieces = needed < pieces ? needed : pieces;
  const F share = F(1 / double(of_piece * first_pieces));  // multiplied first: a sum of huge numbers may overflow
  Sums<F> mean;
  for (std::int64_t p = 0; p < first_pieces; ++p)
    for_packs<F>(0, of_piece, [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
      mean.part[part] += load<decltype(w)::value>(x + p * stride + i, count) * share;
    });
  const F pivot = mean.total();
  Sums<F> sum, squares;
  for (std::int64_t p = 0; p < pieces; ++p) {
    const T* const piece = x + p * stride;
    for_packs<F>(0, n, [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
      constexpr bool whole = decltype(w)::value;
      if (stride != 0) fetch(piece + i + stride, part);
      Reg<F> distance = load<whole>(piece + i, count) - pivot;
      if constexpr (!whole) distance = first_of(distance, count);
      sum.part[part] += distance;
      squares.part[part] += distance * distance;
    });
  }
  const F of_squares = squares.total();
  if (!fits(of_squares)) return wide_moments(x, n, pieces, stride);
  return rows::Moments::about(pivot, double(n) * double(pieces), sum.total(), of_squares);
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
