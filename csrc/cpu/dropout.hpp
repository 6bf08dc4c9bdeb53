// Dropout on the CPU, in two steps a chunk: the random words decide on bits, the bits decide on elements. Backward has
// only the second one to do where the bits were kept: making them costs more than moving the elements.
#pragma once
#include "core/layers.hpp"
#include "cpu/launch.hpp"
#include "cpu/philox.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// One bit a lane, the first lane in the lowest.
static inline std::uint32_t bits_greater(Bits32 a, Bits32 b) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epu32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)(a > b)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps((__m128)(a > b)));
#else
  std::uint32_t bits = 0;
  for (int lane = 0; lane < lanes<float>; ++lane) bits |= std::uint32_t(a[lane] > b[lane]) << lane;
  return bits;
#endif
}

// The lanes whose bit is set; 0 in the others, whatever they held.
static inline Reg<float> keep_lanes(std::uint32_t bits, Reg<float> x) {
#if defined(__AVX512F__)
  return (Reg<float>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)x);
#else
  Bits32 lane_bit;
  for (int lane = 0; lane < lanes<float>; ++lane) lane_bit[lane] = 1u << lane;
  return ((Bits32{} + bits) & lane_bit) != 0 ? x : Reg<float>{};
#endif
}
static inline Reg<double> keep_lanes(std::uint32_t bits, Reg<double> x) {
#if defined(__AVX512F__)
  return (Reg<double>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)x);
#else
  Bits64 lane_bit;
  for (int lane = 0; lane < lanes<double>; ++lane) lane_bit[lane] = 1u << lane;
  return ((Bits64{} + bits) & lane_bit) != 0 ? x : Reg<double>{};
#endif
}

// The bits of elements [from, to), from a multiple of 8, whose bit is the first of `out`. After the last one there are
// zeros to the end of its byte.
static void make_bits(const PhiloxSequence& sequence, std::uint64_t threshold, std::int64_t from, std::int64_t to,
                      std::uint8_t* out) {
  constexpr int group = PhiloxSequence::group;
  // word >= threshold, as word > threshold - 1 where that is a 32-bit number.
  const Bits32 limit = Bits32{} + static_cast<std::uint32_t>(threshold - 1);
  const std::uint32_t always = threshold == 0 ? ~0u : 0u;
  for (std::int64_t first = from / group * group; first < to; first += group) {
    Bits32 words[2];
    sequence.words(static_cast<std::uint64_t>(first), words);
    std::uint32_t bits = bits_greater(words[0], limit) | bits_greater(words[1], limit) << group / 2 | always;
    if (first >= from && first + group <= to) {
      std::memcpy(out + (first - from) / 8, &bits, group / 8);
    } else {
      const std::int64_t low = first < from ? from : first, high = first + group < to ? first + group : to;
      if (high - first < 32) bits &= (1u << (high - first)) - 1;
      std::memcpy(out + (low - from) / 8, reinterpret_cast<const char*>(&bits) + (low - first) / 8,
                  (high - low + 7) / 8);
    }
  }
}

// At least 25 bits from element i on, of a mask of so many bytes.
static inline std::uint32_t bits_at(const std::uint8_t* mask, std::int64_t bytes, std::int64_t i) {
  const std::int64_t first = i / 8, left = bytes - first;
  std::uint32_t bits = 0;
  if (left >= 4)
    std::memcpy(&bits, mask + first, 4);
  else
    std::memcpy(&bits, mask + first, left);
  return bits >> i % 8;
}

constexpr std::int64_t mask_bytes(std::int64_t size) { return (size + 7) / 8; }

template <class T>
struct DropoutTeam {
  using F = Arithmetic<T>;
  static constexpr std::int64_t chunk = 8192;  // elements: the bits of one stay in the first cache

  const DropoutCall& call;

  template <bool whole>
  static __attribute__((always_inline)) void drop(const T* x, T* y, std::uint32_t bits, F scale, int count) {
    store<whole>(y, keep_lanes(bits, load<whole>(x, count) * scale), count);
  }

  // Elements [0, n); bits: of these elements.
  static void drop_chunk(const T* x, T* y, const std::uint8_t* bits, std::int64_t n, F scale) {
    constexpr int width = lanes<F>;
    const std::int64_t bytes = mask_bytes(n);
    std::int64_t i = 0;
    for (; i + width <= n; i += width) drop<true>(x + i, y + i, bits_at(bits, bytes, i), scale, width);
    if (i < n) drop<false>(x + i, y + i, bits_at(bits, bytes, i), scale, static_cast<int>(n - i));
  }

  static void body(void* context, int thread, int n_threads) {
    const DropoutCall& call = static_cast<DropoutTeam*>(context)->call;
    const PhiloxSequence sequence(static_cast<std::uint64_t>(*call.dropout.seed));
    std::int64_t begin, end;
    part_of(call.size, chunk, thread, n_threads, begin, end);
    std::uint8_t of_chunk[chunk / 8];
    for (std::int64_t from = begin; from < end; from += chunk) {
      const std::int64_t to = from + chunk < end ? from + chunk : end;
      std::uint8_t* const bits = call.mask != nullptr ? call.mask + from / 8 : of_chunk;
      if (!call.reads_mask) make_bits(sequence, call.dropout.threshold, from, to, bits);
      if (call.y != nullptr)
        drop_chunk(static_cast<const T*>(call.x) + from, static_cast<T*>(call.y) + from, bits, to - from,
                   F(call.dropout.scale));
    }
  }

  static void run(const DropoutCall& call, int max_threads) {
    DropoutTeam team{call};
    const std::int64_t bytes = call.size * static_cast<std::int64_t>(2 * sizeof(T) + (call.reads_mask ? 0 : 16));
    run_team(threads_for(bytes, max_threads), &body, &team);
  }
};

static void dropout(const DropoutCall& call, int max_threads) {
  switch (call.dtype) {
    case DType::float32: return DropoutTeam<float>::run(call, max_threads);
    case DType::float64: return DropoutTeam<double>::run(call, max_threads);
    case DType::bfloat16: return DropoutTeam<bfloat16>::run(call, max_threads);
    case DType::float16: return DropoutTeam<float16>::run(call, max_threads);
  }
}

}  // namespace onepass::cpu::ONEPASS_ISA
