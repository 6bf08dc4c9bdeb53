// The part of CUDA's device language that the kernels use, under CUDA's names. Where a GPU is more forgiving than its
// manual (a collective with lanes that have returned, a barrier after an early return), this code is as strict as the
// manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "block.hpp"

// To g++ a shared array would be an ordinary array, private to a thread.
#undef __shared__
#define __shared__ static_assert(false, "use ONEPASS_SHARED of platform.cuh");
#undef __launch_bounds__
#define __launch_bounds__(...)

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

template <class T>
T shuffle(unsigned mask, T value, int source_lane) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(mask, Collective::shuffle, source_lane, bits);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}
ONEPASS_HOST_UNCHECKED inline int lane() { return machine.current->rank % warp_size; }
ONEPASS_HOST_UNCHECKED inline unsigned vote(unsigned mask, bool yes) {
  return static_cast<unsigned>(warp_collective(mask, Collective::vote, 0, yes));
}

template <class T, class... Ts>
constexpr bool is_one_of = (std::is_same_v<T, Ts> || ...);
template <class T>
constexpr bool is_atomic_integer = is_one_of<T, int, unsigned, unsigned long long>;
template <class T>
constexpr bool is_atomic = is_atomic_integer<T> || is_one_of<T, float, double>;

// Replaces *address with next(*address), atomically and relaxed, and returns the old value. The threads of a host run
// never interrupt each other; the atomicity matters to ThreadSanitizer.
template <class T, class Next>
T update_atomically(T* address, Next next) {
  using Word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  typedef Word __attribute__((may_alias)) Bits;
  require_aligned(address, sizeof(T));
  note_atomic(address);
  Bits* const word = reinterpret_cast<Bits*>(address);
  Word seen = __atomic_load_n(word, __ATOMIC_RELAXED), wanted;
  for (T old;;) {
    std::memcpy(&old, &seen, sizeof old);
    const T value = next(old);
    std::memcpy(&wanted, &value, sizeof wanted);
    if (__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

template <class T>
struct Same {
  using type = T;
};
template <class T>
using NotDeduced = typename Same<T>::type;  // so that atomicAdd(float*, 1) is a call with floats, as on the device

}  // namespace onepass::cuda_on_host

// ---- where am I -------------------------------------------------------------------------------------------------
inline const uint3& threadIdx = onepass::cuda_on_host::machine.thread_index;
inline const uint3& blockIdx = onepass::cuda_on_host::machine.block_index;
inline const dim3& blockDim = onepass::cuda_on_host::machine.block_size;
inline const dim3& gridDim = onepass::cuda_on_host::machine.grid_size;
constexpr int warpSize = onepass::cuda_on_host::warp_size;

// ---- barriers and fences ----------------------------------------------------------------------------------------
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  onepass::cuda_on_host::block_barrier({file, line}, false);
}
inline int __syncthreads_count(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return onepass::cuda_on_host::block_barrier({file, line}, yes != 0);
}
inline int __syncthreads_or(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return onepass::cuda_on_host::block_barrier({file, line}, yes != 0) != 0;
}
inline int __syncthreads_and(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return onepass::cuda_on_host::block_barrier({file, line}, yes == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  onepass::cuda_on_host::warp_collective(mask, onepass::cuda_on_host::Collective::syncwarp, 0, 0);
}
inline void __threadfence() { onepass::cuda_on_host::device_fence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __threadfence_block() { onepass::cuda_on_host::block_fence(); }
[[noreturn]] inline void __trap() { onepass::cuda_on_host::fail("__trap"); }

// ---- votes and shuffles -----------------------------------------------------------------------------------------
inline unsigned __ballot_sync(unsigned mask, int yes) { return onepass::cuda_on_host::vote(mask, yes != 0); }
inline int __any_sync(unsigned mask, int yes) { return onepass::cuda_on_host::vote(mask, yes != 0) != 0; }
inline int __all_sync(unsigned mask, int yes) { return onepass::cuda_on_host::vote(mask, yes != 0) == mask; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = onepass::cuda_on_host::lane(), segment = lane & ~(width - 1);
  return onepass::cuda_on_host::shuffle(mask, value, segment | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize) {
  const int lane = onepass::cuda_on_host::lane(), source = lane ^ flip, last = lane | (width - 1);
  return onepass::cuda_on_host::shuffle(mask, value, source > last ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = onepass::cuda_on_host::lane(), within = lane & (width - 1), step = static_cast<int>(delta);
  return onepass::cuda_on_host::shuffle(mask, value, within + step < width ? lane + step : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = onepass::cuda_on_host::lane(), within = lane & (width - 1), step = static_cast<int>(delta);
  return onepass::cuda_on_host::shuffle(mask, value, within >= step ? lane - step : lane);
}

// ---- atomics ----------------------------------------------------------------------------------------------------
#define ONEPASS_HOST_ATOMIC(name, supported, new_value)                                                \
  template <class T>                                                                                   \
  T name(T* address, onepass::cuda_on_host::NotDeduced<T> value) {                                     \
    static_assert(onepass::cuda_on_host::supported<T>, #name " has no such overload on a GPU");        \
    return onepass::cuda_on_host::update_atomically(address, [value](T old) { return T(new_value); }); \
  }
ONEPASS_HOST_ATOMIC(atomicAdd, is_atomic, old + value)
ONEPASS_HOST_ATOMIC(atomicMax, is_atomic_integer, old > value ? old : value)
ONEPASS_HOST_ATOMIC(atomicMin, is_atomic_integer, old < value ? old : value)
ONEPASS_HOST_ATOMIC(atomicAnd, is_atomic_integer, (old & value))
ONEPASS_HOST_ATOMIC(atomicOr, is_atomic_integer, old | value)
ONEPASS_HOST_ATOMIC(atomicXor, is_atomic_integer, old ^ value)
#undef ONEPASS_HOST_ATOMIC
template <class T>
T atomicExch(T* address, onepass::cuda_on_host::NotDeduced<T> value) {
  static_assert(onepass::cuda_on_host::is_atomic_integer<T> || std::is_same_v<T, float>);
  return onepass::cuda_on_host::update_atomically(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, onepass::cuda_on_host::NotDeduced<T> expected, onepass::cuda_on_host::NotDeduced<T> value) {
  static_assert(onepass::cuda_on_host::is_atomic_integer<T>);
  return onepass::cuda_on_host::update_atomically(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {  // counts 0 ... last and starts again
  return onepass::cuda_on_host::update_atomically(address, [last](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- memory -----------------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* address) {
  onepass::cuda_on_host::require_aligned(address, alignof(T));
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <class T>
T __ldcg(const T* address) {
  return __ldg(address);
}
template <class T>
void __stcs(T* address, onepass::cuda_on_host::NotDeduced<T> value) {
  onepass::cuda_on_host::require_aligned(address, alignof(T));
  *address = value;
}
template <class T>
void __stcg(T* address, onepass::cuda_on_host::NotDeduced<T> value) {
  __stcs(address, value);
}
template <class T>
void __stwb(T* address, onepass::cuda_on_host::NotDeduced<T> value) {
  __stcs(address, value);
}

// ---- arithmetic -------------------------------------------------------------------------------------------------
template <class To, class From>
To onepass_host_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return onepass_host_bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return onepass_host_bit_cast<unsigned>(x); }
inline float __int_as_float(int bits) { return onepass_host_bit_cast<float>(bits); }
inline int __float_as_int(float x) { return onepass_host_bit_cast<int>(x); }
inline double __longlong_as_double(long long bits) { return onepass_host_bit_cast<double>(bits); }
inline long long __double_as_longlong(double x) { return onepass_host_bit_cast<long long>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// CUDA's min and max: if one value is NaN, the other.
template <class T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
#pragma GCC visibility pop
