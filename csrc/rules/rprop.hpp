// Resilient propagation: iRprop- (Igel & Huesken 2003), which is PyTorch's, and Rprop- without weight backtracking
// (Riedmiller & Braun 1993). Every element has its own step size; only the sign of the gradient matters.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Rprop {
  static constexpr int n_state = 2;
  static constexpr const char* state_names = "prev, step_size";
  static constexpr const char* state_kinds = "exact, exact";
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(eta_minus, eta_plus, smallest_step, largest_step, zero_after_turn);  // zero_after_turn: iRprop-

  template <class F>
  struct Step {
    F grad_factor, smallest, largest;
    F same_sign, no_sign, other_sign;  // factors of the step size, by the sign of gradient * previous gradient
    bool zero_after_turn;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const bool irprop = h.zero_after_turn != 0;
    const bool keeps = irprop || context.t == 1;  // the first step has no previous gradient
    return {F(context.grad_factor),
            F(h.smallest_step),
            F(h.largest_step),
            F(h.eta_plus),
            F(keeps ? 1 : h.eta_minus),
            F(h.eta_minus),
            irprop};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V &previous = s[0], &step_size = s[1];
    g = k.grad_factor * g;
    // step size
    const V zero{}, one = zero + F(1), product = g * previous;  // comparisons with NaN are false: no_sign
    const V factor =
        select(product > 0, zero + k.same_sign, select(product < 0, zero + k.other_sign, zero + k.no_sign));
    step_size = factor * step_size;
    step_size = select(step_size < k.smallest, zero + k.smallest, step_size);
    step_size = select(step_size > k.largest, zero + k.largest, step_size);
    if (k.zero_after_turn) g = select(product < 0, zero, g);
    previous = g;
    // step
    return p - select(g > 0, one, select(g < 0, -one, zero)) * step_size;
  }
};

using rprop = Variants<Rprop>;

}  // namespace onepass::rules
