// Philox (core/philox.hpp) for many counters at once: one counter per 64-bit lane, because the widening multiplication
// reads the low halves of such lanes. The high halves may hold anything until the end.
#pragma once
#include "core/philox.hpp"
#include "cpu/pack.hpp"

namespace onepass::cpu::ONEPASS_ISA {

using Bits64 = Pack<std::uint64_t, register_bytes>;

// (a mod 2^32) * (b mod 2^32) in each lane.
static inline Bits64 multiply_low(Bits64 a, Bits64 b) {
#if defined(__AVX512F__)
  return (Bits64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bits64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Bits64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Moves the high half of each lane to the low one. Uses a shuffle where there is one, because shifts compete with
// multiplications for an execution port.
static inline Bits64 high_half(Bits64 a) {
#if defined(__AVX512F__)
  return (Bits64)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (Bits64)_mm256_shuffle_epi32((__m256i)a, 0xf5);
#else
  return a >> 32;
#endif
}

// Interleaves a and b: the first (second) lane of each pair of lanes, from a and b alternately.
static inline Bits64 pair_first(Bits64 a, Bits64 b) {
#if defined(__AVX512F__)
  return (Bits64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bits64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return Bits64{a[0], b[0]};
#endif
}
static inline Bits64 pair_second(Bits64 a, Bits64 b) {
#if defined(__AVX512F__)
  return (Bits64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bits64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return Bits64{a[1], b[1]};
#endif
}

// The words of one seed's sequence, `group` at a time.
class PhiloxSequence {
 public:
  static constexpr int counters = sizeof(Bits64) / 8, group = counters * Philox::words;

  explicit PhiloxSequence(std::uint64_t seed) {
    std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < Philox::rounds; ++round) {
      key0_[round] = Bits64{} + key0;
      key1_[round] = Bits64{} + key1;
      key0 += Philox::key_step0;
      key1 += Philox::key_step1;
    }
    // Even lanes have the first half of the counters, odd lanes the second: interleaving then gives the words in order.
    for (int lane = 0; lane < counters; ++lane) counter_of_lane_[lane] = lane / 2 + lane % 2 * (counters / 2);
  }

  // The words of elements [first, first + groups * group); first is a multiple of 4. A round waits for the one before
  // it, so two independent groups at once take half the time.
  template <int groups>
  __attribute__((always_inline)) void words(std::uint64_t first, Bits32 (&out)[2 * groups]) const {
    const Bits64 zero = {}, multiplier0 = zero + Philox::multiplier0, multiplier1 = zero + Philox::multiplier1;
    Bits64 w0[groups], w1[groups], w2[groups], w3[groups];
    for (int g = 0; g < groups; ++g) {
      w0[g] = counter_of_lane_ + (first / Philox::words + static_cast<std::uint64_t>(g * counters));
      w1[g] = w0[g] >> 32;
      w2[g] = w3[g] = zero;
    }
#pragma GCC unroll 10
    for (int round = 0; round < Philox::rounds; ++round)
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) {
        const Bits64 product0 = multiply_low(multiplier0, w0[g]), product1 = multiply_low(multiplier1, w2[g]);
        w0[g] = high_half(product1) ^ (w1[g] ^ key0_[round]);
        w1[g] = product1;
        w2[g] = high_half(product0) ^ (w3[g] ^ key1_[round]);
        w3[g] = product0;
      }
    const Bits64 low = zero + 0xffffffffu;
    for (int g = 0; g < groups; ++g) {
      const Bits64 words01 = (w0[g] & low) | (w1[g] << 32), words23 = (w2[g] & low) | (w3[g] << 32);
      out[2 * g] = (Bits32)pair_first(words01, words23);
      out[2 * g + 1] = (Bits32)pair_second(words01, words23);
    }
  }

 private:
  Bits64 key0_[Philox::rounds], key1_[Philox::rounds];
  Bits64 counter_of_lane_;
};

}  // namespace onepass::cpu::ONEPASS_ISA
