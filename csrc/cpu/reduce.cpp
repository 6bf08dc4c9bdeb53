#include "cpu/reduce.hpp"

namespace onepass::cpu::ONEPASS_ISA {
extern const SumFunction sum_function;
const SumFunction sum_function = &sum_of_squares;
}  // namespace onepass::cpu::ONEPASS_ISA
