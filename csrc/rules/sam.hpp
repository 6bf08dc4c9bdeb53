// The two passes of SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021): perturb the weights before the second gradient
// is computed, and restore them after it. The old weights are stored, so that restoring them is exact to the bit.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

template <bool perturbs>
struct Sam {
  static constexpr int n_state = 1;
  static constexpr const char* state_names = "old_param";
  static constexpr bool reads_grad = perturbs;
  static constexpr bool writes_state = perturbs;
  static constexpr bool overwrites = true;

  ONEPASS_HYPER(rho, adaptive);  // used by the perturbing pass

  template <class F>
  struct Step {
    F scale;
    bool adaptive;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    return {F(h.rho * context.grad_factor), h.adaptive != 0};  // the factor normalises: sign / (norm + epsilon)
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    if constexpr (!perturbs) return s[0];
    s[0] = p;
    V e = k.scale * g;
    if (k.adaptive) e = (e * p) * p;  // in this order: p * p could overflow
    return p + e;
  }
};

using sam = Variants<Sam<true>, Sam<false>>;

}  // namespace onepass::rules
