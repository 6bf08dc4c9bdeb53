// The backward of BatchNorm in three kernels: each block sums dz (the gradient before the activation) and dz * (x -
// mean) over its part of a channel, one warp per channel adds up the parts in order, then all blocks compute dx.
#include "cuda/batch_norm_layout.cuh"
#include "cuda/column_sum.cuh"
#include "cuda/engine.hpp"
#include "rows/channel.hpp"

namespace onepass::cuda {
namespace {

constexpr int lanes = 32;

// Loads dy and, with an activation, y; computes dz from them.
template <class T, class Layout, int w, int rounds>
__device__ void load_dz(const BatchNormBackward& call, const Accesses<Layout, w, 2>& now, std::int64_t size,
                        Elements<T, w> (&x)[rounds], Elements<Compute<T>, w> (&dz)[rounds]) {
  using F = Compute<T>;
  Elements<T, w> dy[rounds], y[rounds];
  now.load(call.dx != nullptr || call.phase != Phase::apply ? call.x : nullptr, size, x);
  now.load(call.dy, size, dy);
  now.load(call.activate ? call.y : nullptr, size, y);
  ONEPASS_UNROLL
  for (int k = 0; k < rounds * w; ++k) {
    const int r = k / w, e = k % w;
    dz[r].at[e] = decode(dy[r].at[e]);
    if (call.activate) dz[r].at[e] = rows::activation_gradient(dz[r].at[e], F(decode(y[r].at[e])), F(call.slope));
  }
}

// partials[part][2][channels].
template <class T, int w, class Layout>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
    batch_sums_kernel(ONEPASS_GRID_CONSTANT(BatchNormBackward) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int own = Layout::template own<w>, rounds = Accesses<Layout, w, 2>::rounds;
  const std::int64_t channels = call.shape.channels, size = call.shape.batch * channels * call.shape.space;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  F mean[own] = {}, sums[2 * own] = {};
  if (walk.has_channel(call.shape)) {
    ONEPASS_UNROLL
    for (int c = 0; c < own; ++c) mean[c] = __ldg(static_cast<const F*>(call.stats) + walk.channel + c);
  }
  while (walk.has()) {
    const Accesses<Layout, w, 2> now(walk);
    Elements<T, w> x[rounds];
    Elements<F, w> dz[rounds];
    load_dz<T>(call, now, size, x, dz);
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int r = k / w, e = k % w, c = Layout::last ? e : 0;
      const bool meant = now.is_meant(r, e);
      sums[c] += meant ? dz[r].at[e] : F(0);
      sums[own + c] += meant ? dz[r].at[e] * (decode(x[r].at[e]) - mean[c]) : F(0);
    }
  }
  column_totals(sums, columns);
  if (int(threadIdx.x) >= columns || !walk.has_channel(call.shape)) return;
  F* const out = static_cast<F*>(call.workspace) + blockIdx.y * 2 * channels + walk.channel;
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c) {
    out[c] = sums[c];
    out[channels + c] = sums[own + c];
  }
}

template <class F>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
    batch_sums_finish_kernel(ONEPASS_GRID_CONSTANT(BatchNormBackward) call, std::int64_t parts) {
  const std::int64_t channels = call.shape.channels;
  const std::int64_t c = (std::int64_t(blockIdx.x) * tuning::column_threads + threadIdx.x) / lanes;
  if (c >= channels) return;  // the whole warp
  rows::GradientSums all;
  for (std::int64_t part = threadIdx.x % lanes; part < parts; part += lanes) {
    const F* const of_part = static_cast<const F*>(call.workspace) + part * 2 * channels + c;
    all.add({double(of_part[0]), double(of_part[channels])});
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    all.add(
        {__shfl_down_sync(0xffffffffu, all.dz, distance), __shfl_down_sync(0xffffffffu, all.dz_distance, distance)});
  if (threadIdx.x % lanes == 0) rows::finish_channel_gradient<F, Numbers>(call, c, all);
}

template <class T, int w, class Layout>
__global__ void __launch_bounds__(tuning::column_threads, tuning::blocks_per_sm_at_128_registers)
    batch_norm_backward_kernel(ONEPASS_GRID_CONSTANT(BatchNormBackward) call, std::int64_t part, int columns) {
  using F = Compute<T>;
  constexpr int own = Layout::template own<w>, rounds = Accesses<Layout, w, 2>::rounds;
  const std::int64_t size = call.shape.batch * call.shape.channels * call.shape.space;
  Layout walk;
  walk.template start<w>(call.shape, part, columns);
  if (!walk.has()) return;
  rows::InputGradient<F> gradient[own];
  ONEPASS_UNROLL
  for (int c = 0; c < own; ++c) gradient[c] = rows::input_gradient_of<F, Numbers>(call, walk.channel + c);
  while (walk.has()) {
    const Accesses<Layout, w, 2> now(walk);
    Elements<T, w> x[rounds];
    Elements<F, w> dz[rounds];
    load_dz<T>(call, now, size, x, dz);
    if (call.dresidual != nullptr) {
      Elements<T, w> dresidual[rounds];
      ONEPASS_UNROLL
      for (int k = 0; k < rounds * w; ++k) encode(dresidual[k / w].at[k % w], dz[k / w].at[k % w]);
      now.store(call.dresidual, dresidual);
    }
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const int r = k / w, e = k % w, c = Layout::last ? e : 0;
      encode(x[r].at[e],
             call.training ? gradient[c].at(dz[r].at[e], F(decode(x[r].at[e]))) : dz[r].at[e] * gradient[c].scale);
    }
    now.store(call.dx, x);
  }
}

template <class T>
void launch_batch_norm_backward(BatchNormBackward call, void* stream) {
  using F = Compute<T>;
  const BatchShape& s = call.shape;
  const auto arrays = {call.x, call.dy, call.activate ? call.y : nullptr, static_cast<const void*>(call.dx),
                       static_cast<const void*>(call.dresidual)};
  if (call.sums == nullptr) call.sums = static_cast<F*>(call.workspace) + max_batch_parts(s) * 2 * s.channels;
  with_layout<T>(s, arrays, [&](auto layout, auto elements) {
    using Layout = decltype(layout);
    constexpr int w = elements;
    const BatchGrid<Layout, w> grid(s);
    if (call.phase != Phase::apply && (call.training || call.dweight != nullptr || call.dbias != nullptr)) {
      launch("batch_sums", batch_sums_kernel<T, w, Layout>, grid.blocks, dim3(tuning::column_threads), 0, stream, call,
             grid.part, grid.columns);
      constexpr int warps = tuning::column_threads / lanes;
      launch("batch_sums_finish", batch_sums_finish_kernel<F>, dim3(unsigned((s.channels + warps - 1) / warps)),
             dim3(tuning::column_threads), 0, stream, call, std::int64_t(grid.blocks.y));
    }
    if (call.phase != Phase::statistics && (call.dx != nullptr || call.dresidual != nullptr))
      launch("batch_norm_backward", batch_norm_backward_kernel<T, w, Layout>, grid.blocks, dim3(tuning::column_threads),
             0, stream, call, grid.part, grid.columns);
  });
}

}  // namespace

void batch_norm_backward(const BatchNormBackward& call, const StreamRef& where) {
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype,
             [&](auto type) { launch_batch_norm_backward<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
