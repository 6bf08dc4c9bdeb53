// The table of rules: what Python may ask for, and the function of each instruction set and device that does it.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/rule.hpp"
#include "cuda/engine.hpp"
#include "onepass_rules.hpp"  // made by CMake: includes every rule and defines ONEPASS_RULES(X)

// The instruction sets this build has, best last: ONEPASS_ISAS(X), made by CMake as well.
namespace onepass {

#define ONEPASS_DECLARE_ISA(isa) \
  namespace cpu::isa {           \
  extern const Engine engine;    \
  }
ONEPASS_ISAS(ONEPASS_DECLARE_ISA)
#undef ONEPASS_DECLARE_ISA

#define ONEPASS_DECLARE_RULE_OF(isa, rule)        \
  namespace cpu::isa {                            \
  extern const ApplyFunction* const rule##_table; \
  }
#define ONEPASS_DECLARE_RULE(rule)                \
  ONEPASS_ISAS_OF(ONEPASS_DECLARE_RULE_OF, rule)  \
  namespace cuda {                                \
  extern const ApplyFunction* const rule##_table; \
  }
ONEPASS_RULES(ONEPASS_DECLARE_RULE)
#undef ONEPASS_DECLARE_RULE
#undef ONEPASS_DECLARE_RULE_OF

// Order of the CPU functions in RuleVariant::cpu and of the names in isa_names.
inline const std::vector<std::string> isa_names = {
#define ONEPASS_ISA_NAME(isa) #isa,
    ONEPASS_ISAS(ONEPASS_ISA_NAME)
#undef ONEPASS_ISA_NAME
};

// The instruction set in use: an index into isa_names.
inline int current_isa = 0;

inline const Engine& cpu_engine() {
#define ONEPASS_ENGINE_OF(isa) &cpu::isa::engine,
  static const Engine* const engines[] = {ONEPASS_ISAS(ONEPASS_ENGINE_OF)};
#undef ONEPASS_ENGINE_OF
  return *engines[current_isa];
}

inline const Engine& engine_for(bool on_cuda) {
#if defined(ONEPASS_HAS_CUDA)
  return on_cuda ? cuda::engine : cpu_engine();
#else
  if (on_cuda)
    throw std::runtime_error("this build of onepass has no CUDA kernels");  // onepass._native advises earlier
  return cpu_engine();
#endif
}

struct RuleVariant {
  std::string rule;
  std::vector<std::string> hyper_names, state_names;
  std::vector<PyObject*> state_keys;  // state_names as interned Python strings, never freed
  bool reads_grad, takes_rows;
  PyObject* product_key;  // name of the running product, interned; null where the rule keeps none
  double (*product_factor)(const double* hyper, double t);
  std::vector<ApplyFunction> cpu;  // one for each of isa_names
  ApplyFunction cuda;              // null in a build without CUDA
};

// "a, b, c" as written in the rule file.
inline std::vector<std::string> split_names(const std::string& names) {
  std::vector<std::string> out;
  std::string name;
  for (const char c : names + ",") {
    if (c != ',') {
      if (c != ' ') name += c;
    } else if (!name.empty()) {
      out.push_back(name);
      name.clear();
    }
  }
  return out;
}

template <class Rule>
double product_factor(const double* hyper, double t) {
  typename Rule::Hyper h;
  std::memcpy(&h, hyper, sizeof h);
  return RunningProduct<Rule>::factor(h, t);
}

template <class Rule>
RuleVariant describe_variant(const char* name) {
  RuleVariant v{};
  v.rule = name;
  v.hyper_names = split_names(Rule::hyper_names);
  v.state_names = split_names(Rule::state_names);
  for (const std::string& state : v.state_names) v.state_keys.push_back(PyUnicode_InternFromString(state.c_str()));
  v.reads_grad = Rule::reads_grad;
  v.takes_rows = takes_rows<Rule>;
  if (*RunningProduct<Rule>::name != 0) v.product_key = PyUnicode_InternFromString(RunningProduct<Rule>::name);
  v.product_factor = &product_factor<Rule>;
  return v;
}

template <class... Rules>
void describe(std::vector<RuleVariant>& out, const char* name, Variants<Rules...>,
              const std::vector<const ApplyFunction*>& cpu_tables, const ApplyFunction* cuda_table) {
  int variant = 0;
  for (RuleVariant v : {describe_variant<Rules>(name)...}) {
    for (const auto* table : cpu_tables) v.cpu.push_back(table[variant]);
    if (cuda_table != nullptr) v.cuda = cuda_table[variant];
    out.push_back(v);
    ++variant;
  }
}

inline const std::vector<RuleVariant>& rule_variants() {
  static const std::vector<RuleVariant> all = [] {
    std::vector<RuleVariant> out;
#define ONEPASS_TABLE_OF(isa, rule) cpu::isa::rule##_table,
#if defined(ONEPASS_HAS_CUDA)
#define ONEPASS_CUDA_TABLE(rule) cuda::rule##_table
#else
#define ONEPASS_CUDA_TABLE(rule) nullptr
#endif
#define ONEPASS_DESCRIBE(rule) \
  describe(out, #rule, rules::rule{}, {ONEPASS_ISAS_OF(ONEPASS_TABLE_OF, rule)}, ONEPASS_CUDA_TABLE(rule));
    ONEPASS_RULES(ONEPASS_DESCRIBE)
    return out;
  }();
  return all;
}

}  // namespace onepass
