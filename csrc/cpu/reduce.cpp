// Compiled apart from the layers, without fused multiply-adds: every instruction set gives norms with the same bits.
#include "cpu/reduce.hpp"

#include <cmath>

namespace onepass::cpu::ONEPASS_ISA {

void reduce(const Reduce& call) {
  with_dtype(call.dtype, [&](auto type) { reduce_as<typename decltype(type)::type>(call); });
}

std::int64_t reduce_partials(std::int64_t size) { return reduce_blocks(size); }

void join_partials(Total kind, const double* partials, std::int64_t n, bool root, double* out, const StreamRef&) {
  double total = empty_total(kind);
  for (std::int64_t i = 0; i < n; ++i) total = join(kind, total, partials[i]);
  *out = root ? std::sqrt(total) : total;
}

}  // namespace onepass::cpu::ONEPASS_ISA
