// A team: the threads that process one row together. A thread's share of the row, and sums over the team.
#pragma once
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

// A thread's share of n contiguous elements: w adjacent ones per round. n and all addresses must be multiples of w.
template <int w>
struct Share {
  int lane, team, n;

  __device__ int offset(int round) const { return (round * team + lane) * w; }
  __device__ bool has(int round) const { return offset(round) < n; }

  // Zeros if the thread has no elements in this round.
  template <class T>
  __device__ Elements<T, w> load(const T* p, int round) const {
    return Elements<T, w>::load(p + offset(round), has(round));
  }
  template <class T>
  __device__ Elements<T, w> load_cached(const T* p, int round) const {
    return Elements<T, w>::load_cached(p + offset(round), has(round));
  }
  template <tuning::Store how = tuning::output_store, class T>
  __device__ void store(T* p, int round, const Elements<T, w>& x) const {
    if (has(round)) x.template store<how>(p + offset(round));
  }
};

// Weights or biases, stored as T or F: one per column, or one for all columns. Without them all are `fallback`.
template <class T>
struct Affine {
  using F = Compute<T>;
  const void* per_column;  // null: all are `one`
  bool stored_as_f;
  F one;

  __device__ Affine(const void* p, DType weight_dtype, DType dtype, bool is_scalar, F fallback)
      : per_column(is_scalar ? nullptr : p), stored_as_f(weight_dtype != dtype), one(fallback) {
    if (p != nullptr && is_scalar) one = F(number_at(weight_dtype, p, 0));
  }

  template <int w>
  __device__ Elements<F, w> load(const Share<w>& share, std::int64_t base, int round) const {
    Elements<F, w> x;
    if (per_column == nullptr) {
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e) x.at[e] = one;
    } else if (std::is_same_v<T, F> || stored_as_f) {
      x = share.load_cached(static_cast<const F*>(per_column) + base, round);
    } else {
      const Elements<T, w> stored = share.load_cached(static_cast<const T*>(per_column) + base, round);
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e) x.at[e] = decode(stored.at[e]);
    }
    return x;
  }
};

// Threads of a team: the smallest power of two, at most max_team, whose threads hold a row with `elements` each.
inline int team_of(std::int64_t size, int elements, int max_team) {
  int team = 1;
  while (team < max_team && std::int64_t(team) * elements < size) team *= 2;
  return team;
}

// The threads of a block that process one row. A block of at most `small_block` threads may hold several teams; a
// larger one is a team, so that the compiler knows its size. Team sizes are powers of two.
constexpr int small_block = 128;
template <int threads>
struct Team {
  int log2_size;  // of small blocks

  __device__ int size() const { return threads > small_block ? threads : 1 << log2_size; }
  __device__ int lane() const { return int(threadIdx.x) & (size() - 1); }
  __device__ int number() const { return threads > small_block ? 0 : int(threadIdx.x) >> log2_size; }
  __device__ int per_block() const { return threads > small_block ? 1 : threads >> log2_size; }

  // Replaces x by its sum over the team. All threads of the block call it. Calls alternate between two buffers, so one
  // barrier per call suffices: a thread that writes a buffer has passed the previous call's barrier, and by then every
  // thread has finished reading that buffer. `buffer` is 0 at the first call.
  template <class F, int n>
  __device__ void totals(F (&x)[n], int& buffer) const {
    constexpr int lanes = 32, warps = threads / lanes;
    ONEPASS_SHARED(F, warp_sums, 2 * n * warps);
    const int team = size();
    ONEPASS_UNROLL
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      if (threads <= small_block && distance >= team) continue;
      ONEPASS_UNROLL
      for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
    }
    if (team <= lanes) return;
    F* const totals = warp_sums + buffer * n * warps;
    buffer ^= 1;
    if (threadIdx.x % lanes == 0) {
      ONEPASS_UNROLL
      for (int k = 0; k < n; ++k) totals[k * warps + int(threadIdx.x) / lanes] = x[k];
    }
    __syncthreads();
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] = 0;
    const int first = number() * (team / lanes);
    ONEPASS_UNROLL
    for (int i = 0; i < warps; ++i) {
      if (threads <= small_block && i >= team / lanes) break;
      ONEPASS_UNROLL
      for (int k = 0; k < n; ++k) x[k] += totals[k * warps + first + i];
    }
  }
};

// f(std::integral_constant<int, threads>) for the block of a team: the smallest that holds it.
template <int most, int threads = small_block, class F>
void with_block(int team, const F& f) {
  if constexpr (threads < most) {
    if (team > threads) return with_block<most, threads * 2>(team, f);
  }
  f(std::integral_constant<int, threads>{});
}

inline int log2_of(int power_of_two) {
  int n = 0;
  while (1 << n < power_of_two) ++n;
  return n;
}

}  // namespace onepass::cuda
