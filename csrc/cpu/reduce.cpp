#include "cpu/reduce.hpp"

namespace onepass::cpu::ONEPASS_ISA {
extern const ReduceFunction reduce_function;
const ReduceFunction reduce_function = &reduce;
}  // namespace onepass::cpu::ONEPASS_ISA
