// Lookahead's synchronisation (Zhang et al. 2019): the slow weights move towards the fast ones, which restart from
// there.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct Lookahead {
  static constexpr int n_state = 1;
  static constexpr const char* state_names = "slow_param";
  static constexpr bool reads_grad = false;

  ONEPASS_HYPER(alpha);

  template <class F>
  struct Step {
    F alpha, one_minus_alpha;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext&) {
    return {F(h.alpha), F(1 - h.alpha)};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V, V (&s)[n_state]) {
    return s[0] = lerp(s[0], p, k.alpha, k.one_minus_alpha);
  }
};

using lookahead = Variants<Lookahead>;

}  // namespace onepass::rules
