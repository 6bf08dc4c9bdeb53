// What a rule file (rules/*.hpp) declares about itself; CONTRIBUTING.md walks through one.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

// The hyper-parameters: doubles, which Python passes by these names. Boolean options are 0 or 1.
#define ONEPASS_HYPER(...) \
  struct Hyper {           \
    double __VA_ARGS__;    \
  };                       \
  static constexpr const char* hyper_names = #__VA_ARGS__

namespace onepass {

// What the values of a rule's states are, for the formats of core/storage.hpp, in the order of state_names:
//   static constexpr const char* state_kinds = "signed, square, exact";
// signed: a moment of the gradient. square: never negative. exact: 8 bits are too few. float32: 16 are too few. Without
// the declaration all states are float32.
template <class Rule, class = void>
constexpr const char* state_kinds = "";
template <class Rule>
constexpr const char* state_kinds<Rule, decltype(void(Rule::state_kinds))> = Rule::state_kinds;

// Two optional traits of a rule:
//   static constexpr bool writes_state = false;  // the states are only read
//   static constexpr bool overwrites = true;     // it writes the parameter or a state without using the old values
template <class Rule, class = void>
constexpr bool writes_state = true;
template <class Rule>
constexpr bool writes_state<Rule, decltype(void(Rule::writes_state))> = Rule::writes_state;

template <class Rule, class = void>
constexpr bool overwrites = false;
template <class Rule>
constexpr bool overwrites<Rule, decltype(void(Rule::overwrites))> = Rule::overwrites;

// What prepare() knows about the current step besides the hyper-parameters.
struct StepContext {
  double t;            // number of the step, from 1
  double grad_factor;  // sign, clipping and loss scale; the rule first multiplies the gradient by it
  bool fresh;          // the states were created for this step
  double product;      // the running product, including this step's factor
};

// A rule may keep a running product of one factor per step for each parameter, as a 0-d state like the step count
// (NAdam's mu_product). It then declares
//   static constexpr const char* product_name = "mu_product";
//   ONEPASS_HD static double product_factor(const Hyper&, double t);
// and reads StepContext::product. Other rules need not mention it.
template <class Rule, class = void>
struct RunningProduct {
  static constexpr const char* name = "";
  ONEPASS_HD static double factor(const typename Rule::Hyper&, double) { return 1; }
};
template <class Rule>
struct RunningProduct<Rule, decltype(void(Rule::product_name))> {
  static constexpr const char* name = Rule::product_name;
  ONEPASS_HD static double factor(const typename Rule::Hyper& h, double t) { return Rule::product_factor(h, t); }
};

// A rule that leaves elements with a zero gradient unchanged, or is meant to skip them, can update just the rows that a
// sparse gradient has. It then declares
//   static constexpr bool takes_rows = true;
template <class Rule, class = void>
constexpr bool takes_rows = false;
template <class Rule>
constexpr bool takes_rows<Rule, decltype(void(Rule::takes_rows))> = Rule::takes_rows;

// In the precision of the state, like torch's `mu_product *= mu`.
ONEPASS_HD double next_product(double product, double factor, bool is_double) {
  return is_double ? product * factor : double(float(product) * float(factor));
}

}  // namespace onepass
