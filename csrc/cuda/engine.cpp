#include "cuda/engine.hpp"

namespace onepass::cuda {

const Engine engine = {
    &reduce,
    &reduce_partials,
    &join_partials,
    nullptr,
    &dropout,
    &row_norm,
    &row_norm_backward,
    &batch_norm,
    &batch_norm_backward,
    [](const RowNorm&) -> std::int64_t { return 0; },
    &row_norm_backward_workspace,
    &batch_norm_workspace,
};

}  // namespace onepass::cuda
