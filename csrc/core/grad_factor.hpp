// One factor holds all that happens to a gradient before the rule: loss scale, clipping or normalising, and sign.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass {

// norm: of the gradients after division by grad_scale; unused unless clipping or normalising.
ONEPASS_HD double grad_factor(const GradScaling& scaling, double grad_scale, double norm) {
  double factor = 1 / grad_scale;
  if (scaling.normalize) {
    const double divisor = norm + scaling.epsilon;
    factor *= divisor == 0 ? 0 : 1 / divisor;
  } else if (scaling.clip) {
    const double clip = scaling.max_norm / (norm + 1e-6);  // 1e-6: torch.nn.utils.clip_grad_norm_
    if (!(clip >= 1)) factor *= clip;                      // written so that a NaN norm gives a NaN factor
  }
  constexpr double largest = 3.4028234663852886e38;  // of a float; 1 / norm of denormal gradients would be infinite
  factor = factor > largest ? largest : factor;
  return scaling.maximize ? -factor : factor;
}

}  // namespace onepass
