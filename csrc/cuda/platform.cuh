// With this header the CUDA sources compile both under nvcc, for a GPU, and under g++, as host code that tests execute
// (tests/cuda_on_host). Every difference between the two is here:
//
//   ONEPASS_SHARED(T, name, n);          an array `T name[n]` in the block's shared memory, not initialised
//   ONEPASS_DYNAMIC_SHARED(T, name);     `T* name`: the dynamic shared memory of the launch, 128-byte aligned
//   ONEPASS_GRID_CONSTANT(T) name        parameter of a kernel: a struct that all threads read without a copy
//   ONEPASS_UNROLL, ONEPASS_NO_UNROLL    before a loop: unroll it entirely, or not at all
//   launch(name, kernel, grid, block, dynamic_shared, stream, arguments...)
//   allow_dynamic_shared(name, kernel, bytes)  before launches with more than 48 KB of dynamic shared memory
//   as_wide<Wide>(pointer)               the same memory as elements of type Wide, for accesses of 16 bytes
//   load_here(x)                         x, just loaded, is not loaded later
//   store_plain(pointer, x)              *pointer = x in one access
#pragma once

#include <cstddef>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ONEPASS_SHARED(T, name, n) __shared__ T name[n]
#define ONEPASS_DYNAMIC_SHARED(T, name)                                           \
  extern __shared__ __align__(128) unsigned char onepass_dynamic_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(onepass_dynamic_shared_memory)
#define ONEPASS_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#define ONEPASS_UNROLL _Pragma("unroll")
#define ONEPASS_NO_UNROLL _Pragma("unroll 1")

namespace onepass::cuda {

// Throws std::runtime_error that names `what`, the device (negative: the current one), the cause and a remedy, unless
// `error` is cudaSuccess.
void check(cudaError_t error, const char* what, int device = -1);

// The only launch. It does not wait, so it is legal while a stream is being captured; the first one of a kernel may
// load its code. An error inside the kernel shows at a later call. The status is the launch's own, where
// cudaGetLastError() could be that of an earlier call which did not take it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared,
            void* stream, Arguments&&... arguments) {
  const auto start = [&](const Parameters&... parameters) {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, dynamic_shared,
                            static_cast<cudaStream_t>(stream));
  };
  check(start(arguments...), name);
}

template <class... Parameters>
void allow_dynamic_shared(const char* name, void (*kernel)(Parameters...), std::size_t bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        name);
}

__device__ __forceinline__ void require_aligned(const volatile void*, std::size_t) {}

// Stores that order nothing: the compiler may move other accesses across them, so nothing that is stored so is read by
// the same thread.
__device__ __forceinline__ void store_plain(uint4* p, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}
__device__ __forceinline__ void store_plain(uint2* p, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y));
}
__device__ __forceinline__ void store_plain(unsigned int* p, unsigned int x) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(x));
}

// What was loaded into x is loaded here: without this, the compiler moves loads down to their first use, where they no
// longer wait together. Adds no instruction.
__device__ __forceinline__ void load_here(uint4& x) { asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)); }
__device__ __forceinline__ void load_here(uint2& x) { asm volatile("" : "+r"(x.x), "+r"(x.y)); }
__device__ __forceinline__ void load_here(unsigned int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void load_here(float& x) { asm volatile("" : "+f"(x)); }
template <class Element>
__device__ __forceinline__ void load_here(Element&) {}

}  // namespace onepass::cuda

#elif defined(ONEPASS_CUDA_ON_HOST)

#include "cuda_on_host.hpp"

#define ONEPASS_SHARED(T, name, n)  \
  static char name##_of_this_block; \
  T(&name)[n] = *static_cast<T(*)[n]>(::onepass::cuda_on_host::static_shared(&name##_of_this_block, sizeof(T[n])))
#define ONEPASS_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::onepass::cuda_on_host::dynamic_shared())
#define ONEPASS_GRID_CONSTANT(...) const __VA_ARGS__&
#define ONEPASS_UNROLL
#define ONEPASS_NO_UNROLL

namespace onepass::cuda {
using cuda_on_host::allow_dynamic_shared;
using cuda_on_host::launch;
using cuda_on_host::require_aligned;
template <class Word>
void load_here(Word&) {}
template <class Word>
void store_plain(Word* p, Word x) {
  *p = x;
}
}  // namespace onepass::cuda

#else
#error "compile this with nvcc, or with -DONEPASS_CUDA_ON_HOST and tests/cuda_on_host on the include path"
#endif

namespace onepass::cuda {

// On the host a misaligned pointer is an error that names kernel and thread; on a GPU it would destroy the process's
// context.
template <class Wide, class T>
__device__ __forceinline__ auto as_wide(T* pointer) {
  require_aligned(pointer, alignof(Wide));
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Wide, Wide>*>(pointer);
}

}  // namespace onepass::cuda
