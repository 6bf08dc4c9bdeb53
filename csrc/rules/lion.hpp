// Lion (Chen et al. 2023, algorithm 2): every weight moves by the same distance, in the direction of a sign.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Lion {
  static constexpr int n_state = 1;
  static constexpr const char* state_names = "exp_avg";
  static constexpr const char* state_kinds = "signed";
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(lr, beta1, beta2, weight_decay);

  template <class F>
  struct Step {
    F grad_factor, param_factor, beta1, beta2, one_minus_beta1, one_minus_beta2, lr;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    return {F(context.grad_factor),
            F(1 - h.lr * h.weight_decay),
            F(h.beta1),
            F(h.beta2),
            F(1 - h.beta1),
            F(1 - h.beta2),
            F(h.lr)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V& exp_avg = s[0];
    g = k.grad_factor * g;
    // decay
    p = k.param_factor * p;
    // step: 0 is its own sign, and so is NaN, which the weight then shows
    const V zero{}, one = zero + F(1), direction = lerp(exp_avg, g, k.one_minus_beta1, k.beta1);
    p = p - k.lr * select(direction > 0, one, select(direction < 0, -one, direction));
    // first moment, which the step has not seen yet
    exp_avg = lerp(exp_avg, g, k.one_minus_beta2, k.beta2);
    return p;
  }
};

using lion = Variants<Lion>;

}  // namespace onepass::rules
