// RMSprop (Tieleman & Hinton 2012), optionally centered (Graves 2013) and with momentum. In PyTorch's form the momentum
// buffer accumulates the normalised gradient, without the learning rate.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

template <bool centered, bool has_momentum>
struct RMSprop {
  static constexpr int n_state = 1 + centered + has_momentum;
  static constexpr const char* state_names =
      centered       ? has_momentum ? "square_avg, grad_avg, momentum_buffer" : "square_avg, grad_avg"
      : has_momentum ? "square_avg, momentum_buffer"
                     : "square_avg";
  // The difference of the centered form has no digits left where its terms have few.
  static constexpr const char* state_kinds = centered       ? "float32, float32, float32"
                                             : has_momentum ? "square, signed"
                                                            : "square";
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(lr, alpha, eps, weight_decay, momentum, eps_inside_sqrt);

  template <class F>
  struct Step {
    F grad_factor, weight_decay, alpha, one_minus_alpha, momentum, step_size, eps_in, eps_out;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const bool eps_in = h.eps_inside_sqrt != 0;
    return {F(context.grad_factor), F(h.weight_decay),    F(h.alpha), F(1 - h.alpha), F(h.momentum), F(h.lr),
            F(eps_in ? h.eps : 0),  F(eps_in ? 0 : h.eps)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    g = k.grad_factor * g;
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // second moment
    s[0] = k.alpha * s[0] + (k.one_minus_alpha * g) * g;
    V variance = s[0];
    if constexpr (centered) {
      // first moment
      V& grad_avg = s[1];
      grad_avg = lerp(grad_avg, g, k.one_minus_alpha, k.alpha);
      const V square = grad_avg * grad_avg;
      // Where the square overflows, s[0] is infinite too; the difference is then infinite, as torch's fused
      // multiply-add makes it, unless grad_avg itself is infinite.
      variance = select(square - square == 0, variance - square, variance - max_keep_nan(grad_avg, -grad_avg));
      variance = select(variance < 0, V{}, variance);  // rounding errors of a constant gradient; NaN stays
    }
    // step
    const V denominator = sqrt(variance + k.eps_in) + k.eps_out;
    if constexpr (has_momentum) {
      V& velocity = s[n_state - 1];
      velocity = k.momentum * velocity + g / denominator;
      return p - k.step_size * velocity;
    } else {
      return p - k.step_size * g / denominator;
    }
  }
};

using rmsprop = Variants<RMSprop<false, false>, RMSprop<true, false>, RMSprop<false, true>, RMSprop<true, true>>;

}  // namespace onepass::rules
