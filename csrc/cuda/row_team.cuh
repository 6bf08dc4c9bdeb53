// Threads that work on one row together: what each of them takes of it, and what they add up.
#pragma once
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

// What of n contiguous elements one thread of a team takes: w neighbours in each of several rounds, moved by 16-byte
// accesses where n and all addresses allow it; else w is 1.
template <int w>
struct Share {
  int lane, team, n;

  __device__ int place(int round) const { return (round * team + lane) * w; }
  __device__ bool has(int round) const { return place(round) < n; }

  // Zeros where it has none.
  template <class T>
  __device__ Elements<T, w> load(const T* p, int round) const {
    Elements<T, w> x{};
    if (has(round)) x = Elements<T, w>::load(p + place(round));
    return x;
  }
  template <class T>
  __device__ void store(T* p, int round, const Elements<T, w>& x) const {
    if (has(round)) x.store(p + place(round));
  }
};

// Weights or biases: one a column or one for all of them, of type T or F, or `otherwise`.
template <class T>
struct Affine {
  using F = Compute<T>;
  const void* p;
  bool is_arithmetic, is_scalar;
  F otherwise;

  template <int w>
  __device__ Elements<F, w> load(const Share<w>& share, std::int64_t base, int round) const {
    if (p != nullptr && !is_scalar && is_arithmetic) return share.load(static_cast<const F*>(p) + base, round);
    Elements<T, w> stored{};
    if (p != nullptr && !is_scalar) stored = share.load(static_cast<const T*>(p) + base, round);
    F one = otherwise;
    if (p != nullptr && is_scalar) one = is_arithmetic ? *static_cast<const F*>(p) : decode(*static_cast<const T*>(p));
    Elements<F, w> x;
    ONEPASS_UNROLL
    for (int e = 0; e < w; ++e) x.at[e] = p == nullptr || is_scalar ? one : F(decode(stored.at[e]));
    return x;
  }
};

// The smallest power of two that with so many elements a thread has room for a row, if there is one up to `most`.
inline int team_of(std::int64_t size, int elements, int most) {
  int team = 1;
  while (team < most && std::int64_t(team) * elements < size) team *= 2;
  return team;
}

// Replaces x by its sums over the thread's team. Teams are powers of two, and all threads of the block take part.
// `turn` is 0 at the first call: calls write to two places in turn, so that one barrier a call is enough. Whoever
// writes has been at the last call's, behind which nobody reads what the call before it wrote.
template <class F, int n>
__device__ void team_totals(F (&x)[n], int team, int& turn) {
  constexpr int lanes = 32, warps = 32;
  ONEPASS_SHARED(F, of_warps, 2 * n * warps);
  for (int distance = (team < lanes ? team : lanes) / 2; distance > 0; distance /= 2) {
    ONEPASS_UNROLL
    for (int k = 0; k < n; ++k) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
  }
  if (team <= lanes) return;
  F* const totals = of_warps + turn * n * warps;
  turn ^= 1;
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
