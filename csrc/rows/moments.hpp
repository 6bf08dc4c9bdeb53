// Mean and variance of many numbers out of those of their parts, without ever subtracting two large sums of squares.
#pragma once
#include "core/value.hpp"

namespace onepass::rows {

// Number, mean and sum of squared deviations from the mean. Parts are merged by the formula of Chan, Golub & LeVeque
// (1983). In double: 1e4 + noise of 1e-2 keeps its digits.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  // `n` numbers given by sums of their distances d from a pivot near their mean: of d and of d * d.
  ONEPASS_HD static Moments about(double pivot, double n, double sum, double sum_of_squares) {
    Moments m;
    m.n = n;
    m.mean = pivot + sum / n;
    m.squares = sum_of_squares - sum * (sum / n);
    return m;
  }

  ONEPASS_HD void merge(const Moments& other) {
    if (other.n == 0) return;
    if (n == 0) {
      *this = other;
      return;
    }
    const double total = n + other.n, distance = other.mean - mean, weight = other.n / total;
    mean += distance * weight;
    squares += other.squares + distance * distance * n * weight;
    n = total;
  }

  // Biased; rounding may have left a hair less than nothing. NaN stays.
  ONEPASS_HD double variance() const {
    const double v = squares / n;
    return v < 0 ? 0 : v;
  }
};

}  // namespace onepass::rows
