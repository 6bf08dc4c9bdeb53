// What sums over registers need beside loads and stores.
#pragma once
#include "cpu/pack.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// The first `count` lanes; 0 in the others.
template <class F>
static inline Reg<F> first_of(Reg<F> x, int count) {
  F buffer[lanes<F>] = {};
  for (int lane = 0; lane < count; ++lane) buffer[lane] = x[lane];
  return decode(buffer);
}
#if defined(__AVX512F__)
template <>
inline Reg<float> first_of<float>(Reg<float> x, int count) {
  return (Reg<float>)_mm512_maskz_mov_ps(first_lanes(count), (__m512)x);
}
template <>
inline Reg<double> first_of<double>(Reg<double> x, int count) {
  return (Reg<double>)_mm512_maskz_mov_pd(static_cast<__mmask8>(first_lanes(count)), (__m512d)x);
}
#endif

// The lanes added, the upper half to the lower one again and again: always in the same order.
template <class F, int bytes = register_bytes>
static inline F sum_of(Pack<F, bytes> x) {
  if constexpr (bytes == 2 * sizeof(F)) {
    return x[0] + x[1];
  } else {
    Pack<F, bytes / 2> half[2];
    std::memcpy(half, &x, sizeof x);
    return sum_of<F, bytes / 2>(half[0] + half[1]);
  }
}

// A number of any storage type, for the few that are looked at one by one.
template <class T>
static inline double number_at(const void* p, std::int64_t i) {
  return double(load<false>(static_cast<const T*>(p) + i, 1)[0]);
}
static inline double number_at(DType dtype, const void* p, std::int64_t i) {
  switch (dtype) {
    case DType::float32: return number_at<float>(p, i);
    case DType::float64: return number_at<double>(p, i);
    case DType::bfloat16: return number_at<bfloat16>(p, i);
    case DType::float16: return number_at<float16>(p, i);
  }
  return 0;
}
template <class T>
static inline void set_number_at(void* p, std::int64_t i, double x) {
  store<false>(static_cast<T*>(p) + i, Reg<Arithmetic<T>>{} + Arithmetic<T>(x), 1);
}
static inline void set_number_at(DType dtype, void* p, std::int64_t i, double x) {
  switch (dtype) {
    case DType::float32: return set_number_at<float>(p, i, x);
    case DType::float64: return set_number_at<double>(p, i, x);
    case DType::bfloat16: return set_number_at<bfloat16>(p, i, x);
    case DType::float16: return set_number_at<float16>(p, i, x);
  }
}

}  // namespace onepass::cpu::ONEPASS_ISA
