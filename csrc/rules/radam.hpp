// RAdam (Liu et al. 2020): plain momentum until the second moment averages enough gradients, from then on Adam.
// gradients.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct RAdam {
  static constexpr int n_state = 2;
  static constexpr const char* state_names = "exp_avg, exp_avg_sq";
  static constexpr const char* state_kinds = "signed, square";
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay);

  template <class F>
  struct Step {
    F grad_factor, coupled_decay, param_factor, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, eps;
    bool adapts;  // whether the step is divided by the root of the second moment
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const bool decoupled = h.decoupled_weight_decay != 0;
    const double decay2 = power(h.beta2, context.t), correction2 = 1 - decay2;
    // The second moment is as certain as a plain average of `length` gradients; after many steps, of `longest`.
    const double longest = 2 / (1 - h.beta2) - 1, length = longest - 2 * context.t * decay2 / correction2;
    Step<F> k;
    k.grad_factor = F(context.grad_factor);
    k.coupled_decay = F(decoupled ? 0 : h.weight_decay);
    k.param_factor = F(decoupled ? 1 - h.lr * h.weight_decay : 1);
    k.beta1 = F(h.beta1);
    k.beta2 = F(h.beta2);
    k.one_minus_beta1 = F(1 - h.beta1);
    k.one_minus_beta2 = F(1 - h.beta2);
    k.eps = F(h.eps);
    k.adapts = length > 5;
    double step_size = h.lr / (1 - power(h.beta1, context.t));
    if (k.adapts) {
      const double rectification =
          sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length));
      step_size = step_size * rectification * sqrt(correction2);
    }
    k.step_size = F(step_size);
    return k;
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V &exp_avg = s[0], &exp_avg_sq = s[1];
    g = k.grad_factor * g;
    // decay
    if (k.coupled_decay != 0) g = g + k.coupled_decay * p;
    p = k.param_factor * p;
    // first moment
    exp_avg = lerp(exp_avg, g, k.one_minus_beta1, k.beta1);
    // second moment
    exp_avg_sq =
        k.beta2 * exp_avg_sq + (k.one_minus_beta2 * g) * g;  // in this order: g * g overflows a float from 2e19 on
    // step
    const V step = k.step_size * exp_avg;
    return p - (k.adapts ? step / (sqrt(exp_avg_sq) + k.eps) : step);
  }
};

using radam = Variants<RAdam>;

}  // namespace onepass::rules
