// The backward of BatchNorm on the CPU, in the units of batch_norm.hpp: per channel the sums of dz (the gradient before
// the activation) and of dz * (x - mean), then dx.
#pragma once
#include "cpu/batch_norm.hpp"

namespace onepass::cpu::ONEPASS_ISA {

template <class T>
struct BatchNormBackwardJob {
  using F = Compute<T>;

  using UnitSums = rows::GradientSums;  // over one channel of a unit

  BatchNormBackward call;
  ChannelConstants<F> constants;
  UnitSums* sums;
  bool needs_sums, needs_results;

  explicit BatchNormBackwardJob(const BatchNormBackward& c)
      : call(c),
        constants(c.workspace, c.shape.channels),
        sums(reinterpret_cast<UnitSums*>(static_cast<char*>(c.workspace) +
                                         batch_norm_constants_bytes(c.shape.channels))),
        needs_sums(c.phase != Phase::apply && (c.training || c.dweight != nullptr || c.dbias != nullptr)),
        needs_results(c.phase != Phase::statistics && (c.dx != nullptr || c.dresidual != nullptr)) {
    if (call.sums == nullptr) call.sums = sums + batch_norm_units(c.shape) * c.shape.channels;
  }

  const F* mean() const { return static_cast<const F*>(call.stats); }

  void finish(std::int64_t c, const UnitSums& all) const {
    if (needs_sums) rows::finish_channel_gradient<F, Numbers>(call, c, all);
    if (needs_results) constants.set(c, rows::input_gradient_of<F, Numbers>(call, c));
  }

  template <bool whole>
  __attribute__((always_inline)) Reg<F> dz_at(std::int64_t i, int count) const {
    const Reg<F> dy = load<whole>(static_cast<const T*>(call.dy) + i, count);
    if (!call.activate) return dy;
    return rows::activation_gradient(dy, load<whole>(static_cast<const T*>(call.y) + i, count), F(call.slope));
  }
  template <bool whole>
  __attribute__((always_inline)) Reg<F> x_at(std::int64_t i, int count) const {
    return load<whole>(static_cast<const T*>(call.x) + i, count);
  }

  __attribute__((always_inline)) void fetch_inputs(std::int64_t i, int part) const {
    fetch(static_cast<const T*>(call.dy) + i, part);
    fetch(static_cast<const T*>(call.x) + i, part);
  }

  template <bool whole>
  __attribute__((always_inline)) void write(const rows::InputGradient<Reg<F>>& gradient, std::int64_t i,
                                            int count) const {
    const Reg<F> dz = dz_at<whole>(i, count);
    if (call.dresidual != nullptr) store<whole>(static_cast<T*>(call.dresidual) + i, dz, count);
    if (call.dx == nullptr) return;
    const Reg<F> dx = call.training ? gradient.at(dz, x_at<whole>(i, count)) : dz * gradient.scale;
    store<whole>(static_cast<T*>(call.dx) + i, dx, count);
  }

  void run_first(const ChannelsFirst& layout, int threads) const {
    layout.run(
        threads,
        [&](std::int64_t c, std::int64_t unit) {
          if (!needs_sums) return;
          const Reg<F> center = Reg<F>{} + mean()[c];
          Sums<F> dz_sum, distance_sum;
          layout.for_packs_of<F>(c, unit,
                                 [&](auto w, std::int64_t i, int count, int part) __attribute__((always_inline)) {
                                   constexpr bool whole = decltype(w)::value;
                                   fetch_inputs(i + layout.stride(), part);
                                   const Reg<F> dz = dz_at<whole>(i, count);
                                   Reg<F> distance = x_at<whole>(i, count) - center;
                                   if constexpr (!whole) distance = first_of(distance, count);
                                   dz_sum.part[part] += dz;
                                   distance_sum.part[part] += dz * distance;
                                 });
          sums[c * layout.units + unit] = {double(dz_sum.total()), double(distance_sum.total())};
        },
        [&](std::int64_t c) {
          UnitSums all;
          if (needs_sums)
            for (std::int64_t unit = 0; unit < layout.units; ++unit) all.add(sums[c * layout.units + unit]);
          finish(c, all);
        },
        [&](std::int64_t c, std::int64_t unit) {
          if (!needs_results) return;
          const auto gradient = constants.gradient(c);
          layout.for_packs_of<F>(c, unit, [&](auto w, std::int64_t i, int count, int) __attribute__((always_inline)) {
            write<decltype(w)::value>(gradient, i, count);
          });
        });
  }

  void add_columns(const ChannelsLast& layout, std::int64_t begin, std::int64_t end, std::int64_t c_begin,
                   std::int64_t c_end, UnitSums* block_sums) const {
    F dz_sum[ChannelsLast::tile] = {}, distance_sum[ChannelsLast::tile] = {};
    layout.for_packs_of<F>(begin, end, c_begin, c_end, [&](auto at) __attribute__((always_inline)) {
      const std::int64_t column = at.channel - c_begin;
      const Reg<F> center = load<at.whole>(mean() + at.channel, at.count);
      Reg<F> sum_dz = load<at.whole>(dz_sum + column, at.count);
      Reg<F> sum_dz_distance = load<at.whole>(distance_sum + column, at.count);
#pragma GCC unroll 4
      for (int r = 0; r < at.rows; ++r) {
        const std::int64_t i = at.first + r * layout.channels;
        fetch_inputs(i + at.rows * layout.channels, at.part);
        const Reg<F> dz = dz_at<at.whole>(i, at.count);
        sum_dz += dz;
        sum_dz_distance += dz * (x_at<at.whole>(i, at.count) - center);
      }
      store<at.whole>(dz_sum + column, sum_dz, at.count);
      store<at.whole>(distance_sum + column, sum_dz_distance, at.count);
    });
    for (std::int64_t c = c_begin; c < c_end; ++c)
      block_sums[c].add({double(dz_sum[c - c_begin]), double(distance_sum[c - c_begin])});
  }

  void run_last(const ChannelsLast& layout, int threads) const {
    const std::int64_t channels = layout.channels;
    layout.run(
        threads,
        [&](std::int64_t block) {
          if (!needs_sums) return;
          UnitSums* const block_sums = sums + block * channels;
          for (std::int64_t c = 0; c < channels; ++c) block_sums[c] = {0, 0};
          layout.for_parts_of(block,
                              [&](std::int64_t begin, std::int64_t end, std::int64_t c_begin, std::int64_t c_end) {
                                add_columns(layout, begin, end, c_begin, c_end, block_sums);
                              });
        },
        [&](std::int64_t c) {
          UnitSums all;
          if (needs_sums)
            for (std::int64_t block = 0; block < layout.blocks; ++block) all.add(sums[block * channels + c]);
          finish(c, all);
        },
        [&](std::int64_t begin, std::int64_t end) {
          if (!needs_results) return;
          layout.for_packs_of<F>(begin, end, 0, channels, [&](auto at) __attribute__((always_inline)) {
            const auto gradient = constants.template gradients<at.whole>(at.channel, at.count);
#pragma GCC unroll 4
            for (int r = 0; r < at.rows; ++r) {
              const std::int64_t i = at.first + r * channels;
              fetch_inputs(i + at.rows * channels, at.part);
              if (call.dx != nullptr) fetch<1>(static_cast<T*>(call.dx) + i + at.rows * channels, at.part);
              write<at.whole>(gradient, i, at.count);
            }
          });
        });
  }

  static void run(const BatchNormBackward& call, int max_threads) {
    const BatchNormBackwardJob job(call);
    const BatchShape& s = call.shape;
    const int streams = call.phase == Phase::statistics ? 2 : 3;
    const int threads =
        threads_for(s.batch * s.channels * s.space * static_cast<std::int64_t>(streams * sizeof(T)), max_threads);
    s.channels_last ? job.run_last(ChannelsLast(s), threads) : job.run_first(ChannelsFirst(s), threads);
  }
};

static void batch_norm_backward(const BatchNormBackward& call, const StreamRef& where) {
  with_dtype(call.dtype,
             [&](auto type) { BatchNormBackwardJob<typename decltype(type)::type>::run(call, where.max_threads); });
}

}  // namespace onepass::cpu::ONEPASS_ISA
