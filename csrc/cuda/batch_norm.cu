// BatchNorm in three kernels: each block computes the moments of its part of a channel, one warp per channel merges
// them in order, then all blocks normalise.
#include "cuda/batch_norm_layout.cuh"
#include "cuda/column_sum.cuh"
#include "cuda/engine.hpp"
#include "rows/channel.hpp"

namespace onepass::cuda {
namespace {

constexpr int lanes = 32;

// moments[part][channel].
template <class T, int w, class Layout>
__global__ void __launch_bounds__(tuning::column_threads, tuning::batch_blocks_per_sm(sizeof(T), Layout::last))
    batch_moments_kernel(ONEPASS_GRID_CONSTANT(BatchNorm) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int own = Layout::template own<w>, rounds = Accesses<Layout, w, 1>::rounds;
  const std::int64_t size = call.shape.batch * call.shape.channels * call.shape.space;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  const F factor = 1 / F(walk.template elements<w>(rounds));
  Accesses<Layout, w, 1> now(walk);
  Elements<T, w> x[rounds];
  now.load(call.x, size, x);

  // The pivot is the mean of the block's first elements, so close to the part's mean that the squares of the distances
  // lose no digits. Divided before the summation, because a sum of huge numbers may overflow where their mean does not.
  F pivot[own] = {};
  ONEPASS_UNROLL
  for (int k = 0; k < rounds * w; ++k)
    if (now.is_meant(k / w, k % w)) pivot[Layout::last ? k % w : 0] += decode(x[k / w].at[k % w]) * factor;
  column_totals(pivot, columns);

  F sums[2 * own] = {};
  while (true) {
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int c = Layout::last ? k % w : 0;
      const F distance = now.is_meant(k / w, k % w) ? decode(x[k / w].at[k % w]) - pivot[c] : F(0);
      sums[c] += distance;
      sums[own + c] += distance * distance;
    }
    if (!walk.has()) break;
    now.next(walk);
    now.load(call.x, size, x);
  }
  column_totals(sums, columns);
  if (int(threadIdx.x) >= columns || !walk.has_channel(call.shape)) return;
  rows::Moments* const moments =
      static_cast<rows::Moments*>(call.workspace) + blockIdx.y * call.shape.channels + walk.channel;
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c)
    moments[c] = rows::Moments::about(pivot[c], double(walk.template elements<w>()), sums[c], sums[own + c]);
}

template <class F>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
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
  rows::finish_channel<F, Numbers>(call, c, all);
}

template <class T, int w, class Layout>
__global__ void __launch_bounds__(tuning::column_threads, tuning::batch_blocks_per_sm(sizeof(T), Layout::last))
    batch_norm_kernel(ONEPASS_GRID_CONSTANT(BatchNorm) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int own = Layout::template own<w>, rounds = Accesses<Layout, w, 1>::rounds;
  const std::int64_t size = call.shape.batch * call.shape.channels * call.shape.space;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  if (!walk.has()) return;
  Accesses<Layout, w, 1> now(walk);
  Elements<T, w> x[rounds], residual[rounds];
  const auto load = [&] {
    now.load(call.x, size, x);
    now.load(call.residual, size, residual);
  };
  load();  // under way while the statistics are read
  rows::Normaliser<F> normaliser[own];
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c) {
    const auto stats = rows::Stats<F>::kept(call.stats, call.shape.channels, walk.channel + c, Cached{});
    normaliser[c] = rows::normaliser_of<F, Numbers>(call, walk.channel + c, stats);
  }
  const F slope = F(call.slope);
  while (true) {
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int r = k / w, e = k % w, c = Layout::last ? e : 0;
      F y = normaliser[c].at(F(decode(x[r].at[e])));
      if (call.residual != nullptr) y = y + decode(residual[r].at[e]);
      if (call.activate) y = rows::activation(y, slope);
      encode(x[r].at[e], y);
    }
    now.store(call.y, x);
    if (!walk.has()) return;
    now.next(walk);
    load();
  }
}

template <class T>
void launch_batch_norm(const BatchNorm& call, void* stream) {
  using F = Compute<T>;
  const BatchShape& s = call.shape;
  with_layout<T>(s, {call.x, call.y, call.residual}, [&](auto layout, auto elements) {
    using Layout = decltype(layout);
    constexpr int w = elements;
    const BatchGrid<Layout, w> grid(s);
    const bool measures = call.phase == Phase::all || call.phase == Phase::statistics;
    if (measures)
      launch("batch_moments", batch_moments_kernel<T, w, Layout>, grid.blocks, dim3(tuning::column_threads), 0, stream,
             call, grid.part, grid.columns);
    if (call.phase != Phase::apply) {
      constexpr int warps = tuning::column_threads / lanes;
      launch("batch_finish", batch_finish_kernel<F>, dim3(unsigned((s.channels + warps - 1) / warps)),
             dim3(tuning::column_threads), 0, stream, call, std::int64_t(grid.blocks.y));
    }
    if (call.phase != Phase::statistics)
      launch("batch_norm", batch_norm_kernel<T, w, Layout>, grid.blocks, dim3(tuning::column_threads), 0, stream, call,
             grid.part, grid.columns);
  });
}

}  // namespace

std::int64_t batch_norm_workspace(const BatchShape& shape) {
  // The moments of the parts; or, in backward, two sums per part and two in all.
  return (max_batch_parts(shape) * sizeof(rows::Moments) + 2 * sizeof(double)) * shape.channels;
}

void batch_norm(const BatchNorm& call, const StreamRef& where) {
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype, [&](auto type) { launch_batch_norm<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
