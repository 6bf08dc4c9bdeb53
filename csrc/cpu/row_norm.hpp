// LayerNorm and RMSNorm on the CPU: rows are divided among the threads. A row stays in cache between its statistics and
// its result, so memory is read once.
#pragma once
#include "cpu/dropout.hpp"
#include "cpu/moments.hpp"
#include "rows/norm.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// Weight and bias as F[size]: used in place if they have this form, else converted once per call.
template <class F>
struct Affine {
  const F *weight = nullptr, *bias = nullptr;

  static const F* as_array(const void* from, DType dtype, bool scalar, std::int64_t size, F* buffer) {
    if (from == nullptr) return nullptr;
    const bool is_f = dtype == (sizeof(F) == 8 ? DType::float64 : DType::float32);
    if (is_f && !scalar) return static_cast<const F*>(from);
    for (std::int64_t i = 0; i < size; ++i) buffer[i] = F(number_at(dtype, from, scalar ? 0 : i));
    return buffer;
  }
};

template <class F, bool whole>
static inline Reg<F> weight_at(const F* weight, std::int64_t i, int count) {
  return weight != nullptr ? load<whole>(weight + i, count) : Reg<F>{} + F(1);
}

template <class T, bool rms>
struct RowNormJob {
  using F = Compute<T>;
  static constexpr int width = lanes<F>;

  const RowNorm& call;
  Affine<F> affine;

  static rows::Stats<F> stats_of(const T* x, std::int64_t n, double eps) {
    if constexpr (rms) {
      Sums<F> squares;
      for_packs<F>(0, n, [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
        const Reg<F> v = load<decltype(w)::value>(x + i, count);
        squares.part[part] += v * v;
      });
      return rows::Stats<F>::of(0, double(squares.total()) / double(n), eps);
    } else {
      const rows::Moments moments = moments_of(x, n);
      return rows::Stats<F>::of(moments.mean, moments.variance(), eps);
    }
  }

  // The row's statistics, stored for backward if the call asks for them.
  rows::Stats<F> measure(const T* x, std::int64_t row) const {
    const rows::Stats<F> stats = stats_of(x, call.size, call.eps);
    if (call.stats != nullptr) stats.keep(call.stats, call.rows, row);
    return stats;
  }

  // prefetch: distance, in elements, to the row whose statistics are computed next.
  void normalise(const T* x, std::int64_t row, const rows::Stats<F>& stats, std::int64_t prefetch) const {
    const std::int64_t n = call.size;
    T* const y = static_cast<T*>(call.y) + row * n;
    for_packs<F>(0, n, [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
      constexpr bool whole = decltype(w)::value;
      fetch<1>(y + i, part);
      fetch(x + i + prefetch, part);
      const Reg<F> v = load<whole>(x + i, count);
      Reg<F> out;
      if constexpr (rms)
        out = v * stats.rstd;
      else
        out = stats.normalised(v);
      if (affine.weight != nullptr) out = out * load<whole>(affine.weight + i, count);
      if (affine.bias != nullptr) out = out + load<whole>(affine.bias + i, count);
      store<whole>(y + i, out, count);
    });
  }

  // sum = residual + dropout(x) for elements [begin, end); begin is a multiple of 8.
  static void add(const DropoutPass<T>& pass, bool drops, std::int64_t begin, std::int64_t end) {
    drops ? pass.template run<Keep::drawn, true>(begin, end) : pass.template run<Keep::all, true>(begin, end);
  }

  static void body(void* context, int thread, int n_threads) {
    const RowNormJob& job = *static_cast<RowNormJob*>(context);
    const RowNorm& call = job.call;
    const std::int64_t n = call.size;
    std::int64_t begin, end;
    part_of(call.rows, 8, thread, n_threads, begin, end);
    if (call.residual == nullptr) {
      const T* const x = static_cast<const T*>(call.x);
      // A short row's statistics end in a chain of dependent scalar operations, which overlaps writing the row before.
      const std::int64_t rows_ahead = n * static_cast<std::int64_t>(sizeof(T)) <= 4096 ? 1 : 0;
      rows::Stats<F> measured{};
      if (begin < end && rows_ahead > 0) measured = job.measure(x + begin * n, begin);
      for (std::int64_t row = begin; row < end; ++row) {
        rows::Stats<F> stats = measured;
        if (row + rows_ahead < end) measured = job.measure(x + (row + rows_ahead) * n, row + rows_ahead);
        if (rows_ahead == 0) stats = measured;
        job.normalise(x + row * n, row, stats, (rows_ahead + 1) * n);
      }
      return;
    }
    const DropoutPass<T> pass(call.x, call.residual, call.sum, call.mask, call.dropout);
    const std::int64_t rows_at_once = n % 8 == 0 ? 1 : 8;  // 8 rows start at a whole byte of the bit mask
    for (std::int64_t row = begin; row < end; ++row) {
      if (row % rows_at_once == 0) {
        const std::int64_t last = row + rows_at_once < end ? row + rows_at_once : end;
        add(pass, call.dropout.seed != nullptr, row * n, last * n);
      }
      const T* const sum = static_cast<const T*>(call.sum) + row * n;
      job.normalise(sum, row, job.measure(sum, row), n);
    }
  }

  static void run(const RowNorm& call, int max_threads) {
    F* const buffer = static_cast<F*>(call.workspace);
    RowNormJob job{call, {}};
    job.affine.weight = Affine<F>::as_array(call.weight, call.weight_dtype, call.scalar_affine, call.size, buffer);
    job.affine.bias =
        Affine<F>::as_array(call.bias, call.weight_dtype, call.scalar_affine, call.size, buffer + call.size);
    const int streams = call.residual == nullptr ? 2 : 4, philox = call.dropout.seed != nullptr ? 16 : 0;
    const std::int64_t bytes = call.rows * call.size * static_cast<std::int64_t>(streams * sizeof(T) + philox);
    run_parallel(threads_for(bytes, max_threads), &body, &job);
  }
};

// Rows are divided into blocks, whose number depends only on the shape. Each block has its own sums for the gradients
// of weight and bias, which are joined in order: the bits do not depend on the number of threads.
template <class T, bool rms>
struct RowNormBackwardJob {
  using F = Compute<T>;
  using InputGradient = rows::InputGradient<F>;
  static constexpr int width = lanes<F>;

  const RowNormBackward& call;
  const F* weight;
  F* sums;  // [blocks][2][size]: of dy * xhat and of dy
  std::int64_t blocks;

  // One row: its addresses, statistics, and first element.
  struct Row {
    const T *x, *dy, *dsum;
    T *dx, *dbranch;
    rows::Stats<F> stats;
    rows::InputGradient<F> gradient;  // once the row's sums are known
    std::int64_t first;

    __attribute__((always_inline)) Reg<F> xhat(Reg<F> v) const { return rms ? v * stats.rstd : stats.normalised(v); }
  };

  Row row_at(std::int64_t row) const {
    const std::int64_t first = row * call.size;
    const auto at = [&](const void* p) { return p != nullptr ? static_cast<const T*>(p) + first : nullptr; };
    const T* const x = at(call.x);
    rows::Stats<F> stats = call.stats != nullptr ? rows::Stats<F>::kept(call.stats, call.rows, row)
                                                 : RowNormJob<T, rms>::stats_of(x, call.size, call.eps);
    stats.rstd = rows::backward_rstd(stats.rstd, rms, call.size);
    return {x,     at(call.dy), at(call.dsum), const_cast<T*>(at(call.dx)), const_cast<T*>(at(call.dbranch)),
            stats, {},          first};
  }

  // Per row the sums of g and of g * xhat, which give its InputGradient; and, over the rows, the sums of dy * xhat and
  // of dy, added to the block's.
  template <bool affine, int n_rows>
  void add_up(Row (&rows)[n_rows], F* dweight, F* dbias) const {
    const std::int64_t n = call.size;
    Reg<F> g_sum[n_rows] = {}, gx_sum[n_rows] = {};
    // A single running sum per row: several rows at once already hide the latency of an addition.
    for_packs<F, 1>(0, n, [&](auto whole_, std::int64_t i, int count, int) __attribute__((always_inline)) {
      constexpr bool whole = decltype(whole_)::value;
      const Reg<F> w = weight_at<F, whole>(weight, i, count);
      Reg<F> weight_sum{}, bias_sum{};
      if constexpr (affine) {
        weight_sum = load<whole>(dweight + i, count);
        bias_sum = load<whole>(dbias + i, count);
      }
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r) {
        const Reg<F> dy = load<whole>(rows[r].dy + i, count);
        const Reg<F> xhat = rows[r].xhat(load<whole>(rows[r].x + i, count));
        const Reg<F> g = w * dy;
        if constexpr (!rms) g_sum[r] += g;
        gx_sum[r] += g * xhat;  // dy is 0 in the lanes after a tail
        if constexpr (affine) {
          weight_sum += dy * xhat;
          bias_sum += dy;
        }
      }
      if constexpr (affine) {
        store<whole>(dweight + i, weight_sum, count);
        store<whole>(dbias + i, bias_sum, count);
      }
    });
    for (int r = 0; r < n_rows; ++r) {
      rows[r].gradient =
          InputGradient::of(rows[r].stats, F(1), sum_of<F>(g_sum[r]) / F(n), sum_of<F>(gx_sum[r]) / F(n));
    }
  }

  // prefetch: distance, in elements, to the row that is read next.
  template <bool fused>
  void write(const Row& row, std::int64_t prefetch) const {
    for_packs<F>(0, call.size, [&](auto whole_, std::int64_t i, int count, int part) __attribute__((always_inline)) {
      constexpr bool whole = decltype(whole_)::value;
      fetch(row.dy + i + prefetch, part);
      fetch(row.x + i + prefetch, part);
      const Reg<F> g = weight_at<F, whole>(weight, i, count) * load<whole>(row.dy + i, count);
      Reg<F> dx = row.gradient.at(g, load<whole>(row.x + i, count));
      if constexpr (fused) {
        if (row.dsum != nullptr) dx = dx + load<whole>(row.dsum + i, count);
        if (row.dbranch != nullptr) {
          const std::uint32_t bits = bits_at(call.mask, mask_bytes(call.rows * call.size), row.first + i);
          store<whole>(row.dbranch + i, keep_lanes(bits, 0, dx * F(call.dropout.scale)), count);
        }
      }
      store<whole>(row.dx + i, dx, count);
    });
  }

  template <bool affine, int n_rows>
  void backward_rows(std::int64_t first, F* dweight, F* dbias) const {
    Row rows[n_rows];
    for (int r = 0; r < n_rows; ++r) rows[r] = row_at(first + r);
    add_up<affine>(rows, dweight, dbias);
    if (call.dx == nullptr) return;
    const bool fused = call.dsum != nullptr || call.dbranch != nullptr;
    for (const Row& row : rows) fused ? write<true>(row, n_rows * call.size) : write<false>(row, n_rows * call.size);
  }

  template <bool affine>
  void backward_block(std::int64_t block) const {
    std::int64_t begin, end;
    part_of(call.rows, 1, static_cast<int>(block), static_cast<int>(blocks), begin, end);
    F* const dweight = affine ? sums + block * 2 * call.size : nullptr;
    F* const dbias = affine ? dweight + call.size : nullptr;
    if constexpr (affine) std::memset(dweight, 0, 2 * call.size * sizeof(F));
    // Several rows at once share the loads and stores of the sums. Rows shorter than a page do not: the hardware
    // prefetches one stream per page, and 16384 rows of 256 floats would take 2.1 ms instead of 1.35 ms.
    constexpr int rows_at_once = 4;
    const bool shares = call.size * static_cast<std::int64_t>(sizeof(T)) >= 4096;
    std::int64_t row = begin;
    for (; shares && row + rows_at_once <= end; row += rows_at_once)
      backward_rows<affine, rows_at_once>(row, dweight, dbias);
    for (; row < end; ++row) backward_rows<affine, 1>(row, dweight, dbias);
  }

  static void body(void* context, int thread, int n_threads) {
    const RowNormBackwardJob& job = *static_cast<RowNormBackwardJob*>(context);
    std::int64_t begin, end;
    part_of(job.blocks, 1, thread, n_threads, begin, end);
    for (std::int64_t block = begin; block < end; ++block)
      job.sums != nullptr ? job.backward_block<true>(block) : job.backward_block<false>(block);
  }

  // Adds up the blocks' sums in order; a thread has columns [begin, end).
  static void add_block_sums(void* context, int thread, int n_threads) {
    const RowNormBackwardJob& job = *static_cast<RowNormBackwardJob*>(context);
    const std::int64_t n = job.call.size;
    std::int64_t begin, end;
    part_of(n, 64, thread, n_threads, begin, end);
    for (int half = 0; half < 2; ++half) {
      void* const out = half == 0 ? job.call.dweight : job.call.dbias;
      F* const total = job.sums + half * n;
      if (out == nullptr) continue;
      for (std::int64_t block = 1; block < job.blocks; ++block) {
        const F* const more = job.sums + block * 2 * n + half * n;
        for (std::int64_t i = begin; i < end; ++i) total[i] += more[i];
      }
      if (!job.call.scalar_affine)
        for (std::int64_t i = begin; i < end; ++i) set_number_at(job.call.weight_dtype, out, i, double(total[i]));
    }
  }

  void add_scalar_sums() const {
    for (int half = 0; half < 2; ++half) {
      void* const out = half == 0 ? call.dweight : call.dbias;
      double total = 0;
      for (std::int64_t i = 0; i < call.size; ++i) total += double(sums[half * call.size + i]);
      if (out != nullptr) set_number_at(call.weight_dtype, out, 0, total);
    }
  }

  static void run(const RowNormBackward& call, int max_threads) {
    F* const buffer = static_cast<F*>(call.workspace);
    RowNormBackwardJob job{call, nullptr, nullptr, row_norm_blocks(call.rows, call.size)};
    job.weight = Affine<F>::as_array(call.weight, call.weight_dtype, call.scalar_affine, call.size, buffer);
    if (call.dweight != nullptr || call.dbias != nullptr) job.sums = buffer + call.size;
    const std::int64_t bytes = call.rows * call.size * static_cast<std::int64_t>(3 * sizeof(T));
    const int threads = threads_for(bytes, max_threads);
    run_parallel(threads, &body, &job);
    if (job.sums == nullptr) return;
    run_parallel(threads_for(job.blocks * call.size * static_cast<std::int64_t>(2 * sizeof(F)), max_threads),
                 &add_block_sums, &job);
    if (call.scalar_affine) job.add_scalar_sums();
  }
};

template <class T>
static void row_norm_as(const RowNorm& call, int max_threads) {
  call.rms ? RowNormJob<T, true>::run(call, max_threads) : RowNormJob<T, false>::run(call, max_threads);
}
template <class T>
static void row_norm_backward_as(const RowNormBackward& call, int max_threads) {
  call.rms ? RowNormBackwardJob<T, true>::run(call, max_threads) : RowNormBackwardJob<T, false>::run(call, max_threads);
}

// Weight and bias, if they have to be converted; see Affine.
static std::int64_t row_norm_workspace(const RowNorm& call) {
  const DType dtype = compute_dtype(call.dtype);
  const bool converts = call.scalar_affine || call.weight_dtype != dtype;
  return converts && (call.weight != nullptr || call.bias != nullptr) ? 2 * call.size * size_of(dtype) : 0;
}
static std::int64_t row_norm_backward_workspace(const RowNormBackward& call) {
  return (1 + 2 * row_norm_blocks(call.rows, call.size)) * call.size * size_of(compute_dtype(call.dtype));
}

static void row_norm(const RowNorm& call, const StreamRef& where) {
  with_dtype(call.dtype, [&](auto type) { row_norm_as<typename decltype(type)::type>(call, where.max_threads); });
}
static void row_norm_backward(const RowNormBackward& call, const StreamRef& where) {
  with_dtype(call.dtype,
             [&](auto type) { row_norm_backward_as<typename decltype(type)::type>(call, where.max_threads); });
}

}  // namespace onepass::cpu::ONEPASS_ISA
