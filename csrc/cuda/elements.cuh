// Element types of the CUDA kernels and their 16-byte loads and stores.
#pragma once
#include "core/types.hpp"
#include "cuda/platform.cuh"

namespace onepass::cuda {

template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

__device__ inline float decode(float x) { return x; }
__device__ inline double decode(double x) { return x; }
__device__ inline float decode(__half x) { return __half2float(x); }
__device__ inline float decode(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void encode(float& to, float x) { to = x; }
__device__ inline void encode(double& to, double x) { to = x; }
__device__ inline void encode(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void encode(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Elements that one thread handles at once: as many as 16 bytes of the parameter hold.
template <class T>
constexpr int width = 16 / sizeof(T);

// `n` elements in registers, moved by 16-byte accesses: one for a parameter, two for the float32 state of a 16-bit one.
template <class T, int n>
struct alignas(16) Elements {
  T at[n];

  static __device__ Elements load(const T* p) {
    static_assert(sizeof(Elements) % sizeof(uint4) == 0, "whole 16-byte words");
    Elements e;
    ONEPASS_UNROLL
    for (unsigned word = 0; word < sizeof(Elements) / sizeof(uint4); ++word)
      reinterpret_cast<uint4*>(&e)[word] = as_wide<uint4>(p)[word];
    return e;
  }
  __device__ void store(T* p) const {
    ONEPASS_UNROLL
    for (unsigned word = 0; word < sizeof(Elements) / sizeof(uint4); ++word)
      as_wide<uint4>(p)[word] = reinterpret_cast<const uint4*>(this)[word];
  }
};

__device__ inline bool is_aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Number of the tensor that a block's chunk belongs to: the last one whose first chunk is not after it. The same for
// all threads of the block, and the table stands in the constant bank.
__device__ inline int find_tensor(const std::uint32_t* first_chunk, int n_tensors, std::uint32_t chunk) {
  int low = 0, high = n_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace onepass::cuda
