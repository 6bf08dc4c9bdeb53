// BatchNorm on the CPU. The array is divided into units by its shape alone, and the units' statistics are joined in
// order, so the bits do not depend on the number of threads.
//
//   channels first, [batch, channels, space]: a unit is a few samples of one channel. A thread processes whole
//   channels,
//     computing the results while the channel is still in cache; with too few channels for the threads, all statistics
//     come first. If the statistics are given, the array is processed in the order of memory.
//   channels last, [rows, channels]: a unit is a block of rows; all statistics, then all results.
#pragma once
#include "core/layers.hpp"
#include "cpu/moments.hpp"
#include "cpu/partition.hpp"
#include "cpu/threads.hpp"
#include "rows/channel.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// Calls body(begin, end) with one part of `total` per thread.
template <class Body>
static void in_parallel(int n_threads, std::int64_t total, std::int64_t grain, const Body& body) {
  struct Call {
    const Body& body;
    std::int64_t total, grain;
  } call{body, total, grain};
  run_parallel(
      n_threads,
      [](void* context, int thread, int threads) {
        const Call& c = *static_cast<const Call*>(context);
        std::int64_t begin, end;
        part_of(c.total, c.grain, thread, threads, begin, end);
        if (begin < end) c.body(begin, end);
      },
      &call);
}

// The units of a [batch, channels, space] array.
struct ChannelsFirst {
  BatchShape shape;
  std::int64_t samples, units;  // samples per unit; units per channel

  explicit ChannelsFirst(const BatchShape& s) : shape(s), samples(batch_norm_samples(s)), units(batch_norm_units(s)) {}

  std::int64_t stride() const { return shape.channels * shape.space; }
  // The first element of a unit, and its number of samples.
  std::int64_t first(std::int64_t channel, std::int64_t unit) const {
    return unit * samples * stride() + channel * shape.space;
  }
  std::int64_t samples_of(std::int64_t unit) const {
    const std::int64_t left = shape.batch - unit * samples;
    return left < samples ? left : samples;
  }

  // for_packs() over all samples of a unit.
  template <class F, class Visit>
  __attribute__((always_inline)) void for_packs_of(std::int64_t channel, std::int64_t unit, const Visit& visit) const {
    const std::int64_t n = samples_of(unit);
    for (std::int64_t sample = 0; sample < n; ++sample) {
      const std::int64_t begin = first(channel, unit) + sample * stride();
      for_packs<F>(begin, begin + shape.space, visit);
    }
  }

  // Runs statistics(channel, unit) for all units of a channel, then finish(channel), then results(channel, unit).
  template <class Statistics, class Finish, class Results>
  void run(int threads, const Statistics& statistics, const Finish& finish, const Results& results) const {
    const auto for_units = [&](std::int64_t begin, std::int64_t end, const auto& visit) {
      for (std::int64_t i = begin; i < end; ++i) visit(i / units, i % units);
    };
    if (threads == 1 || shape.channels >= 4 * threads) {
      in_parallel(threads, shape.channels, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t channel = begin; channel < end; ++channel) {
          for_units(channel * units, (channel + 1) * units, statistics);
          finish(channel);
          for_units(channel * units, (channel + 1) * units, results);
        }
      });
      return;
    }
    const std::int64_t all = shape.channels * units;
    in_parallel(threads, all, 1, [&](std::int64_t begin, std::int64_t end) { for_units(begin, end, statistics); });
    for (std::int64_t channel = 0; channel < shape.channels; ++channel) finish(channel);
    in_parallel(threads, all, 1, [&](std::int64_t begin, std::int64_t end) { for_units(begin, end, results); });
  }
};

// A visitor's argument: a pack of adjacent channels in one or several rows of a [rows, channels] array.
template <bool whole_, int rows_>
struct Columns {
  static constexpr bool whole = whole_;
  static constexpr int rows = rows_;
  std::int64_t channel, first;  // channel of lane 0, and its element in the first row
  int count, part;              // number of lanes; index of the running sum, as in for_packs()
};

// The blocks of a [rows, channels] array.
struct ChannelsLast {
  std::int64_t rows, channels, blocks;

  explicit ChannelsLast(const BatchShape& s)
      : rows(s.batch * s.space), channels(s.channels), blocks(batch_norm_units(s)) {}

  // Sums of `tile` columns at a time stay in the first-level cache. After rows_per_part rows they are added, in double,
  // to the block's.
  static constexpr std::int64_t tile = 512, rows_per_part = 256;
  static constexpr int rows_at_once = 4;

  // visit(first row, end row, first column, end column) for the parts of a block, in order.
  template <class Visit>
  void for_parts_of(std::int64_t block, const Visit& visit) const {
    std::int64_t begin, end;
    part_of(rows, 1, static_cast<int>(block), static_cast<int>(blocks), begin, end);
    for (std::int64_t row = begin; row < end; row += rows_per_part)
      for (std::int64_t c = 0; c < channels; c += tile)
        visit(row, row + rows_per_part < end ? row + rows_per_part : end, c, c + tile < channels ? c + tile : channels);
  }

  // visit(Columns) for every pack of columns [c_begin, c_end) in rows [begin, end). Several rows at once share the
  // loads of the channels' constants.
  template <class F, class Visit>
  __attribute__((always_inline)) void for_packs_of(std::int64_t begin, std::int64_t end, std::int64_t c_begin,
                                                   std::int64_t c_end, const Visit& visit) const {
    const auto visit_rows = [&](std::int64_t row, auto one) __attribute__((always_inline)) {
      for_packs<F>(c_begin, c_end, [&](auto w, std::int64_t c, int count, int part) __attribute__((always_inline)) {
        visit(Columns<decltype(w)::value, decltype(one)::value ? 1 : rows_at_once>{c, row * channels + c, count, part});
      });
    };
    std::int64_t row = begin;
    for (; row + rows_at_once <= end; row += rows_at_once) visit_rows(row, Constant<false>{});
    for (; row < end; ++row) visit_rows(row, Constant<true>{});
  }

  // Runs statistics(block) for all blocks, then finish(channel), then results(first row, end row).
  template <class Statistics, class Finish, class Results>
  void run(int threads, const Statistics& statistics, const Finish& finish, const Results& results) const {
    in_parallel(threads, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) statistics(block);
    });
    in_parallel(channels * blocks >= 4096 ? threads : 1, channels, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t channel = begin; channel < end; ++channel) finish(channel);
    });
    in_parallel(threads, rows, 1, results);
  }
};

// A Normaliser or an InputGradient per channel, as one array per member, so that a load takes several channels.
template <class F>
struct ChannelConstants {
  F *mean, *scale, *shift, *x_scale;  // [channels]

  ChannelConstants(void* workspace, std::int64_t channels)
      : mean(static_cast<F*>(workspace)), scale(mean + channels), shift(scale + channels), x_scale(shift + channels) {}

  void set(std::int64_t c, const rows::Normaliser<F>& n) const {
    mean[c] = n.mean, scale[c] = n.scale, shift[c] = n.shift;
  }
  void set(std::int64_t c, const rows::InputGradient<F>& g) const {
    mean[c] = g.mean, scale[c] = g.scale, shift[c] = g.shift, x_scale[c] = g.x_scale;
  }

  // Plural: of channels c to c + count - 1, one per lane. Singular: of channel c in all lanes.
  template <bool whole>
  __attribute__((always_inline)) rows::Normaliser<Reg<F>> normalisers(std::int64_t c, int count) const {
    return {load<whole>(mean + c, count), load<whole>(scale + c, count), load<whole>(shift + c, count)};
  }
  __attribute__((always_inline)) rows::Normaliser<Reg<F>> normaliser(std::int64_t c) const {
    return {Reg<F>{} + mean[c], Reg<F>{} + scale[c], Reg<F>{} + shift[c]};
  }
  template <bool whole>
  __attribute__((always_inline)) rows::InputGradient<Reg<F>> gradients(std::int64_t c, int count) const {
    return {load<whole>(mean + c, count), load<whole>(scale + c, count), load<whole>(x_scale + c, count),
            load<whole>(shift + c, count)};
  }
  __attribute__((always_inline)) rows::InputGradient<Reg<F>> gradient(std::int64_t c) const {
    return {Reg<F>{} + mean[c], Reg<F>{} + scale[c], Reg<F>{} + x_scale[c], Reg<F>{} + shift[c]};
  }
};

template <class T>
struct BatchNormJob {
  using F = Compute<T>;

  const BatchNorm& call;
  ChannelConstants<F> constants;
  rows::Moments* moments;  // per unit: [channels][units], or [blocks][channels]

  explicit BatchNormJob(const BatchNorm& c)
      : call(c),
        constants(c.workspace, c.shape.channels),
        moments(reinterpret_cast<rows::Moments*>(static_cast<char*>(c.workspace) +
                                                 batch_norm_constants_bytes(c.shape.channels))) {}

  bool measures() const { return call.phase == Phase::all || call.phase == Phase::statistics; }

  void finish(std::int64_t c, const rows::Moments& all) const {
    const rows::Stats<F> stats = rows::finish_channel<F, Numbers>(call, c, all);
    if (call.phase != Phase::statistics) constants.set(c, rows::normaliser_of<F, Numbers>(call, c, stats));
  }

  template <bool whole>
  __attribute__((always_inline)) void write(const rows::Normaliser<Reg<F>>& normaliser, std::int64_t i,
                                            int count) const {
    Reg<F> y = normaliser.at(load<whole>(static_cast<const T*>(call.x) + i, count));
    if (call.residual != nullptr) y = y + load<whole>(static_cast<const T*>(call.residual) + i, count);
    if (call.activate) y = rows::activation(y, F(call.slope));
    store<whole>(static_cast<T*>(call.y) + i, y, count);
  }

  void run_first(const ChannelsFirst& layout, int threads) const {
    const BatchShape& s = call.shape;
    if (!measures()) {  // the statistics are given
      for (std::int64_t c = 0; c < s.channels; ++c) finish(c, rows::Moments{});
      in_parallel(threads, s.batch * s.channels, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t piece = begin; piece < end; ++piece) write_piece(piece % s.channels, piece * s.space);
      });
      return;
    }
    layout.run(
        threads,
        [&](std::int64_t c, std::int64_t unit) {
          const T* const x = static_cast<const T*>(call.x) + layout.first(c, unit);
          moments[c * layout.units + unit] = s.space > moments_chunk
                                                 ? moments_of(x, s.space)
                                                 : chunk_moments(x, s.space, layout.samples_of(unit), layout.stride());
        },
        [&](std::int64_t c) {
          rows::Moments all;
          for (std::int64_t unit = 0; unit < layout.units; ++unit) all.merge(moments[c * layout.units + unit]);
          finish(c, all);
        },
        [&](std::int64_t c, std::int64_t unit) {
          if (call.phase == Phase::statistics) return;
          for (std::int64_t sample = 0; sample < layout.samples_of(unit); ++sample)
            write_piece(c, layout.first(c, unit) + sample * layout.stride());
        });
  }

  // One channel of one sample.
  void write_piece(std::int64_t c, std::int64_t first) const {
    const auto normaliser = constants.normaliser(c);
    for_packs<F>(first, first + call.shape.space,
                 [&](auto w, std::int64_t i, int count, int)
                     __attribute__((always_inline)) { write<decltype(w)::value>(normaliser, i, count); });
  }

  // Merges the moments of columns [c_begin, c_end) in rows [begin, end) into the block's. Like chunk_moments(), it sums
  // distances from a pivot, the mean of the first few rows.
  void add_columns(const ChannelsLast& layout, std::int64_t begin, std::int64_t end, std::int64_t c_begin,
                   std::int64_t c_end, rows::Moments* block_moments) const {
    const T* const x = static_cast<const T*>(call.x);
    const std::int64_t few = end - begin < 8 ? end - begin : 8, channels = layout.channels;
    const F factor = F(1 / double(few));
    F pivot[ChannelsLast::tile] = {}, sum[ChannelsLast::tile] = {}, squares[ChannelsLast::tile] = {};
    layout.for_packs_of<F>(begin, begin + few, c_begin, c_end, [&](auto at) __attribute__((always_inline)) {
      F* const to = pivot + (at.channel - c_begin);
      Reg<F> mean = load<at.whole>(to, at.count);
      for (int r = 0; r < at.rows; ++r) mean += load<at.whole>(x + at.first + r * channels, at.count) * factor;
      store<at.whole>(to, mean, at.count);
    });
    layout.for_packs_of<F>(begin, end, c_begin, c_end, [&](auto at) __attribute__((always_inline)) {
      const std::int64_t column = at.channel - c_begin;
      const Reg<F> center = load<at.whole>(pivot + column, at.count);
      Reg<F> d = load<at.whole>(sum + column, at.count), dd = load<at.whole>(squares + column, at.count);
#pragma GCC unroll 4
      for (int r = 0; r < at.rows; ++r) {
        fetch(x + at.first + (r + at.rows) * channels, at.part);
        const Reg<F> distance = load<at.whole>(x + at.first + r * channels, at.count) - center;
        d += distance;
        dd += distance * distance;
      }
      store<at.whole>(sum + column, d, at.count);
      store<at.whole>(squares + column, dd, at.count);
    });
    for (std::int64_t c = c_begin; c < c_end; ++c)
      block_moments[c].merge(
          is_finite(squares[c - c_begin])
              ? rows::Moments::about(pivot[c - c_begin], double(end - begin), sum[c - c_begin], squares[c - c_begin])
              : wide_moments(x + begin * channels + c, 1, end - begin, channels));
  }

  void run_last(const ChannelsLast& layout, int threads) const {
    const std::int64_t channels = layout.channels;
    layout.run(
        threads,
        [&](std::int64_t block) {
          if (!measures()) return;
          rows::Moments* const block_moments = moments + block * channels;
          for (std::int64_t c = 0; c < channels; ++c) block_moments[c] = rows::Moments{};
          layout.for_parts_of(block,
                              [&](std::int64_t begin, std::int64_t end, std::int64_t c_begin, std::int64_t c_end) {
                                add_columns(layout, begin, end, c_begin, c_end, block_moments);
                              });
        },
        [&](std::int64_t c) {
          rows::Moments all;
          if (measures())
            for (std::int64_t block = 0; block < layout.blocks; ++block) all.merge(moments[block * channels + c]);
          finish(c, all);
        },
        [&](std::int64_t begin, std::int64_t end) {
          if (call.phase == Phase::statistics) return;
          layout.for_packs_of<F>(begin, end, 0, channels, [&](auto at) __attribute__((always_inline)) {
            const auto normaliser = constants.template normalisers<at.whole>(at.channel, at.count);
#pragma GCC unroll 4
            for (int r = 0; r < at.rows; ++r) {
              const std::int64_t i = at.first + r * channels;
              fetch(static_cast<const T*>(call.x) + i + at.rows * channels, at.part);
              fetch<1>(static_cast<T*>(call.y) + i + at.rows * channels, at.part);
              write<at.whole>(normaliser, i, at.count);
            }
          });
        });
  }

  static void run(const BatchNorm& call, int max_threads) {
    const BatchNormJob job(call);
    const BatchShape& s = call.shape;
    const int streams = call.phase == Phase::statistics ? 1 : call.residual != nullptr ? 3 : 2;
    const int threads =
        threads_for(s.batch * s.channels * s.space * static_cast<std::int64_t>(streams * sizeof(T)), max_threads);
    s.channels_last ? job.run_last(ChannelsLast(s), threads) : job.run_first(ChannelsFirst(s), threads);
  }
};

// The channels' constants and the units' moments; or, in backward, two sums per unit and two per channel.
static std::int64_t batch_norm_workspace(const BatchShape& s) {
  return batch_norm_constants_bytes(s.channels) + (3 * batch_norm_units(s) + 2) * 8 * s.channels;
}

static void batch_norm(const BatchNorm& call, const StreamRef& where) {
  with_dtype(call.dtype, [&](auto type) { BatchNormJob<typename decltype(type)::type>::run(call, where.max_threads); });
}

}  // namespace onepass::cpu::ONEPASS_ISA
