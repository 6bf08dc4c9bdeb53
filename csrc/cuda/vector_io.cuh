// Element types of the CUDA kernels and their 16-byte loads and stores.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"
#include "cuda/platform.cuh"

namespace onepass::cuda {

__device__ inline float decode(float x) { return x; }
__device__ inline double decode(double x) { return x; }
__device__ inline float decode(__half x) { return __half2float(x); }
__device__ inline float decode(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void encode(float& to, float x) { to = x; }
__device__ inline void encode(double& to, double x) { to = x; }
__device__ inline void encode(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void encode(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// f(Tag<T>{}) for the type T of a dtype: the only list of the engine's types.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(Tag<float>{});
    case DType::float64: return f(Tag<double>{});
    case DType::bfloat16: return f(Tag<__nv_bfloat16>{});
    default: return f(Tag<__half>{});
  }
}

// One element of a type known at run time.
__device__ inline double number_at(DType dtype, const void* p, std::int64_t i) {
  switch (dtype) {
    case DType::float32: return decode(static_cast<const float*>(p)[i]);
    case DType::float64: return decode(static_cast<const double*>(p)[i]);
    case DType::bfloat16: return decode(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return decode(static_cast<const __half*>(p)[i]);
  }
}
__device__ inline void set_number_at(DType dtype, void* p, std::int64_t i, double x) {
  switch (dtype) {
    case DType::float32: return encode(static_cast<float*>(p)[i], float(x));
    case DType::float64: return encode(static_cast<double*>(p)[i], x);
    case DType::bfloat16: return encode(static_cast<__nv_bfloat16*>(p)[i], float(x));
    default: return encode(static_cast<__half*>(p)[i], float(x));
  }
}

// The two as rows/channel.hpp expects them.
struct Numbers {
  static __device__ double get(DType dtype, const void* p, std::int64_t i) { return number_at(dtype, p, i); }
  static __device__ void set(DType dtype, void* p, std::int64_t i, double x) { set_number_at(dtype, p, i, x); }
};

// Elements that a thread processes at once: 16 bytes of the parameter.
template <class T>
constexpr int width = 16 / sizeof(T);

// n elements in registers, moved by 16-byte accesses: one access for a parameter, two for the float32 state of a 16-bit
// one. A single element may have any address.
template <class T, int n>
struct alignas(16) Elements {
  T at[n];

  static __device__ Elements load(const T* p) {
    static_assert(n == 1 || sizeof(T) * n % sizeof(uint4) == 0, "whole 16-byte words");
    Elements e;
    if constexpr (n == 1) {
      e.at[0] = *p;
    } else {
      ONEPASS_UNROLL
      for (unsigned word = 0; word < sizeof(Elements) / sizeof(uint4); ++word)
        reinterpret_cast<uint4*>(&e)[word] = as_wide<uint4>(p)[word];
    }
    return e;
  }
  // By an intrinsic, because the compiler may split an assignment into narrower stores.
  __device__ void store(T* p) const {
    if constexpr (n == 1) {
      *p = at[0];
    } else {
      ONEPASS_UNROLL
      for (unsigned word = 0; word < sizeof(Elements) / sizeof(uint4); ++word)
        __stwb(as_wide<uint4>(p) + word, reinterpret_cast<const uint4*>(this)[word]);
    }
  }
};

// Null counts as aligned.
ONEPASS_HD bool is_aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Index of the tensor that a chunk belongs to: the last one whose first chunk is not after it. All threads of the block
// take the same branches, and the table is in the constant bank.
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
