// The one factor that a gradient is multiplied by before the rule: loss scale, clipping or normalising, and sign.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass {

// norm: the norm of the gradients after division by grad_scale; only clipping and normalising use it.
ONEPASS_HD double grad_factor(const GradScaling& scaling, double grad_scale, double norm) {
  double factor = 1 / grad_scale;
  if (scaling.normalize) {
    const double divisor = norm + scaling.epsilon;
    factor *= divisor == 0 ? 0 : 1 / divisor;
  } else if (scaling.clip) {
    const double clip = scaling.max_norm / (norm + 1e-6);  // 1e-6: torch.nn.utils.clip_grad_norm_
    if (!(clip >= 1)) factor *= clip;                      // negated, so that a NaN norm gives a NaN factor
  }
  constexpr double largest = 3.4028234663852886e38;  // FLT_MAX: 1 / norm of subnormal gradients overflows a float
  factor = factor > largest ? largest : factor;
  return scaling.maximize ? -factor : factor;
}

}  // namespace onepass
