// Dropout: every thread computes the random words of its elements, and recomputes them in backward, which costs less
// than reading a mask.
#include "cuda/device.cuh"
#include "cuda/dropout.cuh"
#include "cuda/engine.hpp"
#include "cuda/tuning.hpp"
#include "cuda/vector_io.cuh"

namespace onepass::cuda {
namespace {

// Elements that a thread processes at once: whole counters and whole 16-byte words.
template <class T>
constexpr int group = width<T> < Philox::words ? Philox::words : width<T>;

// Writes the bits of elements [first, first + count). A byte holds the bits of one thread or, if a thread has n = 4, of
// two adjacent ones. All lanes of the warp call it.
template <int n>
__device__ void write_mask(std::uint8_t* mask, std::int64_t first, int count, unsigned bits) {
  if constexpr (n < 8) bits |= __shfl_down_sync(0xffffffffu, bits, 1) << n;
  if (count > 0 && first % 8 == 0) mask[first / 8] = std::uint8_t(bits);
}

template <class T>
__global__ void __launch_bounds__(tuning::dropout_threads, tuning::dropout_blocks_per_sm)
    dropout_kernel(ONEPASS_GRID_CONSTANT(DropoutCall) call, bool aligned) {
  using F = Compute<T>;
  constexpr int n = group<T>, lanes = 32;
  const T* const x = static_cast<const T*>(call.x);
  T* const y = static_cast<T*>(call.y);
  const std::uint64_t seed = std::uint64_t(*call.dropout.seed), threshold = call.dropout.threshold;
  const F scale = F(call.dropout.scale);

  // `first` is the warp's first element: all lanes of a warp make the same number of iterations, for the shuffles.
  const int lane = int(threadIdx.x) % lanes;
  std::int64_t first = (std::int64_t(blockIdx.x) * tuning::dropout_threads + threadIdx.x - lane) * n;
  for (; first < call.size; first += std::int64_t(gridDim.x) * tuning::dropout_threads * n) {
    const std::int64_t i = first + lane * n, left = call.size - i;
    const int count = left >= n ? n : left > 0 ? int(left) : 0;
    const bool whole = aligned && count == n && y != nullptr;
    Elements<T, n> e;
    if (whole) e = Elements<T, n>::load(x + i);  // the load overlaps the computation of the bits

    unsigned bits = 0;
    if (!call.reads_mask)
      bits = keep_bits<n>(seed, threshold, i) & ((1u << count) - 1);
    else if (count > 0)
      bits = unsigned(call.mask[i / 8]) >> i % 8;
    if (call.mask != nullptr && !call.reads_mask) write_mask<n>(call.mask, i, count, bits);
    if (whole) {
      ONEPASS_UNROLL
      for (int j = 0; j < n; ++j) encode(e.at[j], drop(bits, j, decode(e.at[j]), scale));
      e.template store<tuning::output_store>(y + i);
    } else if (y != nullptr) {
      for (int j = 0; j < count; ++j) encode(y[i + j], drop(bits, j, decode(x[i + j]), scale));
    }
  }
}

template <class T>
void launch_dropout(const DropoutCall& call, void* stream) {
  constexpr std::int64_t at_once = std::int64_t(tuning::dropout_threads) * group<T>;  // per block
  const std::int64_t blocks = (call.size + at_once - 1) / at_once;
  if (blocks == 0) return;
  launch("dropout", dropout_kernel<T>, grid_of(blocks, tuning::dropout_threads), dim3(tuning::dropout_threads), 0,
         stream, call, is_aligned16(call.x) && is_aligned16(call.y));
}

}  // namespace

void dropout(const DropoutCall& call, const StreamRef& where) {
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype, [&](auto type) { launch_dropout<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
