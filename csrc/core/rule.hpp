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

// Whether any of them may have fewer bits: whether some kind is not "float32", the only one that begins with an f.
constexpr bool any_may_shrink(const char* kinds) {
  for (bool at_start = true; *kinds != 0; at_start = *kinds == ' ', ++kinds)
    if (at_start && *kinds != 'f') return true;
  return false;
}
template <class Rule, class = void>
constexpr bool declares_state_kinds = false;
template <class Rule>
constexpr bool declares_state_kinds<Rule, decltype(void(Rule::state_kinds))> = true;
// Whether a parameter of type T, or its states, can be in another format. float64 has none, nor has a pass that is no
// optimizer's rule and so says nothing about its states.
template <class Rule, class T, class Bfloat16>
constexpr bool has_formats = declares_state_kinds<Rule> && same_type<Compute<T>, float> &&
                             (same_type<T, Bfloat16> || any_may_shrink(state_kinds<Rule>));

// Three optional traits of a rule:
//   static constexpr bool writes_state = false;  // the states are only read
//   static constexpr bool overwrites = true;     // it writes the parameter or a state without using the old values
//   static constexpr bool many_registers = true; // its arithmetic does not fit 64 registers of a CUDA thread
template <class Rule, class = void>
constexpr bool writes_state = true;
template <class Rule>
constexpr bool writes_state<Rule, decltype(void(Rule::writes_state))> = Rule::writes_state;

template <class Rule, class = void>
constexpr bool overwrites = false;
template <class Rule>
constexpr bool overwrites<Rule, decltype(void(Rule::overwrites))> = Rule::overwrites;

template <class Rule, class = void>
constexpr bool many_registers = false;
template <class Rule>
constexpr bool many_registers<Rule, decltype(void(Rule::many_registers))> = Rule::many_registers;

// What prepare() knows about the current step besides the hyper-parameters.
struct StepContext {
  double t;                // number of the step, from 1
  double grad_factor;      // sign, clipping and loss scale; the rule first multiplies the gradient by it
  bool fresh;              // the states were created for this step
  CarriedNumbers carried;  // what the rule carries from step to step
};

// A rule may carry numbers from step to step for each parameter, as 0-d states like the step count (NAdam's mu_product,
// ASGD's eta and mu). It then declares
//   static constexpr const char* carried_names = "eta, mu";
//   template <class F>  // the type of the states, to which every number is rounded
//   ONEPASS_HD static void carry(const Hyper&, double t, CarriedNumbers& now, CarriedNumbers& next);
// and reads StepContext::carried. `now` comes as the last step stored it and leaves as this step uses it; `next` is
// stored for the step after this. Other rules need not mention it.
template <class Rule, class = void>
struct Carried {
  static constexpr const char* names = "";
  template <class F>
  ONEPASS_HD static void carry(const typename Rule::Hyper&, double, CarriedNumbers&, CarriedNumbers&) {}
};
template <class Rule>
struct Carried<Rule, decltype(void(Rule::carried_names))> {
  static constexpr const char* names = Rule::carried_names;
  template <class F>
  ONEPASS_HD static void carry(const typename Rule::Hyper& h, double t, CarriedNumbers& now, CarriedNumbers& next) {
    Rule::template carry<F>(h, t, now, next);
  }
};

// A rule that leaves elements with a zero gradient unchanged, or is meant to skip them, can update just the rows that a
// sparse gradient has. It then declares
//   static constexpr bool takes_rows = true;
template <class Rule, class = void>
constexpr bool takes_rows = false;
template <class Rule>
constexpr bool takes_rows<Rule, decltype(void(Rule::takes_rows))> = Rule::takes_rows;

}  // namespace onepass
