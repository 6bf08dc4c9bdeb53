// Adadelta (Zeiler 2012): steps in the unit of the weights, from the sizes of past gradients and past updates.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Adadelta {
  static constexpr int n_state = 2;                                    // memory streams besides param and grad
  static constexpr const char* state_names = "square_avg, acc_delta";  // by the names of torch's state
  static constexpr const char* state_kinds = "square, square";         // how few bits they may have
  static constexpr bool reads_grad = true;
  static constexpr bool many_registers = true;  // two roots and a division

  ONEPASS_HYPER(lr, rho, eps, weight_decay);  // doubles; Python passes them by these names

  template <class F>
  struct Step {
    F grad_factor, weight_decay, rho, one_minus_rho, lr, eps;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    return {F(context.grad_factor), F(h.weight_decay), F(h.rho), F(1 - h.rho), F(h.lr), F(h.eps)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V &square_avg = s[0], &acc_delta = s[1];
    g = k.grad_factor * g;  // sign, clipping and loss scale, always first
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // second moment of the gradients
    square_avg = k.rho * square_avg + (k.one_minus_rho * g) * g;
    // second moment of the updates
    const V delta = sqrt(acc_delta + k.eps) / sqrt(square_avg + k.eps) * g;
    acc_delta = k.rho * acc_delta + (k.one_minus_rho * delta) * delta;
    // step
    return p - k.lr * delta;
  }
};

using adadelta = Variants<Adadelta>;

}  // namespace onepass::rules
