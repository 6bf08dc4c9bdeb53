// The gradients of weight and bias of LayerNorm and RMSNorm as sums over columns: a kernel per part of the rows, and
// one that joins the partial sums in order.
#pragma once
#include <algorithm>

#include "cuda/column_sum.cuh"
#include "cuda/engine.hpp"
#include "cuda/vector_io.cuh"
#include "rows/norm.hpp"

namespace onepass::cuda {
namespace {

// A block sums over a strip of columns and a part of the rows, and writes partials[part][2][size] or, for scalars,
// [part][strip][2]. `columns` adjacent threads have w columns each.
template <class T, int w>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
    row_norm_columns_kernel(ONEPASS_GRID_CONSTANT(RowNormBackward) call, int columns) {
  using F = Compute<T>;
  constexpr int rounds = tuning::column_rounds<w>;
  const int together = tuning::column_threads / columns;  // rows
  const std::int64_t column = (std::int64_t(blockIdx.x) * columns + threadIdx.x % columns) * w;
  const bool exists = column < call.size;
  F sums[2 * w] = {};
  for (std::int64_t row = std::int64_t(blockIdx.y) * together * rounds + threadIdx.x / columns; row < call.rows;
       row += std::int64_t(gridDim.y) * together * rounds) {
    Elements<T, w> x[rounds], dy[rounds];
    rows::Stats<F> stats[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const std::int64_t at = row + r * together;
      const bool here = exists && at < call.rows;
      x[r] = Elements<T, w>::load(static_cast<const T*>(call.x) + at * call.size + column, here);
      dy[r] = Elements<T, w>::load(static_cast<const T*>(call.dy) + at * call.size + column, here);
      stats[r] = {0, 0, 0};
      if (here) stats[r] = rows::Stats<F>::kept(call.stats, call.rows, at, Cached{});
    }
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int r = k / w, e = k % w;
      sums[e] += decode(dy[r].at[e]) * stats[r].normalised(F(decode(x[r].at[e])));
      sums[w + e] += decode(dy[r].at[e]);
    }
  }
  F* const partials = static_cast<F*>(call.workspace);
  if (call.scalar_affine) {
    F total[2] = {0, 0};
    ONEPASS_UNROLL
    for (int e = 0; e < w; ++e) {
      total[0] += sums[e];
      total[1] += sums[w + e];
    }
    column_totals(total, 1);
    if (threadIdx.x < 2)
      partials[(std::int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 + threadIdx.x] =
          threadIdx.x == 0 ? total[0] : total[1];
    return;
  }
  column_totals(sums, columns);
  if (int(threadIdx.x) >= columns || !exists) return;
  ONEPASS_UNROLL
  for (int e = 0; e < w; ++e) {
    partials[std::int64_t(blockIdx.y) * 2 * call.size + column + e] = sums[e];
    partials[(std::int64_t(blockIdx.y) * 2 + 1) * call.size + column + e] = sums[w + e];
  }
}

// Adds up the partial sums, each thread every so many of a column, then the threads in order.
template <class F>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
    row_norm_join_kernel(const F* partials, std::int64_t n, std::int64_t columns, DType dtype, void* dweight,
                         void* dbias) {
  constexpr int together = tuning::join_columns, rounds = tuning::join_rounds;
  constexpr int groups = tuning::column_threads / together;
  const std::int64_t column = std::int64_t(blockIdx.x) * together + threadIdx.x % together;
  const bool exists = column < 2 * columns;
  F total[1] = {0};
  for (std::int64_t i = threadIdx.x / together; exists && i < n; i += groups * rounds) {
    Elements<F, 1> part[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r)
      part[r] = Elements<F, 1>::load(partials + (i + r * groups) * 2 * columns + column, i + r * groups < n);
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) total[0] += part[r].at[0];
  }
  column_totals(total, together);
  void* const out = column < columns ? dweight : dbias;
  if (threadIdx.x < together && exists && out != nullptr) set_number_at(dtype, out, column % columns, double(total[0]));
}

// Number of parts of the rows: about 1024 blocks in all, with 128 columns and at least 32 rows each.
std::int64_t column_parts(std::int64_t rows, std::int64_t size) {
  return std::max<std::int64_t>(1, std::min({(rows + 31) / 32, (std::int64_t{1} << 17) / size, std::int64_t{256}}));
}

}  // namespace
}  // namespace onepass::cuda
