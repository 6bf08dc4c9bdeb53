// Adam (Kingma & Ba 2015, alg. 1), AdamW (Loshchilov & Hutter 2019), AMSGrad (Reddi et al. 2018), and SparseAdam as in
// torch, with eps_before_correction (Kingma & Ba, end of section 2).
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

template <bool amsgrad>
struct Adam {
  // Memory streams besides param and grad.
  static constexpr int n_state = amsgrad ? 3 : 2;
  static constexpr const char* state_names = amsgrad ? "exp_avg, exp_avg_sq, max_exp_avg_sq" : "exp_avg, exp_avg_sq";
  static constexpr const char* state_kinds = amsgrad ? "signed, square, square" : "signed, square";
  static constexpr bool reads_grad = true;
  static constexpr bool takes_rows = !amsgrad;  // SparseAdam: rows without a gradient keep their moments

  ONEPASS_HYPER(lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, bias_correction, eps_inside_sqrt,
                eps_before_correction);

  // The scalars of one step, in the type F that kernels compute in.
  template <class F>
  struct Step {
    F grad_factor, coupled_decay, param_factor, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size,
        inv_root_correction2, eps_in, eps_out;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const double correction1 = h.bias_correction != 0 ? 1 - power(h.beta1, context.t) : 1;
    const double correction2 = h.bias_correction != 0 ? 1 - power(h.beta2, context.t) : 1;
    const bool decoupled = h.decoupled_weight_decay != 0, eps_inside = h.eps_inside_sqrt != 0;
    Step<F> k;
    k.grad_factor = F(context.grad_factor);
    k.coupled_decay = F(decoupled ? 0 : h.weight_decay);
    k.param_factor = F(decoupled ? 1 - h.lr * h.weight_decay : 1);
    k.beta1 = F(h.beta1);
    k.beta2 = F(h.beta2);
    k.one_minus_beta1 = F(1 - h.beta1);
    k.one_minus_beta2 = F(1 - h.beta2);
    k.step_size = F(h.lr / correction1);
    k.inv_root_correction2 = F(1 / sqrt(correction2));
    k.eps_in = F(eps_inside ? h.eps * correction2 : 0);
    k.eps_out = F(eps_inside ? 0 : h.eps_before_correction != 0 ? h.eps / sqrt(correction2) : h.eps);
    return k;
  }

  // The new param from param p, grad g and states s, for one element or one pack of elements.
  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V &exp_avg = s[0], &exp_avg_sq = s[1];
    g = k.grad_factor * g;
    // decay
    if (k.coupled_decay != 0) g = g + k.coupled_decay * p;  // skipped if 0: 0 * an infinite weight would be NaN
    p = k.param_factor * p;
    // first moment
    exp_avg = lerp(exp_avg, g, k.one_minus_beta1, k.beta1);
    // second moment
    exp_avg_sq =
        k.beta2 * exp_avg_sq + (k.one_minus_beta2 * g) * g;  // in this order: g * g overflows a float from 2e19 on
    V second_moment = exp_avg_sq;
    if constexpr (amsgrad) second_moment = s[2] = max_keep_nan(s[2], exp_avg_sq);
    // step: both bias corrections are in step_size and inv_root_correction2. The denominator is sqrt(v / c + eps_in) +
    // eps_out; the correction c is taken out of the root, because v / c may overflow where v does not.
    const V denominator = sqrt(second_moment + k.eps_in) * k.inv_root_correction2 + k.eps_out;
    return p - k.step_size * exp_avg / denominator;
  }
};

using adam = Variants<Adam<false>, Adam<true>>;

}  // namespace onepass::rules
