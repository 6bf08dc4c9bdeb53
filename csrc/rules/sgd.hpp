// SGD with momentum (Polyak 1964) or Nesterov momentum (Sutskever et al. 2013), in PyTorch's form and in the textbook
// form whose velocity includes the learning rate. The two differ only when the learning rate changes.
#pragma once
#include "core/rule.hpp"

namespace onepass::rules {

template <bool has_momentum>
struct Sgd {
  static constexpr int n_state = has_momentum ? 1 : 0;
  static constexpr const char* state_names = has_momentum ? "momentum_buffer" : "";
  static constexpr const char* state_kinds = has_momentum ? "signed" : "";
  static constexpr bool reads_grad = true;
  static constexpr bool takes_rows = !has_momentum;  // with momentum, rows without a gradient move too

  ONEPASS_HYPER(lr, momentum, dampening, weight_decay, nesterov, lr_in_velocity);

  template <class F>
  struct Step {
    F grad_factor, weight_decay, momentum;
    // Factors of                                           PyTorch        lr_in_velocity
    F velocity_gain;   // the gradient in the velocity      1 - dampening  lr
    F lookahead_gain;  // the gradient in Nesterov's step   1              lr
    F step_size;       // the step in the parameter         lr             1
    bool fresh, nesterov;
  };

  template <class F>
  ONEPASS_HD static Step<F> prepare(const Hyper& h, const StepContext& context) {
    const bool inside = h.lr_in_velocity != 0;
    Step<F> k;
    k.grad_factor = F(context.grad_factor);
    k.weight_decay = F(h.weight_decay);
    k.momentum = F(h.momentum);
    k.velocity_gain = F(inside ? h.lr : context.fresh ? 1 : 1 - h.dampening);  // torch: the first velocity is g
    k.lookahead_gain = F(inside ? h.lr : 1);
    k.step_size = F(inside && has_momentum ? 1 : h.lr);
    k.fresh = context.fresh;
    k.nesterov = h.nesterov != 0;
    return k;
  }

  template <class F, class V>
  ONEPASS_HD static V update(const Step<F>& k, V p, V g, V* s) {
    g = k.grad_factor * g;
    // decay
    if (k.weight_decay != 0) g = g + k.weight_decay * p;
    // first moment and step
    if constexpr (!has_momentum) {
      return p - k.step_size * g;
    } else {
      V& velocity = s[0];
      const V gain = k.velocity_gain * g;
      velocity = k.fresh ? gain : k.momentum * velocity + gain;
      if (k.nesterov) return p - k.step_size * (k.momentum * velocity + k.lookahead_gain * g);
      return p - k.step_size * velocity;
    }
  }
};

using sgd = Variants<Sgd<false>, Sgd<true>>;

}  // namespace onepass::rules
