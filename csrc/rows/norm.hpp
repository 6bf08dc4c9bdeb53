// The arithmetic of LayerNorm, RMSNorm and BatchNorm once the statistics are known, on one element or one pack of
// elements of type V. A "row" is the set of elements that share statistics: a row of LayerNorm, a channel of BatchNorm.
#pragma once
#include "core/value.hpp"

namespace onepass::rows {

struct Plain {
  template <class F>
  ONEPASS_HD F operator()(const F* p) const {
    return *p;
  }
};

// The mean is the sum of two F: one alone is too coarse where the mean is much larger than the deviation.
template <class F>
struct Stats {
  F mean, mean_low, rstd;

  // Read and written as forward stores them for backward, in F[3][rows]: mean, rstd, mean_low. load(address) reads a
  // number.
  template <class Load>
  ONEPASS_HD static Stats kept(const void* stats, std::int64_t rows, std::int64_t row, const Load& load) {
    const F* const s = static_cast<const F*>(stats) + row;
    return {load(s), load(s + 2 * rows), load(s + rows)};
  }
  ONEPASS_HD static Stats kept(const void* stats, std::int64_t rows, std::int64_t row) {
    return kept(stats, rows, row, Plain{});
  }
  ONEPASS_HD void keep(void* stats, std::int64_t rows, std::int64_t row) const {
    F* const s = static_cast<F*>(stats) + row;
    s[0] = mean;
    s[rows] = rstd;
    s[2 * rows] = mean_low;
  }

  // If the variance of finite numbers overflows F, it counts as infinite and all results are 0. The mean is then 0 too:
  // a distance from it could also overflow, and infinity * 0 would be NaN.
  ONEPASS_HD static Stats of(double mean, double variance, double eps) {
    constexpr double largest = sizeof(F) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    const bool is_finite = mean - mean == 0;
    if (variance > largest && is_finite) return {0, 0, 0};
    const F high = F(mean);
    return {high, F(mean - double(high)), F(1 / sqrt(variance + eps))};
  }

  // The same computed in F, for GPUs with slow float64: from the means of d and of d * d, where d is an element's
  // distance from a pivot near the mean.
  ONEPASS_HD static Stats about(F pivot, F mean_distance, F mean_square, F eps) {
    const F variance = mean_square - mean_distance * mean_distance, mean = pivot + mean_distance;
    return {mean, mean_distance - (mean - pivot), 1 / sqrt((variance < 0 ? F(0) : variance) + eps)};
  }

  template <class V>
  ONEPASS_HD V normalised(V x) const {
    return (x - mean) * rstd - mean_low * rstd;
  }
};

// 1 / standard deviation for the backward of a row. A row of one element equals its mean, so its result does not depend
// on it and its gradient is exactly 0; without the 0 it would be rounding noise times 1 / sqrt(eps).
template <class F>
ONEPASS_HD F backward_rstd(F rstd, bool rms, std::int64_t size) {
  return !rms && size == 1 ? F(0) : rstd;
}

// y = (x - mean) * scale + shift combines a row's statistics, weight and bias.
template <class F>
struct Normaliser {
  F mean, scale, shift;

  ONEPASS_HD static Normaliser of(const Stats<F>& stats, F weight, F bias) {
    const F scale = stats.rstd * weight;
    return {stats.mean, scale, bias - stats.mean_low * scale};
  }
  template <class V>
  ONEPASS_HD V at(V x) const {
    return (x - mean) * scale + shift;
  }
};

// The gradient of an input x that its row's statistics depend on: g without its components along 1 and along xhat,
//   dx = (g - mean_g - xhat * mean_gx) * rstd,   mean_g, mean_gx: the row's means of g and of g * xhat,
// computed as g * scale + (x - mean) * x_scale + shift, which is two fused multiply-adds per element. g contains
// LayerNorm's weight already; BatchNorm's, one per channel, is in scale.
template <class F>
struct InputGradient {
  F mean, scale, x_scale, shift;

  ONEPASS_HD static InputGradient of(const Stats<F>& stats, F weight, F mean_g, F mean_gx) {
    const F scale = stats.rstd * weight, x_scale = -scale * stats.rstd * mean_gx;
    return {stats.mean, scale, x_scale, -scale * mean_g - x_scale * stats.mean_low};
  }
  // If the statistics are constants.
  ONEPASS_HD static InputGradient of_constants(const Stats<F>& stats, F weight) {
    return {stats.mean, stats.rstd * weight, 0, 0};
  }
  template <class V>
  ONEPASS_HD V at(V g, V x) const {
    return g * scale + ((x - mean) * x_scale + shift);
  }
};

// The leaky ReLU. slope == 0 (ReLU) skips the product: -inf * 0 would be NaN. NaN stays NaN.
template <class F, class V>
ONEPASS_HD V activation(V z, F slope) {
  return select(z <= 0, slope == 0 ? V{} : z * slope, z);
}

// The gradient before the activation, from the activation's result y: the slope is not negative, so y has the sign of
// the argument.
template <class F, class V>
ONEPASS_HD V activation_gradient(V dy, V y, F slope) {
  return select(y <= 0, slope == 0 ? V{} : dy * slope, dy);
}

}  // namespace onepass::rows
