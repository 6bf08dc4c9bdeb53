// Sums down the columns of an array: threads that are `columns` apart work on the same ones.
#pragma once
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

// Replaces x by its sums over the threads of the block with the same threadIdx.x % columns, for all of them; columns
// is a power of two up to 32. All tuning::column_threads of the block take part, once in a kernel for each n.
template <class F, int n>
__device__ void column_totals(F (&x)[n], int columns) {
  constexpr int lanes = 32, warps = tuning::column_threads / lanes;
  ONEPASS_SHARED(F, of_warps, n * warps * lanes);
  for (int distance = columns; distance < lanes; distance *= 2) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
  }
  const int lane = int(threadIdx.x) % lanes, warp = int(threadIdx.x) / lanes;
  ONEPASS_UNROLL
  for (int k = 0; k < n; ++k) of_warps[(k * warps + warp) * lanes + lane] = x[k];
  __syncthreads();
  ONEPASS_UNROLL
  for (int k = 0; k < n; ++k) x[k] = 0;
  for (int i = 0; i < warps; ++i) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += of_warps[(k * warps + i) * lanes + lane];
  }
}

}  // namespace onepass::cuda
