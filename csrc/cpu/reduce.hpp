// Sums of squares for the global gradient norm: blocks of a fixed size, 16 running sums a block, joined in a fixed
// order.
#pragma once
#include "cpu/launch.hpp"
#include "cpu/pack.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// 16 float64 sums whatever the register width, so that every instruction set adds in the same order.
struct Sums {
  static constexpr int count = 16, registers = count / lanes<double>;
  Reg<double> part[registers] = {};

  template <bool whole>
  __attribute__((always_inline)) void add(const double* p, int n) {
    for (int r = 0; r < registers; ++r) {
      const int left = n - r * lanes<double>;
      if (!whole && left <= 0) return;
      const Reg<double> x = load<whole>(p + r * lanes<double>, left < lanes<double> ? left : lanes<double>);
      part[r] = part[r] + x * x;
    }
  }
  template <bool whole, class T>
  __attribute__((always_inline)) void add(const T* p, int n) {
    using Half = Pack<float, register_bytes / 2>;
    for (int r = 0; r < registers; r += 2) {
      const int left = n - r * lanes<double>;
      if (!whole && left <= 0) return;
      const Reg<float> x = load<whole>(p + r * lanes<double>, left < lanes<float> ? left : lanes<float>);
      Half half[2];
      std::memcpy(half, &x, sizeof x);
      const auto low = __builtin_convertvector(half[0], Reg<double>);
      const auto high = __builtin_convertvector(half[1], Reg<double>);
      part[r] = part[r] + low * low;
      part[r + 1] = part[r + 1] + high * high;
    }
  }

  double total() const {
    double lane[count];
    std::memcpy(lane, part, sizeof lane);
    for (int width = count / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
};

template <class T>
static double block_sum(const T* p, std::int64_t n) {
  Sums sums;
  std::int64_t i = 0;
  for (; i + Sums::count <= n; i += Sums::count) sums.template add<true>(p + i, Sums::count);
  if (i < n) sums.template add<false>(p + i, static_cast<int>(n - i));
  return sums.total();
}

template <class T>
struct SumTeam {
  const SumOfSquares& call;
  std::int64_t blocks;

  static void body(void* context, int thread, int n_threads) {
    const SumTeam& team = *static_cast<SumTeam*>(context);
    std::int64_t begin, end;
    part_of(team.blocks, 1, thread, n_threads, begin, end);
    std::int64_t first = 0;  // number of the tensor's first block
    for (std::int64_t tensor = 0; first < end; ++tensor) {
      const std::int64_t size = team.call.sizes[tensor], blocks = sum_blocks(size);
      const T* const data = static_cast<const T*>(team.call.data[tensor]);
      for (std::int64_t b = begin > first ? begin - first : 0; b < blocks && first + b < end; ++b) {
        const std::int64_t from = b * sum_block, n = size - from < sum_block ? size - from : sum_block;
        team.call.partials[first + b] = block_sum(data + from, n);
      }
      first += blocks;
    }
  }

  static double run(const SumOfSquares& call) {
    SumTeam team{call, 0};
    std::int64_t elements = 0;
    for (std::int64_t i = 0; i < call.n_tensors; ++i) {
      elements += call.sizes[i];
      team.blocks += sum_blocks(call.sizes[i]);
    }
    run_team(threads_for(elements * static_cast<std::int64_t>(sizeof(T)), call.max_threads), &body, &team);
    double sum = 0;
    for (std::int64_t b = 0; b < team.blocks; ++b) sum += call.partials[b];
    return sum;
  }
};

static double sum_of_squares(const SumOfSquares& call) {
  switch (call.dtype) {
    case DType::float32: return SumTeam<float>::run(call);
    case DType::float64: return SumTeam<double>::run(call);
    case DType::bfloat16: return SumTeam<bfloat16>::run(call);
    case DType::float16: return SumTeam<float16>::run(call);
  }
  return 0;
}

}  // namespace onepass::cpu::ONEPASS_ISA
