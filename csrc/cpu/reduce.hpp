// Totals over many tensors, for the global gradient norm: blocks of a fixed size with 16 running totals each, joined in
// a fixed order.
#pragma once
#include "core/reduction.hpp"
#include "cpu/pack.hpp"
#include "cpu/partition.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// Loads two registers of elements as float64.
static inline __attribute__((always_inline)) void widen(const double* p, Reg<double> (&out)[2]) {
  out[0] = decode(p);
  out[1] = decode(p + lanes<double>);
}
template <class T>
static inline __attribute__((always_inline)) void widen(const T* p, Reg<double> (&out)[2]) {
  const Reg<float> x = decode(p);
  Pack<float, register_bytes / 2> half[2];
  std::memcpy(half, &x, sizeof x);
  out[0] = __builtin_convertvector(half[0], Reg<double>);
  out[1] = __builtin_convertvector(half[1], Reg<double>);
}

// 16 float64 totals for any register width, so that every instruction set adds in the same order.
struct RunningTotals {
  static constexpr int count = 16, registers = count / lanes<double>;
  Reg<double> part[registers];

  __attribute__((always_inline)) explicit RunningTotals(Total total) {
    for (auto& p : part) p = Reg<double>{} + empty_total(total);
  }

  // weighted: elements are multiplied by those of a second array.
  template <bool weighted, class T>
  __attribute__((always_inline)) void add(const Reduction& reduction, const T* p, const T* weight) {
    for (int r = 0; r < registers; r += 2) {
      Reg<double> x[2];
      widen(p + r * lanes<double>, x);
      if constexpr (weighted) {
        Reg<double> w[2];
        widen(weight + r * lanes<double>, w);
        x[0] = x[0] * w[0];
        x[1] = x[1] * w[1];
      }
      part[r] = add_element(reduction, part[r], x[0]);
      part[r + 1] = add_element(reduction, part[r + 1], x[1]);
    }
  }

  // The total, including the last n elements, fewer than `count`.
  template <bool weighted, class T>
  double finish(const Reduction& reduction, const T* rest, const T* weight, int n) const {
    double lane[count];
    std::memcpy(lane, part, sizeof lane);
    for (int i = 0; i < n; ++i) {
      double x = load<false>(rest + i, 1)[0];
      if constexpr (weighted) x *= load<false>(weight + i, 1)[0];
      lane[i] = add_element(reduction, lane[i], x);
    }
    for (int width = count / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] = join(reduction.total, lane[i], lane[i + width]);
    return lane[0];
  }
};

template <bool weighted, class T>
static inline __attribute__((always_inline)) double block_total(const Reduction& reduction, const T* p, const T* weight,
                                                                std::int64_t n) {
  RunningTotals totals(reduction.total);
  std::int64_t i = 0;
  for (; i + RunningTotals::count <= n; i += RunningTotals::count) totals.add<weighted>(reduction, p + i, weight + i);
  return totals.finish<weighted>(reduction, p + i, weight + i, static_cast<int>(n - i));
}

// `kind` is squares, weighted_squares or, for all other totals, magnitudes; these take their kind from the call at run
// time. The two kinds of squares are compiled apart, so that their loops have no branch.
template <class T, Total kind>
struct ReduceJob {
  const Reduce& call;
  Reduction reduction;
  std::int64_t blocks;

  static void body(void* context, int thread, int n_threads) {
    const ReduceJob& job = *static_cast<ReduceJob*>(context);
    Reduction reduction = job.reduction;
    constexpr bool weighted = kind == Total::weighted_squares;
    if constexpr (kind != Total::magnitudes) reduction.total = Total::squares;
    std::int64_t begin, end;
    part_of(job.blocks, 1, thread, n_threads, begin, end);
    std::int64_t first = 0;  // index of the array's first block
    for (std::int64_t array = 0; first < end; ++array) {
      const std::int64_t size = job.call.sizes[array], blocks = reduce_blocks(size);
      const T* const data = static_cast<const T*>(job.call.data[array]);
      const T* const weight = weighted ? static_cast<const T*>(job.call.weights[array]) : data;
      for (std::int64_t b = begin > first ? begin - first : 0; b < blocks && first + b < end; ++b) {
        const std::int64_t from = b * reduce_block, n = size - from < reduce_block ? size - from : reduce_block;
        job.call.partials[first + b] = block_total<weighted>(reduction, data + from, weight + from, n);
      }
      first += blocks;
    }
  }

  static void run(const Reduce& call) {
    ReduceJob job{call, call.reduction, 0};
    std::int64_t elements = 0;
    for (std::int64_t i = 0; i < call.n_tensors; ++i) {
      elements += call.sizes[i];
      job.blocks += reduce_blocks(call.sizes[i]);
    }
    constexpr std::int64_t bytes = (kind == Total::weighted_squares ? 2 : 1) * sizeof(T);
    run_parallel(threads_for(elements * bytes, call.where.max_threads), &body, &job);
  }
};

template <class T>
static void reduce_as(const Reduce& call) {
  switch (call.reduction.total) {
    case Total::squares: return ReduceJob<T, Total::squares>::run(call);
    case Total::weighted_squares: return ReduceJob<T, Total::weighted_squares>::run(call);
    default: return ReduceJob<T, Total::magnitudes>::run(call);
  }
}

}  // namespace onepass::cpu::ONEPASS_ISA
