// How states and 16-bit parameters are kept in memory. Rules compute in float32 in any case: a format is a load and a
// store of the engine, and its formulas stand here, for one element and for a pack of them.
//
// 8 bits: groups of `scale_group` consecutive elements, in the order of memory, share a power of two s. The code of a
// magnitude |x| is the upper part of the bits of the float |x| / s + b, counted from those of b: three bits of the
// fraction and as many exponents as the code has room for. Far above b the spacing of the values is 1/8 to 1/16 of
// them; near 0 it is b * s / 8, and 0 has the code 0.
//   signed8    a sign and 16 exponents, b = 2^-15    for moments of the gradient
//   unsigned8  32 exponents, b = 2^-31               for squares of the gradient
// A positive square has at least code 1: as zero it would turn a first moment that is still there into a huge step.
// A group with an infinity, a NaN or an overflow is NaN as a whole, or infinite if these are squares without a NaN:
// never a wrong finite number.
//
// NOTE: [rounding]
// Rounded to nearest, an average that moves by less than half a spacing per step never moves. So every store adds a
// random number below one spacing to the bits and cuts them off, which keeps the mean. The number depends on the step,
// the state and the index of the element alone, and costs one addition per pack: consecutive elements get consecutive
// multiples of the golden ratio, modulo 1, from a start that is a hash of the step.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass {

enum class StateFormat : std::uint8_t { full, bfloat16, signed8, unsigned8 };
constexpr bool is_8bit(StateFormat format) {
  return format == StateFormat::signed8 || format == StateFormat::unsigned8;
}

// Of bfloat16 parameters. With a remainder, an integer per element beside the parameter, the two together are the upper
// 32 or 24 bits of a float32 parameter, and the parameter by itself is that number rounded to nearest.
enum class ParamFormat : std::uint8_t { plain, stochastic, remainder16, remainder8 };

// Elements per scale; the last group of a tensor may be shorter.
constexpr std::int64_t scale_group = 64;
ONEPASS_HD constexpr std::int64_t scale_groups(std::int64_t size) { return (size + scale_group - 1) / scale_group; }

// How the memory of one Item is to be read.
struct Storage {
  StateFormat state[max_states];
  float* scale[max_states];  // of the states in 8 bits
  ParamFormat param;
  void* remainder;
};

namespace storage {

template <class V>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
#if !defined(__CUDACC__)
template <int bytes>
struct PackBits {
  using type = Pack<std::uint32_t, bytes>;
};
template <>
struct BitsOf<Pack<float, 16>> : PackBits<16> {};
template <>
struct BitsOf<Pack<float, 32>> : PackBits<32> {};
template <>
struct BitsOf<Pack<float, 64>> : PackBits<64> {};
#endif
template <class V>
using Bits = typename BitsOf<V>::type;

template <class V>
ONEPASS_HD Bits<V> bits_of(V x) {
  Bits<V> bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class V>
ONEPASS_HD V from_bits(Bits<V> bits) {
  V x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- rounding

constexpr std::uint32_t golden = 0x9E3779B9u;  // 2^32 / golden ratio

// The 32 random bits of element i are dither_start() + i * golden, modulo 2^32. stream: the index of a state;
// max_states for the parameter.
ONEPASS_HD std::uint32_t dither_start(double t, int stream) {
  std::uint64_t x = static_cast<std::uint64_t>(t) * (max_states + 1) + static_cast<std::uint64_t>(stream);
  x = (x + 1) * 0x9E3779B97F4A7C15u;  // the finalizer of SplitMix64 (Steele, Lea & Flood 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<std::uint32_t>((x ^ (x >> 31)) >> 32);
}

// ---- bfloat16 and remainders: the upper bits of a float; `random` are 32 random bits

template <class V>
ONEPASS_HD Bits<V> bfloat16_of(V x, Bits<V> random) {
  const Bits<V> bits = bits_of(x);
  return select(x == x, (bits + (random >> 16)) >> 16, Bits<V>{} + 0x7fc0u);
}
// The bits of a master without its `dropped` lowest bits, and the bfloat16 nearest to it.
template <int dropped, class V>
ONEPASS_HD Bits<V> master_of(V x, Bits<V> random) {
  Bits<V> bits = bits_of(x);
  if constexpr (dropped > 0) bits = (bits + (random >> (32 - dropped))) >> dropped << dropped;
  return select(x == x, bits, Bits<V>{} + 0x7fc00000u);
}
template <class B>
ONEPASS_HD B nearest_bfloat16(B master) {
  return (master + 0x8000u) >> 16;
}

// ---- 8 bits

constexpr int dropped_bits = 20;  // of a float's 23 bits of fraction
ONEPASS_HD constexpr int exponents(StateFormat format) { return format == StateFormat::signed8 ? 16 : 32; }
ONEPASS_HD constexpr std::uint32_t bias_bits(StateFormat format) { return (128u - exponents(format)) << 23; }
ONEPASS_HD constexpr float bias(StateFormat format) { return format == StateFormat::signed8 ? 0x1p-15f : 0x1p-31f; }

// From the bits of the largest magnitude of a group. The spacing below 2 is 1/8: what could be rounded up to 2 gets the
// next power of two. From 1.8 * 2^126 on the group overflows.
constexpr std::uint32_t infinity_bits = 0x7f800000u, nan_bits = 0x7fc00000u;
ONEPASS_HD std::uint32_t scale_bits(StateFormat format, std::uint32_t largest) {
  if (largest >= 0x7ee80000u)
    return format == StateFormat::unsigned8 && largest <= infinity_bits ? infinity_bits : nan_bits;
  const std::uint32_t scale = (largest + 0x180000u) & 0x7f800000u;
  return scale < 0x800000u ? 0x800000u : scale;
}
ONEPASS_HD std::uint32_t inverse_bits(std::uint32_t scale) { return (254u << 23) - scale; }

// The code of a magnitude, times 1 / s.
template <StateFormat format, class V>
ONEPASS_HD Bits<V> code_of(V magnitude, float inverse, Bits<V> random) {
  return (bits_of(magnitude * inverse + bias(format)) - bias_bits(format) + (random >> (32 - dropped_bits))) >>
         dropped_bits;
}
template <StateFormat format, class V>
ONEPASS_HD V magnitude_of(Bits<V> code, float scale) {
  return (from_bits<V>((code << dropped_bits) + bias_bits(format)) - bias(format)) * scale;
}

}  // namespace storage
}  // namespace onepass
