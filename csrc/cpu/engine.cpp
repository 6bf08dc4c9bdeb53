// The engine of one instruction set. The update rules have generated files of their own, see cmake/apply.cpp.in.
#include "core/engine.hpp"

#include "cpu/batch_norm_backward.hpp"
#include "cpu/row_norm.hpp"

namespace onepass::cpu::ONEPASS_ISA {

void reduce(const Reduce& call);
std::int64_t reduce_partials(std::int64_t size);
void join_partials(Total total, const double* partials, std::int64_t n, bool root, double* out, const StreamRef& where);

extern const Engine engine;
const Engine engine = {
    &reduce,
    &reduce_partials,
    &join_partials,
    &dropout,
    &row_norm,
    &row_norm_backward,
    &batch_norm,
    &batch_norm_backward,
    &row_norm_workspace,
    &row_norm_backward_workspace,
    &batch_norm_workspace,
};

}  // namespace onepass::cpu::ONEPASS_ISA
