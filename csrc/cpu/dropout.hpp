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

// What a seed and a threshold keep, `group` elements at a time.
class RandomBits {
 public:
  static constexpr int group = PhiloxSequence::group;

  explicit RandomBits(const Dropout& dropout)
      : sequence_(dropout.seed != nullptr ? static_cast<std::uint64_t>(*dropout.seed) : 0),
        // word >= threshold, as word > threshold - 1 where that is a 32-bit number.
        limit_(Bits32{} + static_cast<std::uint32_t>(dropout.threshold - 1)),
        always_(dropout.threshold == 0 ? ~0u : 0u) {}

  // Bits of elements [first, first + group), first a multiple of 4.
  __attribute__((always_inline)) std::uint32_t at(std::int64_t first) const {
    Bits32 words[2];
    sequence_.words(static_cast<std::uint64_t>(first), words);
    return bits_greater(words[0], limit_) | bits_greater(words[1], limit_) << group / 2 | always_;
  }

  // Bits of elements [from, to), from a multiple of 8, whose bit is the first of `out`. After the last one there are
  // zeros to the end of its byte.
  void write(std::int64_t from, std::int64_t to, std::uint8_t* out) const {
    for (std::int64_t first = from / group * group; first < to; first += group) {
      std::uint32_t bits = at(first);
      const std::int64_t low = first < from ? from : first, high = first + group < to ? first + group : to;
      bits = bits << (32 - (high - first)) >> (32 - (high - first)) >> (low - first);
      std::memcpy(out + (low - from) / 8, &bits, (high - low + 7) / 8);
    }
  }

 private:
  PhiloxSequence sequence_;
  Bits32 limit_;
  std::uint32_t always_;
};

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

  const DropoutCall& call;

  // Elements [first, first + count): one pack, or some of its lanes.
  template <bool whole>
  __attribute__((always_inline)) void drop_pack(std::int64_t first, std::uint32_t bits, F scale, int count) const {
    const Reg<F> x = load<whole>(static_cast<const T*>(call.x) + first, count);
    store<whole>(static_cast<T*>(call.y) + first, keep_lanes(bits, x * scale), count);
  }

  // The random words of the next group are computed while the elements of this one come from memory.
  template <bool reads_mask>
  void drop(std::int64_t begin, std::int64_t end) const {
    constexpr int group = RandomBits::group, width = lanes<F>;
    const RandomBits random(call.dropout);
    const F scale = F(call.dropout.scale);
    const std::int64_t bytes = mask_bytes(call.size);
    std::int64_t first = begin;
    for (; first + group <= end; first += group) {
      const std::uint32_t bits = reads_mask ? bits_at(call.mask, bytes, first) : random.at(first);
      if (!reads_mask && call.mask != nullptr) std::memcpy(call.mask + first / 8, &bits, group / 8);
      if (call.y != nullptr)
        for (int i = 0; i < group; i += width) drop_pack<true>(first + i, bits >> i, scale, width);
    }
    if (first == end) return;
    std::uint8_t rest[group / 8] = {};  // the last elements, fewer than a group
    std::uint8_t* const bits = call.mask != nullptr ? call.mask + first / 8 : rest;
    if (!reads_mask) random.write(first, end, bits);
    for (; call.y != nullptr && first < end; first += width) {
      const int count = end - first < width ? static_cast<int>(end - first) : width;
      drop_pack<false>(first, bits_at(bits, mask_bytes(end % group), first % group), scale, count);
    }
  }

  static void body(void* context, int thread, int n_threads) {
    const DropoutTeam& team = *static_cast<DropoutTeam*>(context);
    std::int64_t begin, end;
    part_of(team.call.size, 4096, thread, n_threads, begin, end);
    team.call.reads_mask ? team.drop<true>(begin, end) : team.drop<false>(begin, end);
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
