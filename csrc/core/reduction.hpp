// The arithmetic of reductions: adding an element to a running total, and joining two totals.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass {

template <class V>
ONEPASS_HD V magnitude(V x) {
  return select(x < 0, -x, x);
}

ONEPASS_HD double powered(double x, double power) { return ::pow(x, power); }
#if !defined(__CUDACC__)
template <class V, class = decltype(V{}[0])>
ONEPASS_HD V powered(V x, double power) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) x[lane] = ::pow(x[lane], power);
  return x;
}
#endif

ONEPASS_HD double empty_total(Total total) { return total == Total::smallest ? double(INFINITY) : 0; }

// A NaN in either operand stays NaN.
template <class V>
ONEPASS_HD V join(Total total, V a, V b) {
  if (total == Total::largest) return max_keep_nan(a, b);
  if (total == Total::smallest) return -max_keep_nan(-a, -b);
  return a + b;
}

template <class V>
ONEPASS_HD V add_element(const Reduction& reduction, V total, V x) {
  if (reduction.total == Total::squares) return total + x * x;
  x = magnitude(x);
  if (reduction.total == Total::powers) x = powered(x, reduction.power);
  return join(reduction.total, total, x);
}

// The sum of the squares of a few floats in float arithmetic, almost as accurate as in double: the parts that rounding
// cuts off from a square (by a fused multiply-add) and from the sum (Knuth's 2Sum) are exact, and summed up apart. For
// GPUs whose float64 is slow. `low` is not valid where squares overflow or underflow.
struct SumOfSquares {
  float sum = 0, low = 0, largest = 0;

  ONEPASS_HD void add(float x) {
    const float square = x * x, error = ::fmaf(x, x, -square);
    const float next = sum + square, added = next - sum;
    low += ((sum - (next - added)) + (square - added)) + error;
    sum = next;
    largest = ::fmaxf(largest, ::fabsf(x));
  }
  // 2^-90: what underflow cuts off from a square, at most 2^-150, does not count beside such a sum.
  ONEPASS_HD bool is_accurate() const {
    constexpr float smallest = 8.077935669463161e-28f, most = 3.4028234663852886e38f;
    return (sum >= smallest && sum <= most) || (sum == 0 && largest == 0);
  }
  ONEPASS_HD double total() const { return double(sum) + double(low); }
};

}  // namespace onepass
