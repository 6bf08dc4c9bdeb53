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

// Whether a rule writes its states. One that only reads them says so by  static constexpr bool writes_state = false;
// the memory then moves once.
template <class Rule>
constexpr auto writes_state(int) -> decltype(Rule::writes_state) {
  return Rule::writes_state;
}
template <class Rule>
constexpr bool writes_state(long) {
  return true;
}

// What prepare() is told about the step at hand beside the hyper-parameters.
struct StepContext {
  double t;            // number of the step, from 1
  double grad_factor;  // sign, clipping and loss scale in one; the rule multiplies the gradient by it first
  bool fresh;          // the states were made for this very step
};

}  // namespace onepass
