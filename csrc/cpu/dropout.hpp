// Dropout on the CPU, in two steps per group of elements: random words give bits, and bits select elements. Computing
// the bits costs more than moving the elements, so backward reads them from a mask if there is one.
#pragma once
#include "core/layers.hpp"
#include "cpu/partition.hpp"
#include "cpu/philox.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// One bit per lane; bit 0 is lane 0.
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

// Keeps the lanes whose bit is set, with bit `shift` for lane 0; the others become 0, whatever they are.
static inline __attribute__((always_inline)) Reg<float> keep_lanes(std::uint32_t bits, int shift, Reg<float> x) {
#if defined(__AVX512F__)
  return (Reg<float>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> shift), (__m512)x);
#else
  Bits32 lane_bit;
  for (int lane = 0; lane < lanes<float>; ++lane) lane_bit[lane] = 1u << lane << shift;
  return ((Bits32{} + bits) & lane_bit) != 0 ? x : Reg<float>{};
#endif
}
static inline __attribute__((always_inline)) Reg<double> keep_lanes(std::uint32_t bits, int shift, Reg<double> x) {
#if defined(__AVX512F__)
  return (Reg<double>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> shift), (__m512d)x);
#else
  Bits64 lane_bit;
  for (int lane = 0; lane < lanes<double>; ++lane) lane_bit[lane] = std::uint64_t(1) << lane << shift;
  return ((Bits64{} + bits) & lane_bit) != 0 ? x : Reg<double>{};
#endif
}

// At least 25 bits from element i on, from a mask of `bytes` bytes.
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

// The elements that a seed and a threshold keep, `group` of them at a time.
class RandomBits {
 public:
  static constexpr int group = 64;

  explicit RandomBits(const Dropout& dropout)
      : sequence_(dropout.seed != nullptr ? static_cast<std::uint64_t>(*dropout.seed) : 0),
        // word >= threshold is computed as word > threshold - 1, which is a 32-bit number unless threshold is 0.
        limit_(Bits32{} + static_cast<std::uint32_t>(dropout.threshold - 1)),
        always_(dropout.threshold == 0 ? ~std::uint64_t(0) : 0) {}

  // Bits of elements [first, first + group); first is a multiple of 4.
  __attribute__((always_inline)) std::uint64_t at(std::int64_t first) const {
    constexpr int at_once = 2 * PhiloxSequence::group, width = lanes<float>;
    std::uint64_t bits = always_;
#pragma GCC unroll 4
    for (int i = 0; i < group; i += at_once) {
      Bits32 words[4];
      sequence_.words<2>(static_cast<std::uint64_t>(first + i), words);
      for (int w = 0; w < 4; ++w) bits |= std::uint64_t(bits_greater(words[w], limit_)) << (i + w * width);
    }
    return bits;
  }

 private:
  PhiloxSequence sequence_;
  Bits32 limit_;
  std::uint64_t always_;
};

// Which elements to keep: all, those of a freshly computed mask, or those of a stored mask.
enum class Keep { all, drawn, read };

// y = dropout(x) or y = residual + dropout(x), over flat arrays.
template <class T>
struct DropoutPass {
  using F = Compute<T>;

  const T *x, *residual;  // residual: may be null
  T* y;                   // null: only the mask is written
  std::uint8_t* mask;     // may be null
  RandomBits random;
  F scale;

  DropoutPass(const void* x, const void* residual, void* y, std::uint8_t* mask, const Dropout& dropout)
      : x(static_cast<const T*>(x)),
        residual(static_cast<const T*>(residual)),
        y(static_cast<T*>(y)),
        mask(mask),
        random(dropout),
        scale(F(dropout.scale)) {}

  template <bool whole, Keep keep, bool adds>
  __attribute__((always_inline)) void pack(std::int64_t i, std::uint32_t bits, int shift, int count) const {
    Reg<F> out = load<whole>(x + i, count);
    if constexpr (keep != Keep::all) out = keep_lanes(bits, shift, out * scale);
    if constexpr (adds) out = load<whole>(residual + i, count) + out;
    store<whole>(y + i, out, count);
  }

  // Elements [begin, end); begin is a multiple of 8. The mask's last byte is padded with zeros.
  template <Keep keep, bool adds>
  void run(std::int64_t begin, std::int64_t end) const {
    constexpr int group = RandomBits::group, width = lanes<F>;
    std::int64_t first = begin;
    for (; first + group <= end; first += group) {
      std::uint64_t bits = ~std::uint64_t(0);
      if constexpr (keep == Keep::read) std::memcpy(&bits, mask + first / 8, sizeof bits);
      if constexpr (keep == Keep::drawn) {
        bits = random.at(first);
        if (mask != nullptr) std::memcpy(mask + first / 8, &bits, sizeof bits);
      }
      if (y == nullptr) continue;
      for (int half = 0; half < group; half += 32)
#pragma GCC unroll 16
        for (int i = 0; i < 32; i += width)
          pack<true, keep, adds>(first + half + i, static_cast<std::uint32_t>(bits >> half), i, width);
    }
    if (first == end) return;
    const int left = static_cast<int>(end - first);  // fewer than a group
    std::uint64_t bits = ~std::uint64_t(0);
    if constexpr (keep == Keep::read) std::memcpy(&bits, mask + first / 8, mask_bytes(left));
    if constexpr (keep == Keep::drawn) {
      bits = random.at(first) & (~std::uint64_t(0) >> (group - left));
      if (mask != nullptr) std::memcpy(mask + first / 8, &bits, mask_bytes(left));
    }
    if (y == nullptr) return;
    for (int i = 0; i < left; i += width) {
      const auto pack_bits = static_cast<std::uint32_t>(bits >> i);
      if (i + width <= left)
        pack<true, keep, adds>(first + i, pack_bits, 0, width);
      else
        pack<false, keep, adds>(first + i, pack_bits, 0, left - i);
    }
  }
};

template <class T>
struct DropoutJob {
  const DropoutCall& call;

  static void body(void* context, int thread, int n_threads) {
    const DropoutCall& call = static_cast<DropoutJob*>(context)->call;
    const DropoutPass<T> pass(call.x, nullptr, call.y, call.mask, call.dropout);
    std::int64_t begin, end;
    part_of(call.size, 4096, thread, n_threads, begin, end);
    call.reads_mask ? pass.template run<Keep::read, false>(begin, end)
                    : pass.template run<Keep::drawn, false>(begin, end);
  }

  static void run(const DropoutCall& call, int max_threads) {
    DropoutJob job{call};
    const std::int64_t bytes = call.size * static_cast<std::int64_t>(2 * sizeof(T) + (call.reads_mask ? 0 : 16));
    run_parallel(threads_for(bytes, max_threads), &body, &job);
  }
};

static void dropout(const DropoutCall& call, const StreamRef& where) {
  with_dtype(call.dtype, [&](auto type) { DropoutJob<typename decltype(type)::type>::run(call, where.max_threads); });
}

}  // namespace onepass::cpu::ONEPASS_ISA
