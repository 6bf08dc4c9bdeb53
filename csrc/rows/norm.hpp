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

// The gradient of an input whose row's statistics depend on it: what is left of g = weight * dy when its components
// along 1 and along xhat are taken out. mean_g and mean_gx are the row's means of g and g * xhat.
template <class F, class V>
ONEPASS_HD V input_gradient(V g, V xhat, F mean_g, F mean_gx, F rstd) {
  return ((g - mean_g) - xhat * mean_gx) * rstd;
}

// Leaky ReLU: slope 0 is ReLU, and no product then, which of an infinity would be NaN. NaN stays NaN.
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
