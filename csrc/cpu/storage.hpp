// Loads and stores of states and parameters in the formats of core/storage.hpp, a tile of elements at a time: the tile
// is float32 and stays in the first-level cache, so the kernels of the rules run on it as they are.
#pragma once
#include "core/storage.hpp"
#include "cpu/lane_ops.hpp"

namespace onepass::cpu::ONEPASS_ISA {

using Int32 = Pack<std::int32_t, register_bytes>;
using Codes = Bits32[scale_group / lanes<float>];  // of one group

static inline Bits32 load_bits(const float* p) { return (Bits32)decode(p); }
static inline Int32 max_of(Int32 a, Int32 b) {
#if defined(__AVX512F__)
  return (Int32)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int32)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}
template <int bytes = register_bytes>
static inline std::uint32_t largest_of(Pack<std::int32_t, bytes> x) {
  if constexpr (bytes == 8) {
    return static_cast<std::uint32_t>(x[0] > x[1] ? x[0] : x[1]);
  } else {
    Pack<std::int32_t, bytes / 2> half[2];
    std::memcpy(half, &x, sizeof x);
    return largest_of<bytes / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}

// The random bits of the elements from i on; `next` gives those of the next pack.
struct Dither {
  Bits32 bits;
  Dither(std::uint32_t start, std::int64_t i) {
    for (int lane = 0; lane < lanes<float>; ++lane)
      bits[lane] = start + (static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(lane)) * storage::golden;
  }
  Bits32 next() {
    const Bits32 now = bits;
    bits += storage::golden * lanes<float>;
    return now;
  }
};

// Bytes to 32-bit lanes and back. GCC's own conversions of such vectors are several times slower.
#if defined(__AVX512F__)
static inline Bits32 load_code(const std::uint8_t* p) {
  // The form with a mask: GCC 12 warns of an uninitialised operand in the other.
  return (Bits32)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
}
static inline void store_codes(std::uint8_t* p, const Codes& code) {
  for (int i = 0; i < scale_group / 16; ++i)
    _mm_storeu_si128((__m128i*)(p + 16 * i), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)code[i]));
}
#elif defined(__AVX2__)
static inline Bits32 load_code(const std::uint8_t* p) {
  return (Bits32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
static inline void store_codes(std::uint8_t* p, const Codes& code) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works on the halves of its operands
  for (int i = 0; i < scale_group / 32; ++i) {
    const __m256i low = _mm256_packus_epi32((__m256i)code[4 * i], (__m256i)code[4 * i + 1]);
    const __m256i high = _mm256_packus_epi32((__m256i)code[4 * i + 2], (__m256i)code[4 * i + 3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256((__m256i*)(p + 32 * i), bytes);
  }
}
#else
static inline Bits32 load_code(const std::uint8_t* p) {
  Bits32 code;
  for (int lane = 0; lane < lanes<float>; ++lane) code[lane] = p[lane];
  return code;
}
static inline void store_codes(std::uint8_t* p, const Codes& code) {
  for (int i = 0; i < scale_group; ++i) p[i] = static_cast<std::uint8_t>(code[i / lanes<float>][i % lanes<float>]);
}
#endif

// ---- 8 bits: one group

// Whole packs are written: `to` has room for scale_group floats.
template <StateFormat format>
static inline void decode_group(const std::uint8_t* codes, float scale, int count, float* to) {
  std::uint8_t padded[scale_group];
  if (count < scale_group) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, codes, static_cast<std::size_t>(count));
    codes = padded;
  }
#pragma GCC unroll 2
  for (int i = 0; i < scale_group; i += lanes<float>) {
    const Bits32 code = load_code(codes + i);
    if constexpr (format == StateFormat::signed8) {
      const Bits32 magnitude = (Bits32)storage::magnitude_of<format, Reg<float>>(code & 0x7fu, scale);
      encode(to + i, (Reg<float>)(magnitude | (code & 0x80u) << 24));
    } else {
      encode(to + i, storage::magnitude_of<format, Reg<float>>(code, scale));
    }
  }
}

// The scale of scale_group floats, as storage::scale_bits().
template <StateFormat format>
static inline float scale_of(const float* values) {
  Int32 largest{};
#pragma GCC unroll 16
  for (int i = 0; i < scale_group; i += lanes<float>)
    largest = max_of(largest, (Int32)(load_bits(values + i) & 0x7fffffffu));
  return storage::from_bits<float>(storage::scale_bits(format, largest_of<>(largest)));
}

// The codes of scale_group floats, of which the first `count` are stored.
template <StateFormat format>
static inline void encode_group(const float* from, int count, Dither& dither, float scale, std::uint8_t* codes) {
  const std::uint32_t bits = storage::bits_of(scale);
  if (bits >= storage::infinity_bits) {
    std::memset(codes, 1, static_cast<std::size_t>(count));
    dither.bits += storage::golden * static_cast<std::uint32_t>(scale_group);
    return;
  }
  const float inverse = storage::from_bits<float>(storage::inverse_bits(bits));
  Codes code;
#pragma GCC unroll 16
  for (int i = 0; i < scale_group / lanes<float>; ++i) {
    const Bits32 x = load_bits(from + i * lanes<float>), magnitude = x & 0x7fffffffu;
    code[i] = storage::code_of<format, Reg<float>>((Reg<float>)magnitude, inverse, dither.next());
    if constexpr (format == StateFormat::signed8)
      code[i] |= (x >> 24) & 0x80u;
    else
      code[i] = (Bits32)max_of((Int32)code[i], (magnitude != 0) & 1);
  }
  if (count == scale_group) return store_codes(codes, code);
  std::uint8_t padded[scale_group];
  store_codes(padded, code);
  std::memcpy(codes, padded, static_cast<std::size_t>(count));
}

// ---- a tile: elements [begin, begin + count) of a tensor. begin is a multiple of scale_group; the tile has room for
// whole groups.

template <StateFormat format>
static void decode_8bit(const void* state, const float* scales, std::int64_t begin, std::int64_t count, float* tile) {
  for (std::int64_t i = 0; i < count; i += scale_group) {
    const int n = static_cast<int>(count - i < scale_group ? count - i : scale_group);
    decode_group<format>(static_cast<const std::uint8_t*>(state) + begin + i, scales[(begin + i) / scale_group], n,
                         tile + i);
  }
}
// Overwrites what follows `count` in the last group of the tile. All scales come first: each takes a chain of dependent
// operations, which the next ones overlap.
template <StateFormat format>
static void encode_8bit(float* tile, std::int64_t begin, std::int64_t count, std::uint32_t start, void* state,
                        float* scales) {
  for (std::int64_t i = count; i % scale_group != 0; ++i) tile[i] = 0;
  float* const scale = scales + begin / scale_group;
  for (std::int64_t i = 0; i < count; i += scale_group) scale[i / scale_group] = scale_of<format>(tile + i);
  Dither dither(start, begin);
  for (std::int64_t i = 0; i < count; i += scale_group) {
    const int n = static_cast<int>(count - i < scale_group ? count - i : scale_group);
    encode_group<format>(tile + i, n, dither, scale[i / scale_group], static_cast<std::uint8_t*>(state) + begin + i);
  }
}

// 16-bit numbers of any kind: f(pack of their bits) is written to the tile, or comes from it.
template <class F>
static inline void load_16bit(const void* from, std::int64_t begin, std::int64_t count, const F& f) {
  const auto* const p = static_cast<const std::uint16_t*>(from) + begin;
  std::int64_t i = 0;
#pragma GCC unroll 4
  for (; i + lanes<float> <= count; i += lanes<float>) f(i, widen(p + i));
  if (i == count) return;
  std::uint16_t padded[lanes<float>] = {};
  std::memcpy(padded, p + i, static_cast<std::size_t>(count - i) * 2);
  f(i, widen(padded));
}
template <class F>
static inline void store_16bit(void* to, std::int64_t begin, std::int64_t count, const F& f) {
  auto* const p = static_cast<std::uint16_t*>(to) + begin;
  std::int64_t i = 0;
#pragma GCC unroll 4
  for (; i + lanes<float> <= count; i += lanes<float>) {
    const Bits16 raw = narrow(f(i));
    std::memcpy(p + i, &raw, sizeof raw);
  }
  if (i == count) return;
  const Bits16 raw = narrow(f(i));
  std::memcpy(p + i, &raw, static_cast<std::size_t>(count - i) * 2);
}

static void decode_bfloat16(const void* from, std::int64_t begin, std::int64_t count, float* tile) {
  load_16bit(from, begin, count, [&](std::int64_t i, Bits32 bits) { encode(tile + i, (Reg<float>)(bits << 16)); });
}
static void encode_bfloat16(const float* tile, std::int64_t begin, std::int64_t count, std::uint32_t start, void* to) {
  Dither dither(start, begin);
  store_16bit(to, begin, count, [&](std::int64_t i) { return storage::bfloat16_of(decode(tile + i), dither.next()); });
}

static inline void decode_state(StateFormat format, const void* state, const float* scales, std::int64_t begin,
                                std::int64_t count, float* tile) {
  switch (format) {
    case StateFormat::signed8: return decode_8bit<StateFormat::signed8>(state, scales, begin, count, tile);
    case StateFormat::unsigned8: return decode_8bit<StateFormat::unsigned8>(state, scales, begin, count, tile);
    default: return decode_bfloat16(state, begin, count, tile);
  }
}
static inline void encode_state(StateFormat format, float* tile, std::int64_t begin, std::int64_t count,
                                std::uint32_t start, void* state, float* scales) {
  switch (format) {
    case StateFormat::signed8: return encode_8bit<StateFormat::signed8>(tile, begin, count, start, state, scales);
    case StateFormat::unsigned8: return encode_8bit<StateFormat::unsigned8>(tile, begin, count, start, state, scales);
    default: return encode_bfloat16(tile, begin, count, start, state);
  }
}

// ---- bfloat16 parameters with a remainder

static void decode_master16(const void* param, const void* remainder, std::int64_t begin, std::int64_t count,
                            float* tile) {
  load_16bit(param, begin, count, [&](std::int64_t i, Bits32 upper) { encode(tile + i, (Reg<float>)(upper << 16)); });
  load_16bit(remainder, begin, count, [&](std::int64_t i, Bits32 lower) {
    const Int32 extended = (Int32)(lower << 16) >> 16;
    encode(tile + i, (Reg<float>)(load_bits(tile + i) + (Bits32)extended));
  });
}
static void encode_master16(const float* tile, std::int64_t begin, std::int64_t count, void* param, void* remainder) {
  const auto master = [&](std::int64_t i) { return storage::master_of<0>(decode(tile + i), Bits32{}); };
  store_16bit(param, begin, count, [&](std::int64_t i) { return storage::nearest_bfloat16(master(i)); });
  store_16bit(remainder, begin, count, [&](std::int64_t i) { return master(i) & 0xffffu; });
}

static void decode_master8(const void* param, const void* remainder, std::int64_t begin, std::int64_t count,
                           float* tile) {
  const auto* const lower = static_cast<const std::int8_t*>(remainder) + begin;
  load_16bit(param, begin, count, [&](std::int64_t i, Bits32 upper) { encode(tile + i, (Reg<float>)(upper << 16)); });
  for (std::int64_t i = 0; i < count; i += scale_group) {
    std::uint8_t padded[scale_group] = {};
    const std::int64_t n = count - i < scale_group ? count - i : scale_group;
    std::memcpy(padded, lower + i, static_cast<std::size_t>(n));
    for (int j = 0; j < scale_group; j += lanes<float>) {
      const Int32 extended = (Int32)(load_code(padded + j) << 24) >> 16;
      encode(tile + i + j, (Reg<float>)(load_bits(tile + i + j) + (Bits32)extended));
    }
  }
}
static void encode_master8(const float* tile, std::int64_t begin, std::int64_t count, std::uint32_t start, void* param,
                           void* remainder) {
  Dither dither(start, begin), same(start, begin);
  store_16bit(param, begin, count, [&](std::int64_t i) {
    return storage::nearest_bfloat16(storage::master_of<8>(decode(tile + i), dither.next()));
  });
  auto* const lower = static_cast<std::uint8_t*>(remainder) + begin;
  for (std::int64_t i = 0; i < count; i += scale_group) {
    Codes code;
    for (int j = 0; j < scale_group / lanes<float>; ++j)
      code[j] = (storage::master_of<8>(decode(tile + i + j * lanes<float>), same.next()) >> 8) & 0xffu;
    std::uint8_t padded[scale_group];
    store_codes(padded, code);
    std::memcpy(lower + i, padded, static_cast<std::size_t>(count - i < scale_group ? count - i : scale_group));
  }
}

static inline void decode_param(const Storage& storage, const void* param, std::int64_t begin, std::int64_t count,
                                float* tile) {
  switch (storage.param) {
    case ParamFormat::remainder16: return decode_master16(param, storage.remainder, begin, count, tile);
    case ParamFormat::remainder8: return decode_master8(param, storage.remainder, begin, count, tile);
    default: return decode_bfloat16(param, begin, count, tile);
  }
}
static inline void encode_param(const Storage& storage, const float* tile, std::int64_t begin, std::int64_t count,
                                std::uint32_t start, void* param) {
  switch (storage.param) {
    case ParamFormat::remainder16: return encode_master16(tile, begin, count, param, storage.remainder);
    case ParamFormat::remainder8: return encode_master8(tile, begin, count, start, param, storage.remainder);
    default: return encode_bfloat16(tile, begin, count, start, param);
  }
}

}  // namespace onepass::cpu::ONEPASS_ISA
