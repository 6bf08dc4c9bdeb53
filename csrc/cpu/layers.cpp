#include "cpu/batch_norm_backward.hpp"
#include "cpu/row_norm.hpp"

namespace onepass::cpu::ONEPASS_ISA {
extern const Layers layers;
const Layers layers = {&dropout, &row_norm, &row_norm_backward, &batch_norm, &batch_norm_backward};
}  // namespace onepass::cpu::ONEPASS_ISA
