// BatchNorm: the moments of each block's part of a channel; a warp a channel joins them in order; then the results.
#include "cuda/batch_norm_layout.cuh"
#include "cuda/column_sum.cuh"
#include "cuda/engine.hpp"
#include "rows/moments.hpp"
#include "rows/norm.hpp"

namespace onepass::cuda {
namespace {

constexpr int lanes = 32;

// moments[part][channel].
template <class T, class Access, class Layout>
__global__ void __launch_bounds__(tuning::column_threads)
    batch_moments_kernel(ONEPASS_GRID_CONSTANT(BatchNorm) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int w = Access::template width<T>, own = Layout::template own<w>, rounds = tuning::column_rounds<sizeof(T)>;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  std::int64_t offsets[rounds];
  Elements<T, w> x[rounds];
  next_offsets(walk, offsets);
  load_at(offsets, call.x, x);

  // The mean of the first elements of the block: near enough to the part's for the squares of the distances to lose
  // nothing. Divided before it is summed: the sum of huge numbers may overflow where their mean does not.
  F near[own] = {};
  const F share = 1 / F(walk.first_of_block(rounds));
  ONEPASS_UNROLL
  for (int k = 0; k < rounds * w; ++k) near[Layout::last ? k % w : 0] += decode(x[k / w].at[k % w]) * share;
  column_totals(near, columns);

  F sums[2 * own] = {};
  while (offsets[0] >= 0) {
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int c = Layout::last ? k % w : 0;
      const F distance = offsets[k / w] >= 0 ? decode(x[k / w].at[k % w]) - near[c] : F(0);
      sums[c] += distance;
      sums[own + c] += distance * distance;
    }
    next_offsets(walk, offsets);
    load_at(offsets, call.x, x);
  }
  column_totals(sums, columns);
  if (int(threadIdx.x) >= columns || !walk.has_channel(call.shape)) return;
  rows::Moments* const moments =
      static_cast<rows::Moments*>(call.workspace) + blockIdx.y * call.shape.channels + walk.channel;
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c)
    moments[c] = rows::Moments::about(near[c], double(walk.end - walk.begin), sums[c], sums[own + c]);
}

template <class F>
__global__ void __launch_bounds__(tuning::column_threads, tuning::roomy_blocks_per_sm)
    batch_finish_kernel(ONEPASS_GRID_CONSTANT(BatchNorm) call, std::int64_t parts) {
  const std::int64_t channels = call.shape.channels;
  const std::int64_t c = (std::int64_t(blockIdx.x) * tuning::column_threads + threadIdx.x) / lanes;
  if (c >= channels) return;  // the whole warp
  const int lane = int(threadIdx.x) % lanes;
  rows::Moments all;
  const bool running = call.phase == Phase::apply_running;
  for (std::int64_t part = lane; part < parts && !running; part += lanes)
    all.merge(static_cast<const rows::Moments*>(call.workspace)[part * channels + c]);
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    rows::Moments other;
    other.n = __shfl_down_sync(0xffffffffu, all.n, distance);
    other.mean = __shfl_down_sync(0xffffffffu, all.mean, distance);
    other.squares = __shfl_down_sync(0xffffffffu, all.squares, distance);
    if (lane < distance) all.merge(other);
  }
  if (lane != 0) return;
  const rows::Stats<F> stats =
      rows::Stats<F>::of(running ? number_at(call.running_dtype, call.running_mean, c) : all.mean,
                         running ? number_at(call.running_dtype, call.running_var, c) : all.variance(), call.eps);
  stats.keep(call.stats, channels, c);
  if (call.phase == Phase::statistics) static_cast<F*>(call.stats)[channels + c] = F(all.variance());
  if (call.phase == Phase::statistics || call.running_mean == nullptr || running) return;
  const auto blend = [&](void* running, double now) {
    const double before = number_at(call.running_dtype, running, c);
    set_number_at(call.running_dtype, running, c, (1 - call.momentum) * before + call.momentum * now);
  };
  blend(call.running_mean, all.mean);
  blend(call.running_var, all.squares / (all.n - 1));
}

template <class T, class Access, class Layout>
__global__ void __launch_bounds__(tuning::column_threads)
    batch_norm_kernel(ONEPASS_GRID_CONSTANT(BatchNorm) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int w = Access::template width<T>, own = Layout::template own<w>, rounds = tuning::column_rounds<sizeof(T)>;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  if (!walk.has_channel(call.shape)) return;
  // y = (x - mean) * scale + shift.
  F mean[own], scale[own], shift[own];
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c) {
    const std::int64_t channel = walk.channel + c;
    const auto stats = rows::Stats<F>::kept(call.stats, call.shape.channels, channel);
    mean[c] = stats.mean;
    scale[c] = stats.rstd;
    if (call.weight != nullptr) scale[c] *= F(number_at(call.weight_dtype, call.weight, channel));
    shift[c] = call.bias != nullptr ? F(number_at(call.weight_dtype, call.bias, channel)) : F(0);
    shift[c] -= stats.mean_low * scale[c];
  }
  const F slope = F(call.slope);
  while (walk.has()) {
    std::int64_t offsets[rounds];
    Elements<T, w> x[rounds], residual[rounds];
    next_offsets(walk, offsets);
    load_at(offsets, call.x, x);
    load_at(offsets, call.residual, residual);
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int r = k / w, e = k % w, c = Layout::last ? e : 0;
      F y = (decode(x[r].at[e]) - mean[c]) * scale[c] + shift[c];
      if (call.residual != nullptr) y = y + decode(residual[r].at[e]);
      if (call.activate) y = rows::activation(y, slope);
      encode(x[r].at[e], y);
    }
    store_at(offsets, call.y, x);
  }
}

template <class T>
void launch_batch_norm(const BatchNorm& call, void* stream) {
  using F = Compute<T>;
  const BatchShape& s = call.shape;
  with_layout<T>(is_wide<T>(s, {call.x, call.y, call.residual}), s.channels_last, [&](auto access, auto layout) {
    using Access = decltype(access);
    using Layout = decltype(layout);
    const BatchGrid grid(s, Access::template width<T>);
    const auto& parts = grid.parts;
    const bool measures = call.phase == Phase::all || call.phase == Phase::statistics;
    if (measures)
      launch("batch_moments", batch_moments_kernel<T, Access, Layout>, grid.blocks, dim3(tuning::column_threads), 0,
             stream, call, parts.size, grid.columns);
    if (call.phase != Phase::apply) {
      constexpr int warps = tuning::column_threads / lanes;
      launch("batch_finish", batch_finish_kernel<F>, dim3(unsigned((s.channels + warps - 1) / warps)),
             dim3(tuning::column_threads), 0, stream, call, parts.count);
    }
    if (call.phase != Phase::statistics)
      launch("batch_norm", batch_norm_kernel<T, Access, Layout>, grid.blocks, dim3(tuning::column_threads), 0, stream,
             call, parts.size, grid.columns);
  });
}

}  // namespace

std::int64_t batch_norm_workspace(const BatchShape& shape) {
  // Moments of the parts; or the backward's two sums of each part and of all of them.
  return (BatchParts(shape).count * sizeof(rows::Moments) + 2 * sizeof(double)) * shape.channels;
}

void batch_norm(const BatchNorm& call, const StreamRef& where) {
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype, [&](auto type) { launch_batch_norm<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
