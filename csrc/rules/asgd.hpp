// ASGD (Polyak & Juditsky 1992): SGD with a falling step size, and the average of the weights it visits.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

struct ASGD {
  static constexpr int n_state = 1;
  static constexpr const char* state_names = "ax";       // the average
  static constexpr const char* state_kinds = "float32";  // weights, not gradients
  static constexpr bool reads_grad = true;

  ONEPASS_HYPER(lr, lambd, alpha, t0, weight_decay);

  // The step size and the weight of this step in the average. As in torch, a step uses what the step before it stored,
  // and so the learning rate of that step; the first has none before it.
  static constexpr const char* carried_names = "eta, mu";
  template <class F>
  ONEPASS_HD static void carry(const Hyper& h, double t, CarriedNumbers& now, CarriedNumbers& next) {
    if (t == 1) now = {F(h.lr), 1};
    next.at[0] = F(h.lr / real_power(1 + h.lambd * h.lr * t, h.alpha));
    next.at[1] = F(t - h.t0 > 1 ? 1 / (t - h.t0) : 1);
  }

  template <class F>
  struct Step {
    F grad_factor, weight_decay, eta, shrinkage, mu;
    bool averages;  // not yet: the average is the weight itself
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const double eta = context.carried.at[0], mu = context.carried.at[1];
    return {F(context.grad_factor), F(h.weight_decay), F(eta), F(1 - h.lambd * eta), F(mu), mu != 1};
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V (&s)[n_state]) {
    V& average = s[0];
    g = k.grad_factor * g;
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // step
    p = k.shrinkage * p - k.eta * g;
    // average
    average = k.averages ? average + k.mu * (p - average) : p;
    return p;
  }
};

using asgd = Variants<ASGD>;

}  // namespace onepass::rules
