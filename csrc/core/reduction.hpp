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

}  // namespace onepass
