// Adamax (Kingma & Ba 2015, algorithm 2): Adam with a fading maximum of the gradients in place of their second moment.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Adamax {
  static constexpr int n_state = 2;
  static constexpr const char* state_names = "exp_avg, exp_inf";
  static constexpr const char* state_kinds = "signed, square";
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(lr, beta1, beta2, eps, weight_decay);

  template <class F>
  struct Step {
    F grad_factor, weight_decay, beta1, beta2, one_minus_beta1, eps, step_size;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    return {F(context.grad_factor),
            F(h.weight_decay),
            F(h.beta1),
            F(h.beta2),
            F(1 - h.beta1),
            F(h.eps),
            F(h.lr / (1 - power(h.beta1, context.t)))};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V &exp_avg = s[0], &exp_inf = s[1];
    g = k.grad_factor * g;
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // first moment
    exp_avg = lerp(exp_avg, g, k.one_minus_beta1, k.beta1);
    // infinity norm
    const V magnitude = select(g < 0, -g, g);
    exp_inf = max_keep_nan(k.beta2 * exp_inf, magnitude + k.eps);
    // step
    return p - k.step_size * exp_avg / exp_inf;
  }
};

using adamax = Variants<Adamax>;

}  // namespace onepass::rules
