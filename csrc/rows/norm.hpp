// The arithmetic of LayerNorm, RMSNorm and BatchNorm on one element or one pack of elements of type V: everything after
// the statistics are known. A row is what shares its statistics: a row of LayerNorm, a channel of BatchNorm.
#pragma once
#include "core/value.hpp"

namespace onepass::rows {

// The mean is the sum of two F: one alone is too coarse where the mean is large beside the deviation.
template <class F>
struct Stats {
  F mean, mean_low, rstd;

  // As forward keeps them for backward, in F[3][rows]: mean, rstd, mean_low.
  ONEPASS_HD static Stats kept(const void* stats, std::int64_t rows, std::int64_t row) {
    const F* const s = static_cast<const F*>(stats) + row;
    return {s[0], s[2 * rows], s[rows]};
  }
  ONEPASS_HD void keep(void* stats, std::int64_t rows, std::int64_t row) const {
    F* const s = static_cast<F*>(stats) + row;
    s[0] = mean;
    s[rows] = rstd;
    s[2 * rows] = mean_low;
  }

  // A variance of finite numbers that F cannot hold counts as infinite, and every distance from the mean as nothing
  // beside it: a distance may be too large for F as well, and infinity * 0 would be NaN.
  ONEPASS_HD static Stats of(double mean, double variance, double eps) {
    constexpr double largest = sizeof(F) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    const bool is_finite = mean - mean == 0;
    if (variance > largest && is_finite) return {0, 0, 0};
    const F high = F(mean);
    return {high, F(mean - double(high)), F(1 / sqrt(variance + eps))};
  }

  // The same in F, where float64 is slow: by the means of the distances from a pivot near the mean and of their
  // squares. The mean is then pivot + distance.
  ONEPASS_HD static Stats about(F pivot, F distance, F squares, F eps) {
    const F variance = squares - distance * distance, mean = pivot + distance;
    return {mean, distance - (mean - pivot), 1 / sqrt((variance < 0 ? F(0) : variance) + eps)};
  }

  template <class V>
  ONEPASS_HD V normalised(V x) const {
    return (x - mean) * rstd - mean_low * rstd;
  }
};

// 1 / standard deviation as the backward of a row sees it. An element that is alone in its row is its own mean and has
// no influence on the result: 0 makes its gradient exactly 0, where rounding leaves noise times 1 / sqrt(eps).
template <class F>
ONEPASS_HD F backward_rstd(F rstd, bool rms, std::int64_t size) {
  return !rms && size == 1 ? F(0) : rstd;
}

// y = (x - mean) * scale + shift: a row's statistics, its weight and its bias in one.
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

// The gradient of an input x whose row's statistics depend on it: what is left of g when its components along 1 and
// along xhat are taken out,
//   dx = (g - mean_g - xhat * mean_gx) * rstd,   mean_g, mean_gx: the row's means of g and of g * xhat,
// as g * scale + (x - mean) * of_x + shift, which costs an element two fused multiply-adds. Here g is weight *
// gradient; the weight of the whole row, if it has one, is a part of scale.
template <class F>
struct InputGradient {
  F mean, scale, of_x, shift;

  ONEPASS_HD static InputGradient of(const Stats<F>& stats, F weight, F mean_g, F mean_gx) {
    const F scale = stats.rstd * weight, of_x = -scale * stats.rstd * mean_gx;
    return {stats.mean, scale, of_x, -scale * mean_g - of_x * stats.mean_low};
  }
  // Where the statistics are constants.
  ONEPASS_HD static InputGradient of_constants(const Stats<F>& stats, F weight) {
    return {stats.mean, stats.rstd * weight, 0, 0};
  }
  template <class V>
  ONEPASS_HD V at(V g, V x) const {
    return g * scale + ((x - mean) * of_x + shift);
  }
};

// The leaky ReLU. slope == 0 (ReLU) skips the product: -inf * 0 would be NaN. NaN stays NaN.
template <class F, class V>
ONEPASS_HD V activation(V z, F slope) {
  return select(z <= 0, slope == 0 ? V{} : z * slope, z);
}

// dy before the activation, from its result: slopes are not negative, so the sign is that of its argument.
template <class F, class V>
ONEPASS_HD V activation_gradient(V dy, V y, F slope) {
  return select(y <= 0, slope == 0 ? V{} : dy * slope, dy);
}

}  // namespace onepass::rows
