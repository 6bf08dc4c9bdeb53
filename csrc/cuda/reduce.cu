// Totals over a list of tensors, for the global gradient norm: one float64 partial per chunk, then one block joins them
// in a fixed order.
#include "core/reduction.hpp"
#include "cuda/device.cuh"
#include "cuda/engine.hpp"
#include "cuda/tuning.hpp"
#include "cuda/vector_io.cuh"

namespace onepass::cuda {
namespace {

struct ReduceTable {
  static constexpr int capacity = (tuning::parameter_bytes - 64) / (8 + 8 + 8 + 4);

  const void* data[capacity];
  const void* weight[capacity];  // for Total::weighted_squares
  std::int64_t size[capacity];
  std::uint32_t first_chunk[capacity];
  double* partials;
  Reduction reduction;
  std::int32_t n_tensors;
};

// The block's total, in thread 0. Every thread of the block calls it once.
template <int threads>
__device__ double block_total(Total total, double x) {
  ONEPASS_SHARED(double, of_warp, 32);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  ONEPASS_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) x = join(total, x, __shfl_xor_sync(0xffffffffu, x, distance));
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = empty_total(total);
  if (threadIdx.x == 0)
    for (int i = 0; i < threads / 32; ++i) x = join(total, x, of_warp[i]);
  return x;
}

// Adds the elements from `begin` to `end` to the thread's total, w adjacent ones per access. Squares of floats are
// summed in float, some accesses at a time, because many GPUs convert to float64 at 1/64 of the rate.
template <class T, Total kind, int w>
__device__ double add_elements(const Reduction& reduction, double total, const T* data, const T* weight, int begin,
                               int end) {
  constexpr int rounds = kind == Total::magnitudes ? 2 : tuning::reduce_rounds<w>;  // pow takes registers
  constexpr int step = tuning::reduce_threads * w;
  constexpr bool weighted = kind == Total::weighted_squares;
  for (int i = begin + int(threadIdx.x) * w; i < end; i += step * rounds) {
    Elements<T, w> e[rounds], factors[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      e[r] = Elements<T, w>::load(data + i + r * step, i + r * step < end);
      if constexpr (weighted) factors[r] = Elements<T, w>::load(weight + i + r * step, i + r * step < end);
    }
    if constexpr (kind == Total::squares && !std::is_same_v<T, double>) {
      SumOfSquares squares;
      ONEPASS_UNROLL
      for (int k = 0; k < rounds * w; ++k) squares.add(decode(e[k / w].at[k % w]));
      if (squares.is_accurate()) {
        total += squares.total();
        continue;
      }
    }
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      if (i + r * step >= end) break;
      ONEPASS_UNROLL
      for (int j = 0; j < w; ++j) {
        double x = decode(e[r].at[j]);
        if constexpr (weighted) x *= double(decode(factors[r].at[j]));
        total = add_element(reduction, total, x);
      }
    }
  }
  return total;
}

// `kind` is squares, weighted_squares or, for all other totals, magnitudes; these take their kind from the table at run
// time. The two kinds of squares are compiled apart, so that their loops have no branch.
template <class T, Total kind>
__global__ void __launch_bounds__(tuning::reduce_threads, tuning::reduce_blocks_per_sm)
    reduce_kernel(ONEPASS_GRID_CONSTANT(ReduceTable) table) {
  constexpr int w = width<T>;
  Reduction reduction = table.reduction;
  if constexpr (kind != Total::magnitudes) reduction.total = Total::squares;
  const Chunk chunk = chunk_of(table, blockIdx.x, tuning::reduce_chunk);
  const int tensor = chunk.tensor, n = chunk.size;
  const T* const data = static_cast<const T*>(table.data[tensor]) + chunk.begin;
  const T* const weight =
      kind == Total::weighted_squares ? static_cast<const T*>(table.weight[tensor]) + chunk.begin : data;

  const int whole = is_aligned16(data) && is_aligned16(weight) ? n / w * w : 0;
  double total = empty_total(reduction.total);
  total = add_elements<T, kind, w>(reduction, total, data, weight, 0, whole);
  total = add_elements<T, kind, 1>(reduction, total, data, weight, whole, n);

  total = block_total<tuning::reduce_threads>(reduction.total, total);
  if (threadIdx.x == 0) table.partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(tuning::join_threads)
    join_kernel(Total kind, const double* partials, std::int64_t n, bool root, double* out) {
  double total = empty_total(kind);
  for (std::int64_t i = threadIdx.x; i < n; i += tuning::join_threads) total = join(kind, total, partials[i]);
  total = block_total<tuning::join_threads>(kind, total);
  if (threadIdx.x == 0) *out = root ? sqrt(total) : total;
}

template <class T>
void launch_reduce(const Reduce& call) {
  ReduceTable table{};
  table.reduction = call.reduction;
  table.partials = call.partials;
  std::uint64_t n_chunks = 0;
  const auto flush = [&] {
    const auto kernel = call.reduction.total == Total::squares            ? &reduce_kernel<T, Total::squares>
                        : call.reduction.total == Total::weighted_squares ? &reduce_kernel<T, Total::weighted_squares>
                                                                          : &reduce_kernel<T, Total::magnitudes>;
    if (table.n_tensors > 0)
      launch("reduce", kernel, dim3(unsigned(n_chunks)), dim3(tuning::reduce_threads), 0, call.where.stream, table);
    table.partials += n_chunks;
    table.n_tensors = 0;
    n_chunks = 0;
  };
  for (std::int64_t i = 0; i < call.n_tensors; ++i) {
    const std::int64_t chunks = reduce_partials(call.sizes[i]);
    if (chunks == 0) continue;
    if (table.n_tensors == ReduceTable::capacity || n_chunks + std::uint64_t(chunks) > 0x7fffffffu) flush();
    table.data[table.n_tensors] = call.data[i];
    if (call.reduction.total == Total::weighted_squares) table.weight[table.n_tensors] = call.weights[i];
    table.size[table.n_tensors] = call.sizes[i];
    table.first_chunk[table.n_tensors++] = std::uint32_t(n_chunks);
    n_chunks += std::uint64_t(chunks);
  }
  flush();
}

}  // namespace

std::int64_t reduce_partials(std::int64_t size) { return (size + tuning::reduce_chunk - 1) / tuning::reduce_chunk; }

void reduce(const Reduce& call) {
  static_assert(sizeof(ReduceTable) <= tuning::parameter_bytes, "the table must fit the parameter block");
  const DeviceGuard guard(call.where.device);
  with_dtype(call.dtype, [&](auto type) { launch_reduce<typename decltype(type)::type>(call); });
}

void join_partials(Total total, const double* partials, std::int64_t n, bool root, double* out,
                   const StreamRef& where) {
  const DeviceGuard guard(where.device);
  launch("join", join_kernel, dim3(1), dim3(tuning::join_threads), 0, where.stream, total, partials, n, root, out);
}

}  // namespace onepass::cuda
