// The arithmetic vocabulary of the rules: a value is one float, one double, or a SIMD pack of them.
//
// NOTE: [same bits everywhere]
// Rules use only IEEE + - * / sqrt, comparison and select. All of these are correctly rounded on every target, and the
// build forbids contraction and approximations, so an update has the same bits on SSE2, AVX2, AVX-512, NEON and CUDA.
// This costs nothing, because updates are bound by memory.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_HD __host__ __device__ __forceinline__
#else
// always_inline: there is no out-of-line copy that the linker could share between instruction sets.
#define ONEPASS_HD inline __attribute__((always_inline))
#endif

#if defined(__SSE2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace onepass {

ONEPASS_HD float sqrt(float x) { return ::sqrtf(x); }
ONEPASS_HD double sqrt(double x) { return ::sqrt(x); }

template <class V>
ONEPASS_HD V select(bool take, V a, V b) {
  return take ? a : b;
}

#if !defined(__CUDACC__)
// The compiler's vector type of F, `bytes` wide: + - * / and comparisons are built in.
template <class F, int bytes>
struct PackOf {
  typedef F type __attribute__((vector_size(bytes)));
};
template <class F, int bytes>
using Pack = typename PackOf<F, bytes>::type;

// In some contexts GCC does not vectorise a loop over lanes with sqrt, hence the intrinsics.
template <class V, class F = decltype(V{}[0] + 0), class = decltype(V{}[0])>
ONEPASS_HD V sqrt(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(F) == 4) return (V)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(V) == 64 && sizeof(F) == 8) return (V)_mm512_sqrt_pd((__m512d)x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32 && sizeof(F) == 4) return (V)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(V) == 32 && sizeof(F) == 8) return (V)_mm256_sqrt_pd((__m256d)x);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16 && sizeof(F) == 4) return (V)_mm_sqrt_ps((__m128)x);
  if constexpr (sizeof(V) == 16 && sizeof(F) == 8) return (V)_mm_sqrt_pd((__m128d)x);
#endif
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(F); ++lane) x[lane] = sqrt(x[lane]);
  return x;
}

template <class M, class V, class = decltype(M{}[0]), class = decltype(V{}[0])>
ONEPASS_HD V select(M take, V a, V b) {
  return take ? a : b;
}
#endif

// A NaN in either operand stays NaN, as in torch.maximum.
template <class V>
ONEPASS_HD V max_keep_nan(V a, V b) {
  return select(a != a, a, select(a > b, a, b));
}

// (1 - weight) * from + weight * to, rounded as by torch.lerp: exact at both ends, NaN between infinities of one sign.
template <class F, class V>
ONEPASS_HD V lerp(V from, V to, F weight, F one_minus_weight) {
  return weight < F(0.5) ? from + weight * (to - from) : to - one_minus_weight * (to - from);
}

// base**exponent for whole exponents >= 0, by squaring: unlike libm's pow, it has the same bits on host and device.
ONEPASS_HD double power(double base, double exponent) {
  double result = 1;
  for (std::int64_t n = static_cast<std::int64_t>(exponent); n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// The same for any exponent. The last bits of a double may differ between libms and CUDA: round the result to float.
ONEPASS_HD double real_power(double base, double exponent) { return ::pow(base, exponent); }

}  // namespace onepass
