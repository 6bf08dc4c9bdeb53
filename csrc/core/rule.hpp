// What a rule file (rules/*.hpp) needs to say about itself; CONTRIBUTING.md walks through one.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

// The hyper-parameters: doubles, in Python passed by these very names. Yes/no options are 0 or 1.
#define ONEPASS_HYPER(...) \
  struct Hyper {           \
    double __VA_ARGS__;    \
  };                       \
  static constexpr const char* hyper_names = #__VA_ARGS__

namespace onepass {

// Two traits that a rule may have. It writes its states unless it says  static constexpr bool writes_state = false; and
// the memory then moves once. And it overwrites something whose old values it does not use, the parameter or a state,
// if it says  static constexpr bool overwrites = true.
template <class Rule, class = void>
constexpr bool writes_state = true;
template <class Rule>
constexpr bool writes_state<Rule, decltype(void(Rule::writes_state))> = Rule::writes_state;

template <class Rule, class = void>
constexpr bool overwrites = false;
template <class Rule>
constexpr bool overwrites<Rule, decltype(void(Rule::overwrites))> = Rule::overwrites;

// What prepare() is told about the step at hand beside the hyper-parameters.
struct StepContext {
  double t;            // number of the step, from 1
  double grad_factor;  // sign, clipping and loss scale in one; the rule multiplies the gradient by it first
  bool fresh;          // the states were made for this very step
};

}  // namespace onepass
