// Adagrad (Duchi, Hazan & Singer 2011): steps divided by the root of the sum of all squared gradients.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Adagrad {
  static constexpr int n_state = 1;
  static constexpr const char* state_names = "sum";
  static constexpr const char* state_kinds = "square";
  static constexpr bool reads_grad = true;
  static constexpr bool takes_rows = true;

  ONEPASS_HYPER(lr, lr_decay, weight_decay, eps, eps_inside_sqrt);

  template <class F>
  struct Step {
    F grad_factor, weight_decay, step_size, eps_in, eps_out;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const bool eps_in = h.eps_inside_sqrt != 0;
    return {F(context.grad_factor), F(h.weight_decay), F(h.lr / (1 + (context.t - 1) * h.lr_decay)),
            F(eps_in ? h.eps : 0), F(eps_in ? 0 : h.eps)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V& sum = s[0];
    g = k.grad_factor * g;
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // second moment
    sum = sum + g * g;
    // step
    return p - k.step_size * g / (sqrt(sum + k.eps_in) + k.eps_out);
  }
};

using adagrad = Variants<Adagrad>;

}  // namespace onepass::rules
