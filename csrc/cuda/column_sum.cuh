// Sums over the rows of an array: threads whose numbers differ by a multiple of `columns` have the same columns.
#pragma once
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

// Replaces x by its sum over the block's threads with the same threadIdx.x % columns; `columns` is a power of two up to
// 32. All threads of the block call it, at most once per kernel for each n.
template <int threads = tuning::column_threads, class F, int n>
__device__ void column_totals(F (&x)[n], int columns) {
  constexpr int lanes = 32, warps = threads / lanes;
  ONEPASS_SHARED(F, warp_sums, n * warps * lanes);
  for (int distance = columns; distance < lanes; distance *= 2) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
  }
  const int lane = int(threadIdx.x) % lanes, warp = int(threadIdx.x) / lanes;
  ONEPASS_UNROLL
  for (int k = 0; k < n; ++k) warp_sums[(k * warps + warp) * lanes + lane] = x[k];
  __syncthreads();
  ONEPASS_UNROLL
  for (int k = 0; k < n; ++k) x[k] = 0;
  for (int i = 0; i < warps; ++i) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += warp_sums[(k * warps + i) * lanes + lane];
  }
}

}  // namespace onepass::cuda
