// NAdam (Dozat 2016): Adam with Nesterov momentum and a momentum that grows with the step count.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct NAdam {
  static constexpr int n_state = 2;
  static constexpr const char* state_names = "exp_avg, exp_avg_sq";
  static constexpr const char* state_kinds = "signed, square";
  static constexpr bool reads_grad = true;

  // momentum_base: 0.96^momentum_decay. Its t-th power is 0.96^(t * momentum_decay), and power() has the same bits on
  // host and device.
  ONEPASS_HYPER(lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, momentum_base);

  ONEPASS_HD static double momentum(const Hyper& h, double t) {
    return h.beta1 * (1 - 0.5 * power(h.momentum_base, t));
  }

  static constexpr const char* carried_names = "mu_product";  // momentum(1) ... momentum(t)
  template <class F>
  ONEPASS_HD static void carry(const Hyper& h, double t, CarriedNumbers& now, CarriedNumbers& next) {
    next.at[0] = now.at[0] = F(now.at[0]) * F(momentum(h, t));
  }

  template <class F>
  struct Step {
    F grad_factor, coupled_decay, param_factor, beta1, beta2, new1, new2, grad_step_size, momentum_step_size,
        inv_correction2, eps;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const double now = momentum(h, context.t), next = momentum(h, context.t + 1), product = context.carried.at[0];
    const bool decoupled = h.decoupled_weight_decay != 0;
    Step<F> k;
    k.grad_factor = F(context.grad_factor);
    k.coupled_decay = F(decoupled ? 0 : h.weight_decay);
    k.param_factor = F(decoupled ? 1 - h.lr * h.weight_decay : 1);
    k.beta1 = F(h.beta1);
    k.beta2 = F(h.beta2);
    k.new1 = F(1 - h.beta1);
    k.new2 = F(1 - h.beta2);
    k.grad_step_size = F(h.lr * (1 - now) / (1 - product));
    k.momentum_step_size = F(h.lr * next / (1 - product * next));
    k.inv_correction2 = F(1 / (1 - power(h.beta2, context.t)));
    k.eps = F(h.eps);
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
    exp_avg = lerp(exp_avg, g, k.new1, k.beta1);
    // second moment
    exp_avg_sq = k.beta2 * exp_avg_sq + (k.new2 * g) * g;  // in this order: g * g overflows a float from 2e19 on
    // step
    const V denominator = sqrt(exp_avg_sq * k.inv_correction2) + k.eps;
    return p - (k.grad_step_size * g + k.momentum_step_size * exp_avg) / denominator;
  }
};

using nadam = Variants<NAdam>;

}  // namespace onepass::rules
