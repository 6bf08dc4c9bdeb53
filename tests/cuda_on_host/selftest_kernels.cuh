// Small kernels of the kinds that onepass has, each with typical mistakes. A mutant is the same kernel with one wrong
// line; Mutant::none is correct.
#pragma once

#include "cuda/platform.cuh"

namespace onepass::cuda::selftest {

enum class Mutant {
  none,
  // copy
  off_by_one_bound,
  missing_tail,
  misaligned_wide_access,
  unchecked_misaligned_access,
  // row_sums
  missing_barrier,
  missing_second_barrier,
  divergent_barrier,
  early_return,
  lanes_left_out,
  uninitialised_shared,
  shared_overrun,
  // grid_sum
  missing_atomic,
  missing_fence,
  fence_of_the_block_only,
  missing_second_fence,
  counter_not_reset,
  // histogram
  missing_shared_atomic,
  missing_global_atomic,
  missing_barrier_after_clearing,
  // transpose
  missing_syncwarp,
  dynamic_shared_overrun,
};

// Copies n floats, 16 bytes at a time if source and target are aligned.
template <Mutant mutant>
__global__ void copy(float* out, const float* in, int n) {
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
            step = static_cast<int>(gridDim.x * blockDim.x);
  constexpr bool assumes_aligned =
      mutant == Mutant::misaligned_wide_access || mutant == Mutant::unchecked_misaligned_access;
  const auto is_aligned = [](const void* p) { return reinterpret_cast<std::size_t>(p) % 16 == 0; };
  const int n_wide = assumes_aligned || (is_aligned(out) && is_aligned(in)) ? n / 4 : 0;
  for (int i = first; i < n_wide; i += step) {
    if constexpr (mutant == Mutant::unchecked_misaligned_access)
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(in)[i];
    else
      as_wide<uint4>(out)[i] = as_wide<uint4>(in)[i];
  }
  if constexpr (mutant == Mutant::missing_tail) return;
  const int end = mutant == Mutant::off_by_one_bound ? n + 1 : n;
  for (int i = n_wide * 4 + first; i < end; i += step) out[i] = in[i];
}

__device__ inline float warp_sum(float x) {
  ONEPASS_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sum of each row; a block processes one row after another.
template <Mutant mutant>
__global__ void row_sums(float* sums, const float* in, int n_rows, int n_columns) {
  ONEPASS_SHARED(float, partial, mutant == Mutant::shared_overrun ? 1 : 32);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int n_warps = static_cast<int>(blockDim.x) / 32;
  if (mutant == Mutant::early_return && thread >= n_columns) return;
  for (int row = static_cast<int>(blockIdx.x); row < n_rows; row += static_cast<int>(gridDim.x)) {
    float sum = 0;
    for (int c = thread; c < n_columns; c += static_cast<int>(blockDim.x)) sum += in[row * n_columns + c];
    if (mutant != Mutant::lanes_left_out || thread < n_columns) sum = warp_sum(sum);
    if (lane == 0) partial[warp] = sum;
    if constexpr (mutant == Mutant::divergent_barrier) {
      if (warp == 0)
        __syncthreads();
      else
        __syncthreads();
    } else if constexpr (mutant != Mutant::missing_barrier) {
      __syncthreads();
    }
    if (warp == 0) {
      sum = lane < n_warps || mutant == Mutant::uninitialised_shared ? partial[lane] : 0;
      sum = warp_sum(sum);
      if (lane == 0) sums[row] = sum;
    }
    if constexpr (mutant != Mutant::missing_second_barrier) __syncthreads();  // partial is reused
  }
}

// The total in one launch: the block that finishes last adds up the blocks' sums. The counter is 0 before and after.
template <Mutant mutant>
__global__ void grid_sum(float* sum, float* block_sums, unsigned* counter, const float* in, int n) {
  ONEPASS_SHARED(bool, is_last, 1);
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
            step = static_cast<int>(gridDim.x * blockDim.x);
  float mine = 0;
  for (int i = first; i < n; i += step) mine += in[i];
  mine = warp_sum(mine);
  if (threadIdx.x == 0) {
    block_sums[blockIdx.x] = mine;
    if constexpr (mutant == Mutant::fence_of_the_block_only)
      __threadfence_block();
    else if constexpr (mutant != Mutant::missing_fence)
      __threadfence();
    unsigned before;
    if constexpr (mutant == Mutant::missing_atomic) {
      before = *counter;
      *counter = before == gridDim.x - 1 ? 0 : before + 1;
    } else if constexpr (mutant == Mutant::counter_not_reset) {
      before = atomicAdd(counter, 1u);
    } else {
      before = atomicInc(counter, gridDim.x - 1);
    }
    is_last[0] = before == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  if constexpr (mutant != Mutant::missing_second_fence) __threadfence();
  mine = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) mine += block_sums[i];
  mine = warp_sum(mine);
  if (threadIdx.x == 0) *sum = mine;
}

// A histogram of 64 values: counted in shared memory, then added to the total.
template <Mutant mutant>
__global__ void histogram(unsigned* totals, const unsigned char* in, int n) {
  ONEPASS_SHARED(unsigned, counts, 64);
  for (unsigned bin = threadIdx.x; bin < 64; bin += blockDim.x) counts[bin] = 0;
  if constexpr (mutant != Mutant::missing_barrier_after_clearing) __syncthreads();
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
            step = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = first; i < n; i += step) {
    if constexpr (mutant == Mutant::missing_shared_atomic)
      ++counts[in[i]];
    else
      atomicAdd(&counts[in[i]], 1u);
  }
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < 64; bin += blockDim.x) {
    if constexpr (mutant == Mutant::missing_global_atomic)
      totals[bin] += counts[bin];
    else
      atomicAdd(&totals[bin], counts[bin]);
  }
}

// Each warp transposes its own 32 x 32 matrix in dynamic shared memory: 32 * 33 floats per warp.
template <Mutant mutant>
__global__ void transpose(float* out, const float* in) {
  ONEPASS_DYNAMIC_SHARED(float, tiles);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int matrix = static_cast<int>(blockIdx.x * blockDim.x / 32) + warp;
  float* const tile = tiles + warp * 32 * 33;
  for (int row = 0; row < 32; ++row) tile[row * 33 + lane] = in[matrix * 1024 + row * 32 + lane];
  if (mutant == Mutant::dynamic_shared_overrun && threadIdx.x == 0) tiles[blockDim.x * 33] = 0;
  if constexpr (mutant != Mutant::missing_syncwarp) __syncwarp();
  for (int row = 0; row < 32; ++row) out[matrix * 1024 + row * 32 + lane] = tile[lane * 33 + row];
}

}  // namespace onepass::cuda::selftest
