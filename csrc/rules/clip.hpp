// Gradient clipping in place, outside a step: clip_grad_norm_ scales, clip_grad_value_ clamps.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

// The tensor to clip is the "param" here: one stream, read and written.
struct Clip {
  static constexpr int n_state = 0;
  static constexpr const char* state_names = "";
  static constexpr bool reads_grad = false;

  ONEPASS_HYPER(limit);  // largest absolute value; infinity: no limit

  template <class F>
  struct Step {
    F factor, lowest, highest;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    return {F(context.grad_factor), F(-h.limit), F(h.limit)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V, V*) {
    p = k.factor * p;
    p = select(p < k.lowest, V{} + k.lowest, p);  // comparisons with NaN are false, so NaN stays
    return select(p > k.highest, V{} + k.highest, p);
  }
};

using clip = Variants<Clip>;

}  // namespace onepass::rules
