// Loads and stores of SIMD packs with conversion: float32 arithmetic over float32, bfloat16 and float16 storage,
// float64 over float64. Whole packs and partial ones (tails) give the same numbers.
//
// Everything here and in the engines is in a namespace named after the instruction set, so that the linker never merges
// a function compiled for AVX-512 with its baseline twin. For the same reason the STL is not used.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/types.hpp"
#include "core/value.hpp"

#if !defined(ONEPASS_ISA)
#error "ONEPASS_ISA names the instruction set this file is compiled for"
#endif

namespace onepass::cpu::ONEPASS_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

// Storage types: structs, so that the 16-bit types differ from integers and from each other.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

// f(Tag<T>{}) for the storage type T of a dtype: the only list of the engine's types.
template <class F>
static inline __attribute__((always_inline)) auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(Tag<float>{});
    case DType::float64: return f(Tag<double>{});
    case DType::bfloat16: return f(Tag<bfloat16>{});
    default: return f(Tag<float16>{});
  }
}

template <class F>
constexpr int lanes = register_bytes / sizeof(F);
template <class F>
using Reg = Pack<F, register_bytes>;
using Bits32 = Pack<std::uint32_t, register_bytes>;
using Bits16 = Pack<std::uint16_t, register_bytes / 2>;

// widen() loads 16-bit numbers into the low halves of 32-bit lanes, narrow() reverts it and expects lanes below 2^16.
// GCC's own conversion of such vectors works on their halves and costs three times as much.
#if defined(__AVX512F__)
static inline Bits32 widen(const void* p) {
  return (Bits32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
static inline Bits16 narrow(Bits32 x) { return (Bits16)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
static inline Bits32 widen(__m128i raw) { return (Bits32)_mm256_cvtepu16_epi32(raw); }
static inline Bits32 widen(const void* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
static inline Bits16 narrow(Bits32 x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
static inline Bits32 widen(const void* p) {
  Bits16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, Bits32);
}
static inline Bits16 narrow(Bits32 x) { return __builtin_convertvector(x, Bits16); }
#endif

static inline Reg<float> decode(const bfloat16* p) { return (Reg<float>)(widen(p) << 16); }
#if defined(__AVX2__) && !defined(__AVX512F__)
static inline Reg<float> decode_raw(const bfloat16*, __m128i raw) { return (Reg<float>)(widen(raw) << 16); }
static inline Reg<float> decode_raw(const float16*, __m128i raw) { return (Reg<float>)_mm256_cvtph_ps(raw); }
#endif

// Rounds to nearest, ties to even; a NaN becomes the NaN with all bits set.
static inline void encode(bfloat16* p, Reg<float> x) {
  const Bits32 bits = (Bits32)x;
  const Bits32 rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const Bits16 raw = narrow((rounded | (Bits32)(x != x)) >> 16);
  std::memcpy(p, &raw, sizeof raw);
}

#if defined(__AVX512F__)
static inline Reg<float> decode(const float16* p) {
  return (Reg<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static inline void encode(float16* p, Reg<float> x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
static inline Reg<float> decode(const float16* p) {
  return (Reg<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
static inline void encode(float16* p, Reg<float> x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// The instruction set does not convert float16: lane by lane, for correctness. Not inlined, because every load and
// store of a float16 pack would be as large as a kernel.
static inline float half_to_float(std::uint32_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  std::uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity or NaN (which becomes quiet)
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0u);
  } else if (magnitude >= 0x400u) {  // normal: rebias the exponent from 15 to 127
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: a multiple of 2^-24, exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline std::uint16_t float_to_half(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  std::uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u | ((bits >> 13) & 0x3ffu);
  } else if (bits >= 0x47800000u) {  // at least 65536; smaller numbers that round up to it carry into infinity below
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24, which is in the last bits
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    half = bits - 0x3f000000u;
  } else {
    half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

static inline __attribute__((noinline)) Reg<float> decode(const float16* p) {
  Reg<float> x;
  for (int lane = 0; lane < lanes<float>; ++lane) x[lane] = half_to_float(p[lane].bits);
  return x;
}
static inline __attribute__((noinline)) void encode(float16* p, Reg<float> x) {
  for (int lane = 0; lane < lanes<float>; ++lane) p[lane].bits = float_to_half(x[lane]);
}
#endif

static inline Reg<float> decode(const float* p) {
  Reg<float> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void encode(float* p, Reg<float> x) { std::memcpy(p, &x, sizeof x); }

static inline Reg<double> decode(const double* p) {
  Reg<double> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void encode(double* p, Reg<double> x) { std::memcpy(p, &x, sizeof x); }

// Loads and stores of `count` lanes; a load sets the other lanes to 0. With the template argument `whole` all lanes are
// moved at once. Otherwise, for tails, the access is masked or, without masks, goes through a buffer on the stack.
#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
static inline Reg<float> load_some(const float* p, int count) {
  return (Reg<float>)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
static inline Reg<double> load_some(const double* p, int count) {
  return (Reg<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p);
}
static inline void store_some(float* p, Reg<float> x, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x);
}
static inline void store_some(double* p, Reg<double> x, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), (__m512d)x);
}
template <class T>
static inline Reg<float> load_some(const T* p, int count) {
  T buffer[lanes<float>];
  _mm256_storeu_si256((__m256i*)buffer, _mm256_maskz_loadu_epi16(first_lanes(count), p));
  return decode(buffer);
}
template <class T>
static inline void store_some(T* p, Reg<float> x, int count) {
  T buffer[lanes<float>];
  encode(buffer, x);
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm256_loadu_si256((const __m256i*)buffer));
}
#else
// Copies fewer than `all` bytes, a power of 2, in pieces of known size, because a call of memcpy per tail would slow
// down short rows.
template <int all>
static inline __attribute__((always_inline)) void copy_some(void* to, const void* from, int bytes) {
  constexpr int piece = all / 2;
  if constexpr (piece > 0) {
    const int copied = bytes & piece;
    if (copied != 0) std::memcpy(to, from, piece);
    copy_some<piece>(static_cast<char*>(to) + copied, static_cast<const char*>(from) + copied, bytes - copied);
  }
}
#if defined(__AVX2__)
// Loads without a buffer on the stack: a wide read of memory just written in pieces has to wait for all the writes.
static inline __m256i first_lanes32(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Reg<float> load_some(const float* p, int count) {
  return (Reg<float>)_mm256_maskload_ps(p, first_lanes32(count));
}
static inline Reg<double> load_some(const double* p, int count) {
  return (Reg<double>)_mm256_maskload_pd(p, first_lanes32(2 * count));
}
// Up to three 16-bit numbers.
static inline std::uint64_t some_bits16(const void* p, int count) {
  std::uint16_t last = 0;
  std::uint32_t two = 0;
  if (count & 2) std::memcpy(&two, p, 4);
  if (count & 1) std::memcpy(&last, static_cast<const char*>(p) + 2 * (count & 2), 2);
  return two | static_cast<std::uint64_t>(last) << 16 * (count & 2);
}
template <class T>
static inline Reg<float> load_some(const T* p, int count) {
  std::uint64_t low, high = 0;
  if (count & 4) {
    std::memcpy(&low, p, 8);
    high = some_bits16(p + 4, count & 3);
  } else {
    low = some_bits16(p, count & 3);
  }
  return decode_raw(p, _mm_set_epi64x(static_cast<std::int64_t>(high), static_cast<std::int64_t>(low)));
}
#else
template <class T>
static inline Reg<Compute<T>> load_some(const T* p, int count) {
  T buffer[lanes<Compute<T>>] = {};
  copy_some<sizeof buffer>(buffer, p, count * static_cast<int>(sizeof(T)));
  return decode(buffer);
}
#endif
template <class T>
static inline void store_some(T* p, Reg<Compute<T>> x, int count) {
  T buffer[lanes<Compute<T>>];
  encode(buffer, x);
  copy_some<sizeof buffer>(p, buffer, count * static_cast<int>(sizeof(T)));
}
#endif

// A bool as a type, for generic lambdas: `decltype(w)::value` is the template argument of load and store.
template <bool b>
struct Constant {
  static constexpr bool value = b;
};

template <bool whole, class T>
static inline Reg<Compute<T>> load(const T* p, int count) {
  if constexpr (whole)
    return decode(p);
  else
    return load_some(p, count);
}
template <bool whole, class T>
static inline void store(T* p, Reg<Compute<T>> x, int count) {
  if constexpr (whole)
    encode(p, x);
  else
    store_some(p, x, count);
}

}  // namespace onepass::cpu::ONEPASS_ISA
