// A team: the threads that process one row together. A thread's share of the row, and sums over the team.
#pragma once
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

// A thread's share of n contiguous elements: w adjacent ones per round. With w > 1 they are moved by 16-byte accesses,
// and n and all addresses must be multiples.
template <int w>
struct Share {
  int lane, team, n;

  __device__ int offset(int round) const { return (round * team + lane) * w; }
  __device__ bool has(int round) const { return offset(round) < n; }

  // Zeros if the thread has no elements in this round.
  template <class T>
  __device__ Elements<T, w> load(const T* p, int round) const {
    Elements<T, w> x{};
    if (has(round)) x = Elements<T, w>::load(p + offset(round));
    return x;
  }
  template <class T>
  __device__ void store(T* p, int round, const Elements<T, w>& x) const {
    if (has(round)) x.store(p + offset(round));
  }
};

// Weights or biases, stored as T or F: one per column, or one for all columns. Without them all are `fallback`.
template <class T>
struct Affine {
  using F = Compute<T>;
  const void* p;  // may be null
  bool stored_as_f, is_scalar;
  F fallback;

  template <int w>
  __device__ Elements<F, w> load(const Share<w>& share, std::int64_t base, int round) const {
    if (p != nullptr && !is_scalar && stored_as_f) return share.load(static_cast<const F*>(p) + base, round);
    Elements<T, w> stored{};
    if (p != nullptr && !is_scalar) stored = share.load(static_cast<const T*>(p) + base, round);
    F one = fallback;
    if (p != nullptr && is_scalar) one = stored_as_f ? *static_cast<const F*>(p) : decode(*static_cast<const T*>(p));
    Elements<F, w> x;
    ONEPASS_UNROLL
    for (int e = 0; e < w; ++e) x.at[e] = p == nullptr || is_scalar ? one : F(decode(stored.at[e]));
    return x;
  }
};

// Threads of a team: the smallest power of two, at most max_team, whose threads hold a row with `elements` each.
inline int team_of(std::int64_t size, int elements, int max_team) {
  int team = 1;
  while (team < max_team && std::int64_t(team) * elements < size) team *= 2;
  return team;
}

// Replaces x by its sum over the thread's team. Team sizes are powers of two, and all threads of the block call it.
// Calls alternate between two buffers, so one barrier per call suffices: a thread that writes a buffer has passed the
// previous call's barrier, and by then every thread has finished reading that buffer. `buffer` is 0 at the first call.
template <class F, int n>
__device__ void team_totals(F (&x)[n], int team, int& buffer) {
  constexpr int lanes = 32, warps = 32;
  ONEPASS_SHARED(F, warp_sums, 2 * n * warps);
  for (int distance = (team < lanes ? team : lanes) / 2; distance > 0; distance /= 2) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
  }
  if (team <= lanes) return;
  F* const totals = warp_sums + buffer * n * warps;
  buffer ^= 1;
  const int warp = int(threadIdx.x) / lanes, first = int(threadIdx.x) / team * (team / lanes);
  if (threadIdx.x % lanes == 0) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) totals[k * warps + warp] = x[k];
  }
  __syncthreads();
  ONEPASS_UNROLL
  for (int k = 0; k < n; ++k) x[k] = 0;
  for (int i = first; i < first + team / lanes; ++i) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += totals[k * warps + i];
  }
}

}  // namespace onepass::cuda
