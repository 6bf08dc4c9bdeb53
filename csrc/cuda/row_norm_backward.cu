// The backward of LayerNorm and RMSNorm.
//   Rows that fit a team's registers: one pass over memory computes dx and, per block, sums for the gradients of weight
//     and bias, which a second kernel joins in order.
//   Longer rows: one kernel reads them twice for dx, another one sums over the columns.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/dropout.cuh"
#include "cuda/engine.hpp"
#include "cuda/row_norm_columns.cuh"
#include "cuda/row_team.cuh"
#include "rows/norm.hpp"

namespace onepass::cuda {
namespace {

// One thread's share of a row, in registers: x and dy, later overwritten by the gradients.
template <class T, int w, int rounds>
struct Gradients {
  using F = Compute<T>;
  const RowNormBackward& call;
  std::int64_t begin;  // of the row
  rows::Stats<F> stats;
  Elements<T, w> x[rounds], dy[rounds];

  __device__ Gradients(const RowNormBackward& c, std::int64_t row) : call(c), begin(row * c.size), stats{0, 0, 0} {
    if (row < c.rows) stats = rows::Stats<F>::kept(c.stats, c.rows, row, Cached{});
    stats.rstd = rows::backward_rstd(stats.rstd, c.rms, c.size);
  }

  __device__ void load(const Share<w>& share, std::int64_t base) {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      x[r] = share.load(static_cast<const T*>(call.x) + begin + base, r);
      dy[r] = share.load(static_cast<const T*>(call.dy) + begin + base, r);
    }
  }
  __device__ F xhat(int r, int e) const { return stats.normalised(F(decode(x[r].at[e]))); }

  // sums: of g and of g * xhat.
  __device__ void add_up(const Share<w>& share, std::int64_t base, const Affine<T>& weights, F (&sums)[2]) const {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const Elements<F, w> weight = weights.load(share, base, r);
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e) {
        const F g = weight.at[e] * decode(dy[r].at[e]);
        sums[0] += g;
        sums[1] += g * xhat(r, e);
      }
    }
  }

  // Computes and stores this share of dx and dbranch. per_element: 1 / size.
  __device__ void write(const Share<w>& share, std::int64_t base, const Affine<T>& weights, F per_element,
                        const F (&sums)[2]) {
    const F mean_g = call.rms ? F(0) : sums[0] * per_element, mean_gx = sums[1] * per_element;
    const auto gradient = rows::InputGradient<F>::of(stats, F(1), mean_g, mean_gx);
    const DropoutBits<F> dropout(call.dropout);  // here, because registers are scarce
    unsigned bits[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r)
      bits[r] = call.dbranch != nullptr ? dropout.template at<w>(begin + base + share.offset(r)) : ~0u;
    Elements<T, w> dsum[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const bool added = call.dsum != nullptr && share.has(r);
      dsum[r] = Elements<T, w>::load(static_cast<const T*>(call.dsum) + begin + base + share.offset(r), added);
    }
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const Elements<F, w> weight = weights.load(share, base, r);
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e) {
        const F g = weight.at[e] * decode(dy[r].at[e]);
        const F dx = gradient.at(g, F(decode(x[r].at[e]))) + decode(dsum[r].at[e]);
        encode(x[r].at[e], dx);
        encode(dy[r].at[e], drop(bits[r], e, dx, dropout.scale));
      }
    }
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      share.store(static_cast<T*>(call.dx) + begin + base, r, x[r]);
      if (call.dbranch != nullptr) share.store(static_cast<T*>(call.dbranch) + begin + base, r, dy[r]);
    }
  }
};

// Writes a block's gradients of weight and bias to partials[block][2][columns] or, for scalars, [block][2]. Every team
// of the block has gradients for all columns, spread over its threads; they are added up first.
template <class F, int w, int rounds, int threads>
__device__ void write_partials(Elements<F, w> (&dweight)[rounds], Elements<F, w> (&dbias)[rounds],
                               const Share<w>& share, bool scalar, F* partials) {
  if (scalar) {
    F total[2] = {0, 0};
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      total[0] += dweight[k / w].at[k % w];
      total[1] += dbias[k / w].at[k % w];
    }
    column_totals<threads>(total, 1);
    if (threadIdx.x < 2) partials[std::int64_t(blockIdx.x) * 2 + threadIdx.x] = threadIdx.x == 0 ? total[0] : total[1];
    return;
  }
  constexpr int lanes = 32;
  for (int distance = share.team; distance < lanes; distance *= 2) {
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      dweight[k / w].at[k % w] += __shfl_xor_sync(0xffffffffu, dweight[k / w].at[k % w], distance);
      dbias[k / w].at[k % w] += __shfl_xor_sync(0xffffffffu, dbias[k / w].at[k % w], distance);
    }
  }
  // Teams (at least whole warps) add their gradients one after the other; the last team has the sums. A team that is
  // the whole block needs no shared memory.
  constexpr int most_columns = (threads > small_block ? 1 : small_block / 2) * rounds * w;
  ONEPASS_SHARED(F, sums, 2 * most_columns);
  const int whole = share.team < lanes ? lanes : share.team, teams = threads / whole;
  F* const out = partials + std::int64_t(blockIdx.x) * 2 * share.n;
  ONEPASS_NO_UNROLL
  for (int team = 0; team < teams; ++team) {
    if (int(threadIdx.x) / whole == team && int(threadIdx.x) % whole < share.team) {
      ONEPASS_UNROLL
      for (int k = 0; k < rounds * w; ++k) {
        const int r = k / w, e = k % w, column = share.offset(r) + e;
        if (!share.has(r)) continue;
        if (team > 0) {
          dweight[r].at[e] += sums[column];
          dbias[r].at[e] += sums[most_columns + column];
        }
        if (team + 1 < teams) {
          sums[column] = dweight[r].at[e];
          sums[most_columns + column] = dbias[r].at[e];
        }
      }
      if (team + 1 == teams) {
        ONEPASS_UNROLL
        for (int r = 0; r < rounds; ++r) {
          share.template store<tuning::Store::write_back>(out, r, dweight[r]);
          share.template store<tuning::Store::write_back>(out + share.n, r, dbias[r]);
        }
      }
    }
    if (teams > 1) __syncthreads();
  }
}

template <class T, int w, int threads>
__global__ void __launch_bounds__(threads, tuning::gradient_threads / threads)
    row_norm_backward_kernel(ONEPASS_GRID_CONSTANT(RowNormBackward) call, int log2_team) {
  using F = Compute<T>;
  constexpr int rounds = tuning::gradient_rounds<sizeof(T), w>;
  const bool affine = call.dweight != nullptr || call.dbias != nullptr;
  const Team<threads> team{log2_team};
  const Affine<T> weights(call.weight, call.weight_dtype, call.dtype, call.scalar_affine, F(1));
  const F per_element = 1 / F(call.size);
  Elements<F, w> dweight[rounds]{}, dbias[rounds]{};
  int buffer = 0;

  // All teams of a block make the same number of iterations, because they meet at barriers; in the last one a team may
  // have no row.
  for (std::int64_t first = std::int64_t(blockIdx.x) * team.per_block(); first < call.rows;
       first += std::int64_t(gridDim.x) * team.per_block()) {
    const std::int64_t row = first + team.number();
    const Share<w> share{team.lane(), team.size(), row < call.rows ? int(call.size) : 0};
    Gradients<T, w, rounds> row_of_team(call, row);
    row_of_team.load(share, 0);
    if (affine) {
      ONEPASS_UNROLL
      for (int k = 0; k < rounds * w; ++k) {
        const F dy = decode(row_of_team.dy[k / w].at[k % w]);
        dweight[k / w].at[k % w] += dy * row_of_team.xhat(k / w, k % w);
        dbias[k / w].at[k % w] += dy;
      }
    }
    if (call.dx == nullptr) continue;
    F sums[2] = {0, 0};
    row_of_team.add_up(share, 0, weights, sums);
    team.totals(sums, buffer);
    row_of_team.write(share, 0, weights, per_element, sums);
  }
  const Share<w> columns{team.lane(), team.size(), int(call.size)};
  if (affine)
    write_partials<F, w, rounds, threads>(dweight, dbias, columns, call.scalar_affine, static_cast<F*>(call.workspace));
}

// dx of rows that do not fit the registers, each processed by a block: they are read twice.
template <class T, int w>
__global__ void __launch_bounds__(tuning::gradient_threads, 2)
    row_norm_backward_long_kernel(ONEPASS_GRID_CONSTANT(RowNormBackward) call) {
  using F = Compute<T>;
  constexpr int rounds = tuning::long_gradient_rounds<sizeof(T), w>, threads = tuning::gradient_threads;
  constexpr int tile = threads * rounds * w;
  const Team<threads> team{};
  const Affine<T> weights(call.weight, call.weight_dtype, call.dtype, call.scalar_affine, F(1));
  const F per_element = 1 / F(call.size);
  int buffer = 0;
  for (std::int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    Gradients<T, w, rounds> of_row(call, row);
    const auto load_from = [&](std::int64_t base) {
      const std::int64_t left = call.size - base;
      const Share<w> share{team.lane(), threads, int(left < tile ? left : tile)};
      of_row.load(share, base);
      return share;
    };
    F sums[2] = {0, 0};
    for (std::int64_t base = 0; base < call.size; base += tile) of_row.add_up(load_from(base), base, weights, sums);
    team.totals(sums, buffer);
    for (std::int64_t base = 0; base < call.size; base += tile)
      of_row.write(load_from(base), base, weights, per_element, sums);
  }
}

template <class T>
void launch_row_norm_backward(const RowNormBackward& call, void* stream) {
  using F = Compute<T>;
  constexpr int lanes = 32, most = tuning::gradient_threads;
  const bool affine = call.dweight != nullptr || call.dbias != nullptr;
  CommonWidth<T> common(call.size);
  for (const void* p :
       {call.x, call.dy, call.dsum, static_cast<const void*>(call.dx), static_cast<const void*>(call.dbranch)})
    common.add(p);
  if (!call.scalar_affine) common.add(call.weight, size_of(call.weight_dtype));
  const std::int64_t columns = call.scalar_affine ? 1 : call.size;
  std::int64_t n_partials = 0;

  common.with([&](auto width) {
    constexpr int w = width, per_thread = tuning::gradient_rounds<sizeof(T), w> * w;
    if (call.rows == 0) return;
    if (call.size <= most * per_thread) {
      const int team = team_of(call.size, per_thread, most);
      with_block<most>(team, [&](auto threads) {
        const std::int64_t teams = threads / team;
        n_partials = std::min((call.rows + teams - 1) / teams, tuning::gradient_blocks(call.rows, call.size));
        launch("row_norm_backward", row_norm_backward_kernel<T, w, threads>, dim3(unsigned(n_partials)), dim3(threads),
               0, stream, call, log2_of(team));
      });
      return;
    }
    if (call.dx != nullptr)
      launch("row_norm_backward", row_norm_backward_long_kernel<T, w>, grid_of(call.rows, most), dim3(most), 0, stream,
             call);
    if (affine) {
      const int adjacent = team_of(call.size, w, lanes), strip = adjacent * w;
      const std::int64_t strips = (call.size + strip - 1) / strip, parts = column_parts(call.rows, call.size);
      launch("row_norm_columns", row_norm_columns_kernel<T, w>, dim3(unsigned(strips), unsigned(parts)),
             dim3(tuning::column_threads), 0, stream, call, adjacent);
      n_partials = call.scalar_affine ? parts * strips : parts;
    }
  });
  constexpr int together = tuning::join_columns;
  if (affine)
    launch("row_norm_join", row_norm_join_kernel<F>, dim3(unsigned((2 * columns + together - 1) / together)),
           dim3(tuning::column_threads), 0, stream, static_cast<const F*>(call.workspace), n_partials, columns,
           call.weight_dtype, call.dweight, call.dbias);
}

}  // namespace

// Enough for either way: the addresses, which decide between them, are not all known yet.
std::int64_t row_norm_backward_workspace(const RowNormBackward& call) {
  const std::int64_t blocks = std::min(call.rows, tuning::gradient_blocks(call.rows, call.size));
  return std::max(blocks, column_parts(call.rows, call.size)) * 2 * call.size * size_of(compute_dtype(call.dtype));
}

void row_norm_backward(const RowNormBackward& call, const StreamRef& where) {
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype,
             [&](auto type) { launch_row_norm_backward<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
