// Operations on the lanes of a register: masking a tail, summing, and access to single numbers.
#pragma once
#include "cpu/pack.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// The first `count` lanes; 0 in the others.
static inline Reg<float> first_of(Reg<float> x, int count) {
  Pack<std::int32_t, register_bytes> lane;
  for (int i = 0; i < lanes<float>; ++i) lane[i] = i;
  return lane < count ? x : Reg<float>{};
}
static inline Reg<double> first_of(Reg<double> x, int count) {
  Pack<std::int64_t, register_bytes> lane;
  for (int i = 0; i < lanes<double>; ++i) lane[i] = i;
  return lane < static_cast<std::int64_t>(count) ? x : Reg<double>{};
}

// The sum of the lanes, in a fixed order: the upper half is added to the lower one until one lane is left.
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

// One number of any storage type; for code that is not worth vectorising.
template <class T>
static inline double number_at(const void* p, std::int64_t i) {
  return double(load<false>(static_cast<const T*>(p) + i, 1)[0]);
}
static inline double number_at(DType dtype, const void* p, std::int64_t i) {
  return with_dtype(dtype, [&](auto type) { return number_at<typename decltype(type)::type>(p, i); });
}
template <class T>
static inline void set_number_at(void* p, std::int64_t i, double x) {
  store<false>(static_cast<T*>(p) + i, Reg<Compute<T>>{} + Compute<T>(x), 1);
}
static inline void set_number_at(DType dtype, void* p, std::int64_t i, double x) {
  with_dtype(dtype, [&](auto type) { set_number_at<typename decltype(type)::type>(p, i, x); });
}

// The two as rows/channel.hpp expects them.
struct Numbers {
  static double get(DType dtype, const void* p, std::int64_t i) { return number_at(dtype, p, i); }
  static void set(DType dtype, void* p, std::int64_t i, double x) { set_number_at(dtype, p, i, x); }
};

}  // namespace onepass::cpu::ONEPASS_ISA
