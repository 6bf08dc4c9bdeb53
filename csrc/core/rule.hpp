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
  double product;      // the running product, this step's factor included
};

// A rule may keep a running product of one factor a step for each parameter, a 0-d state beside the step count (NAdam's
// mu_product). It then has
//   static constexpr const char* product_name = "mu_product";
//   ONEPASS_HD static double product_factor(const Hyper&, double t);
// and finds the product in the StepContext. Others need not mention it.
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

// A rule whose update leaves elements with a zero gradient alone, or is meant to pass over them, may be given the rows
// of a sparse gradient only: it then has
//   static constexpr bool takes_rows = true;
template <class Rule, class = void>
constexpr bool takes_rows = false;
template <class Rule>
constexpr bool takes_rows<Rule, decltype(void(Rule::takes_rows))> = Rule::takes_rows;

// In the precision that the state is kept in, like torch's `mu_product *= mu`.
ONEPASS_HD double next_product(double product, double factor, bool is_double) {
  return is_double ? product * factor : double(float(product) * float(factor));
}

}  // namespace onepass
