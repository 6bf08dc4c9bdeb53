// Loads and stores of states in the formats of core/storage.hpp, a tile of elements at a time: the tile is float32 and
// stays in the first-level cache, so the kernels of the rules run on it as they are.
#pragma once
#include "core/storage.hpp"
#include "cpu/lane_ops.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// Widens 8-bit codes to floats; narrows floats, whose lowest byte is the code, to codes. GCC's own conversions of such
// vectors are several times slower.
#if defined(__AVX512F__)
static inline Reg<float> codes_to_floats(const void* p, bool is_signed) {
  const __m128i raw = _mm_loadu_si128((const __m128i*)p);
  // The forms with a mask: GCC 12 warns of an uninitialised operand in the others.
  const __mmask16 all = 0xffff;
  const __m512i codes = is_signed ? _mm512_maskz_cvtepi8_epi32(all, raw) : _mm512_maskz_cvtepu8_epi32(all, raw);
  return (Reg<float>)_mm512_maskz_cvtepi32_ps(all, codes);
}
static inline void store_lowest_bytes(void* p, Reg<float> x) {
  _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
}
#elif defined(__AVX2__)
static inline Reg<float> codes_to_floats(const void* p, bool is_signed) {
  const __m128i raw = _mm_loadl_epi64((const __m128i*)p);
  return (Reg<float>)_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(raw) : _mm256_cvtepu8_epi32(raw));
}
static inline void store_lowest_bytes(void* p, Reg<float> x) {
  const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)x, lowest);
  const __m256i joined = _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
  _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(joined));
}
#else
static inline Reg<float> codes_to_floats(const void* p, bool is_signed) {
  const auto* const bytes = static_cast<const std::uint8_t*>(p);
  Reg<float> x;
  for (int lane = 0; lane < lanes<float>; ++lane)
    x[lane] = is_signed ? float(static_cast<std::int8_t>(bytes[lane])) : float(bytes[lane]);
  return x;
}
static inline void store_lowest_bytes(void* p, Reg<float> x) {
  const Bits32 bits = (Bits32)x;
  for (int lane = 0; lane < lanes<float>; ++lane)
    static_cast<std::uint8_t*>(p)[lane] = static_cast<std::uint8_t>(bits[lane]);
}
#endif

// Up to scale_group codes and their scale to floats. Whole packs are written: `to` has room for scale_group floats.
template <StateFormat format>
static inline void decode_group(const std::uint8_t* codes, float scale, int count, float* to) {
  constexpr bool is_signed = format == StateFormat::signed8;
  std::uint8_t padded[scale_group];
  if (count < scale_group) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, codes, static_cast<std::size_t>(count));
    codes = padded;
  }
  const float unit = scale / storage::levels(format);
#pragma GCC unroll 2
  for (int i = 0; i < scale_group; i += lanes<float>)
    encode(to + i, storage::value_of<format>(codes_to_floats(codes + i, is_signed), unit));
}

// The reverse; returns the scale. `from` has room for scale_group floats: those after `count` are overwritten.
template <StateFormat format>
static inline float encode_group(float* from, int count, std::uint8_t* codes) {
  constexpr int packs = scale_group / lanes<float>;
  for (int i = count; i < scale_group; ++i) from[i] = 0;
  Reg<float> root[packs], largest{}, not_finite{};
#pragma GCC unroll 16
  for (int i = 0; i < packs; ++i) {
    root[i] = storage::root_of<format>(decode(from + i * lanes<float>));
    largest = select(root[i] > largest, root[i], largest);
    not_finite += root[i] * 0.0f;  // NaN from a NaN or an infinity
  }
  float scale = 0;
  bool finite = true;
  for (int lane = 0; lane < lanes<float>; ++lane) {
    scale = largest[lane] > scale ? largest[lane] : scale;
    finite = finite && not_finite[lane] == 0;
  }
  if (!finite) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return __builtin_nanf("");
  }
  scale = scale < storage::largest_scale(format) ? scale : storage::largest_scale(format);
  const float inverse = scale > 0 ? storage::levels(format) / scale : 0;
  std::uint8_t padded[scale_group];
  std::uint8_t* const to = count < scale_group ? padded : codes;
#pragma GCC unroll 16
  for (int i = 0; i < packs; ++i) {
    const Reg<float> code = storage::code_of<format>(decode(from + i * lanes<float>), root[i], inverse);
    store_lowest_bytes(to + i * lanes<float>, code + storage::round_to_integer);
  }
  if (count < scale_group) std::memcpy(codes, padded, static_cast<std::size_t>(count));
  return scale;
}

// Elements [begin, begin + count) of a state to a tile of floats, and back. begin is a multiple of scale_group; the
// tile has room for whole groups.
template <StateFormat format>
static void decode_8bit(const void* state, const float* scales, std::int64_t begin, std::int64_t count, float* tile) {
  for (std::int64_t i = 0; i < count; i += scale_group) {
    const int n = static_cast<int>(count - i < scale_group ? count - i : scale_group);
    decode_group<format>(static_cast<const std::uint8_t*>(state) + begin + i, scales[(begin + i) / scale_group], n,
                         tile + i);
  }
}
template <StateFormat format>
static void encode_8bit(float* tile, std::int64_t begin, std::int64_t count, void* state, float* scales) {
  for (std::int64_t i = 0; i < count; i += scale_group) {
    const int n = static_cast<int>(count - i < scale_group ? count - i : scale_group);
    scales[(begin + i) / scale_group] =
        encode_group<format>(tile + i, n, static_cast<std::uint8_t*>(state) + begin + i);
  }
}

static inline void decode_state(StateFormat format, const void* state, const float* scales, std::int64_t begin,
                                std::int64_t count, float* tile) {
  switch (format) {
    case StateFormat::signed8: return decode_8bit<StateFormat::signed8>(state, scales, begin, count, tile);
    case StateFormat::unsigned8: return decode_8bit<StateFormat::unsigned8>(state, scales, begin, count, tile);
    default: break;
  }
  const bfloat16* const from = static_cast<const bfloat16*>(state) + begin;
  std::int64_t i = 0;
  for (; i + lanes<float> <= count; i += lanes<float>) encode(tile + i, decode(from + i));
  if (i < count) encode(tile + i, load_some(from + i, static_cast<int>(count - i)));
}

static inline void encode_state(StateFormat format, float* tile, std::int64_t begin, std::int64_t count, void* state,
                                float* scales) {
  switch (format) {
    case StateFormat::signed8: return encode_8bit<StateFormat::signed8>(tile, begin, count, state, scales);
    case StateFormat::unsigned8: return encode_8bit<StateFormat::unsigned8>(tile, begin, count, state, scales);
    default: break;
  }
  bfloat16* const to = static_cast<bfloat16*>(state) + begin;
  std::int64_t i = 0;
  for (; i + lanes<float> <= count; i += lanes<float>) encode(to + i, decode(tile + i));
  if (i < count) store_some(to + i, decode(tile + i), static_cast<int>(count - i));
}

}  // namespace onepass::cpu::ONEPASS_ISA
