// Mean and variance of many numbers from those of their parts, without subtracting two large sums of squares.
#pragma once
#include "core/value.hpp"

namespace onepass::rows {

// Count, mean and sum of squared deviations from the mean, merged by the formula of Chan, Golub & LeVeque (1983). In
// double, so that the variance of 1e4 + noise of 1e-2 keeps its digits.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  // Of n numbers, from the sums of d and of d * d, where d is a number's distance from a pivot near the mean.
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

  // Biased. Rounding can make it slightly negative; NaN stays.
  ONEPASS_HD double variance() const {
    const double v = squares / n;
    return v < 0 ? 0 : v;
  }
};

}  // namespace onepass::rows
