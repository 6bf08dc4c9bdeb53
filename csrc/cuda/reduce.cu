// Sum of squares over a list of tensors: a float64 sum a chunk, then one block joins the chunks in a fixed order.
#include "core/value.hpp"
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.hpp"
#include "cuda/tuning.hpp"

namespace onepass::cuda {
namespace {

struct SumTable {
  static constexpr int capacity = (tuning::parameter_bytes - 64) / (8 + 8 + 4);

  const void* data[capacity];
  std::int64_t size[capacity];
  std::uint32_t first_chunk[capacity];
  double* partials;
  std::int32_t n_tensors;
};

// The sum over the block, in thread 0. Every thread of the block calls it once.
template <int threads>
__device__ double block_sum(double x) {
  ONEPASS_SHARED(double, of_warp, 32);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  ONEPASS_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < threads / 32; ++i) x += of_warp[i];
  return x;
}

template <class T>
__global__ void __launch_bounds__(tuning::sum_threads) sum_kernel(ONEPASS_GRID_CONSTANT(SumTable) table) {
  constexpr int w = width<T>;
  const int tensor = find_tensor(table.first_chunk, table.n_tensors, blockIdx.x);
  const std::int64_t offset = std::int64_t(blockIdx.x - table.first_chunk[tensor]) * tuning::sum_chunk;
  const std::int64_t left = table.size[tensor] - offset;
  const int n = left < tuning::sum_chunk ? int(left) : tuning::sum_chunk;
  const T* const data = static_cast<const T*>(table.data[tensor]) + offset;

  double sum = 0;
  const int whole = is_aligned16(data) ? n / w * w : 0;
  for (int i = int(threadIdx.x) * w; i < whole; i += tuning::sum_threads * w) {
    const auto e = Elements<T, w>::load(data + i);
    ONEPASS_UNROLL
    for (int j = 0; j < w; ++j) sum += double(decode(e.at[j])) * double(decode(e.at[j]));
  }
  for (int i = whole + int(threadIdx.x); i < n; i += tuning::sum_threads)
    sum += double(decode(data[i])) * double(decode(data[i]));

  sum = block_sum<tuning::sum_threads>(sum);
  if (threadIdx.x == 0) table.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(tuning::total_threads)
    join_kernel(const double* partials, std::int64_t n, double* out) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += tuning::total_threads) sum += partials[i];
  sum = block_sum<tuning::total_threads>(sum);
  if (threadIdx.x == 0) *out = sum;
}

template <class T>
void launch_sum(const SumOfSquares& call) {
  SumTable table{};
  table.partials = call.partials;
  std::uint64_t n_chunks = 0;
  const auto flush = [&] {
    if (table.n_tensors > 0)
      launch("sum_of_squares", sum_kernel<T>, dim3(unsigned(n_chunks)), dim3(tuning::sum_threads), 0, call.where.stream,
             table);
    table.partials += n_chunks;
    table.n_tensors = 0;
    n_chunks = 0;
  };
  for (std::int64_t i = 0; i < call.n_tensors; ++i) {
    const std::int64_t chunks = sum_chunks(call.sizes[i]);
    if (chunks == 0) continue;
    if (table.n_tensors == SumTable::capacity || n_chunks + std::uint64_t(chunks) > 0x7fffffffu) flush();
    table.data[table.n_tensors] = call.data[i];
    table.size[table.n_tensors] = call.sizes[i];
    table.first_chunk[table.n_tensors++] = std::uint32_t(n_chunks);
    n_chunks += std::uint64_t(chunks);
  }
  flush();
}

}  // namespace

std::int64_t sum_chunks(std::int64_t size) { return (size + tuning::sum_chunk - 1) / tuning::sum_chunk; }

void sum_of_squares(const SumOfSquares& call) {
  static_assert(sizeof(SumTable) <= tuning::parameter_bytes, "the table must fit the parameter block");
  const DeviceGuard guard(call.where.device);
  switch (call.dtype) {
    case DType::float32: return launch_sum<float>(call);
    case DType::float64: return launch_sum<double>(call);
    case DType::bfloat16: return launch_sum<__nv_bfloat16>(call);
    case DType::float16: return launch_sum<__half>(call);
  }
}

void join_sums(const double* partials, std::int64_t n, double* sum, const Where& where) {
  const DeviceGuard guard(where.device);
  launch("join_sums", join_kernel, dim3(1), dim3(tuning::total_threads), 0, where.stream, partials, n, sum);
}

int device_count() {
#if defined(__CUDACC__)
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
#else
  return 1;
#endif
}

}  // namespace onepass::cuda
