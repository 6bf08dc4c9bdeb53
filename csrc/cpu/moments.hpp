// Mean and variance of contiguous numbers: per chunk, sums of distances from a pivot near the mean; chunks are merged
// in order.
#pragma once
#include "cpu/lane_ops.hpp"
#include "rows/moments.hpp"

namespace onepass::cpu::ONEPASS_ISA {

constexpr std::int64_t moments_chunk = 4096;

// Several running sums, because a single one would wait for the latency of each addition.
template <class F>
struct Sums {
  static constexpr int count = 4;
  Reg<F> part[count] = {};

  F total() const { return sum_of<F>((part[0] + part[1]) + (part[2] + part[3])); }
};

// visit(Constant<whole>, element, number of lanes, index of a running sum) for every pack of elements [begin, end).
template <class F, int sums = Sums<F>::count, class Visit>
static inline __attribute__((always_inline)) void for_packs(std::int64_t begin, std::int64_t end, const Visit& visit) {
  constexpr int width = lanes<F>;
  std::int64_t i = begin;
  for (; i + sums * width <= end; i += sums * width)
#pragma GCC unroll 4
    for (int part = 0; part < sums; ++part) visit(Constant<true>{}, i + part * width, width, part);
  if constexpr (sums > 1)
    for (; i + width <= end; i += width) visit(Constant<true>{}, i, width, 0);
  if (i < end) visit(Constant<false>{}, i, static_cast<int>(end - i), sums - 1);
}

// Prefetches memory that a visitor of for_packs() will need later: the hardware prefetcher stops at the end of a page
// and of a short row. With packs shorter than a cache line each line is requested twice, because a request may be
// dropped: one request is 7 % slower on arrays larger than the caches.
template <int for_writing = 0, class T>
static inline __attribute__((always_inline)) void fetch(const T* p, int part) {
  if (part * lanes<Compute<T>> * sizeof(T) % 32 == 0) __builtin_prefetch(p, for_writing);
}

// Whether a sum of squares is finite. If not, it may merely have overflowed F.
template <class F>
static inline bool is_finite(F squares) {
  return squares - squares == 0;
}

// The moments in double, one number at a time, for sums that overflowed F.
template <class T>
static inline __attribute__((noinline)) rows::Moments wide_moments(const T* x, std::int64_t n, std::int64_t pieces,
                                                                   std::int64_t stride) {
  rows::Moments all;
  for (std::int64_t p = 0; p < pieces; ++p)
    for (std::int64_t i = 0; i < n; ++i) all.merge({1, number_at<T>(x + p * stride, i), 0});
  return all;
}

// The moments of `pieces` pieces of n numbers each, `stride` apart; about a chunk in all. The pivot is the mean of the
// first 1/64 of the numbers. Whatever they are, it is at most 8 standard deviations from the mean of all, so the
// squares of distances lose no more than a digit or two.
template <class T>
static inline rows::Moments chunk_moments(const T* x, std::int64_t n, std::int64_t pieces, std::int64_t stride) {
  using F = Compute<T>;
  const std::int64_t few = (n * pieces / 64 + lanes<F>)&-static_cast<std::int64_t>(lanes<F>);
  const std::int64_t per_piece = few < n ? few : n, needed = (few + n - 1) / n;
  const std::int64_t first_pieces = needed < pieces ? needed : pieces;
  const F factor =
      F(1 / double(per_piece * first_pieces));  // applied before adding: a sum of huge numbers may overflow
  Sums<F> mean;
  for (std::int64_t p = 0; p < first_pieces; ++p)
    for_packs<F>(0, per_piece, [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
      mean.part[part] += load<decltype(w)::value>(x + p * stride + i, count) * factor;
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
  const F square_sum = squares.total();
  if (!is_finite(square_sum)) return wide_moments(x, n, pieces, stride);
  return rows::Moments::about(pivot, double(n) * double(pieces), sum.total(), square_sum);
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
