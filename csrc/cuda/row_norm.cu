// LayerNorm and RMSNorm: a team of threads per row. The row stays in the team's registers between statistics and
// result; a row too long for the registers is read twice.
#include "cuda/device.cuh"
#include "cuda/dropout.cuh"
#include "cuda/engine.hpp"
#include "cuda/row_team.cuh"
#include "rows/norm.hpp"

namespace onepass::cuda {
namespace {

// One thread's share of a row, in registers.
template <class T, int w, int rounds, bool has_residual>
struct RowShare {
  using F = Compute<T>;
  const RowNorm& call;
  std::int64_t begin;  // of the row
  Elements<T, w> x[rounds];

  __device__ void load(const void* from, const Share<w>& share, std::int64_t base) {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) x[r] = share.load(static_cast<const T*>(from) + begin + base, r);
  }
  __device__ void store(void* to, const Share<w>& share, std::int64_t base) const {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) share.store(static_cast<T*>(to) + begin + base, r, x[r]);
  }

  // Replaces x by sum = residual + dropout(x), which is stored.
  __device__ void add_residual(const DropoutBits<F>& dropout, const Share<w>& share, std::int64_t base) {
    Elements<T, w> residual[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) residual[r] = share.load(static_cast<const T*>(call.residual) + begin + base, r);
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const unsigned bits = dropout.template at<w>(begin + base + share.offset(r));
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e)
        encode(x[r].at[e], decode(residual[r].at[e]) + drop(bits, e, decode(x[r].at[e]), dropout.scale));
    }
    store(call.sum, share, base);
  }

  // The thread's part of the mean of n elements. Divided before the summation, because a sum of huge numbers may
  // overflow where their mean does not.
  __device__ F mean_part(std::int64_t n) const {
    const F factor = 1 / F(n);
    F mean = 0;
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) mean += decode(x[k / w].at[k % w]) * factor;
    return mean;
  }

  // sums: of distances from pivot, and of their squares.
  __device__ void add_distances(const Share<w>& share, F pivot, F (&sums)[2]) const {
    ONEPASS_UNROLL
    for (int k = 0; k < rounds * w; ++k) {
      const F distance = share.has(k / w) ? decode(x[k / w].at[k % w]) - pivot : F(0);
      sums[0] += distance;
      sums[1] += distance * distance;
    }
  }

  __device__ void normalise(const Share<w>& share, std::int64_t base, const rows::Stats<F>& stats,
                            const Affine<T>& weight, const Affine<T>& bias) {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const Elements<F, w> scales = weight.load(share, base, r), shifts = bias.load(share, base, r);
      ONEPASS_UNROLL
      for (int e = 0; e < w; ++e)
        encode(x[r].at[e], stats.normalised(F(decode(x[r].at[e]))) * scales.at[e] + shifts.at[e]);
    }
    store(call.y, share, base);
  }
};

template <class T, int w, int rounds, bool has_residual>
__device__ void norm_rows(const RowNorm& call, int team) {
  using F = Compute<T>;
  const DropoutBits<F> dropout(call.dropout);
  const bool stored_as_f = call.weight_dtype != call.dtype;
  const Affine<T> weight{call.weight, stored_as_f, call.scalar_affine, F(1)};
  const Affine<T> bias{call.bias, stored_as_f, call.scalar_affine, F(0)};
  const F size = F(call.size);
  // Elements of a row that the team's registers hold at once.
  const std::int64_t tile = std::int64_t(team) * rounds * w, teams = blockDim.x / team;
  int buffer = 0;

  // All teams of a block make the same number of iterations, because they meet at barriers; in the last one a team may
  // have no row.
  for (std::int64_t first = blockIdx.x * teams; first < call.rows; first += gridDim.x * teams) {
    const std::int64_t row = first + threadIdx.x / team;
    RowShare<T, w, rounds, has_residual> values{call, row * call.size, {}};
    const auto share_from = [&](std::int64_t base) {
      const std::int64_t left = call.size - base;
      return Share<w>{int(threadIdx.x) % team, team, row < call.rows ? int(left < tile ? left : tile) : 0};
    };

    F pivot = 0, sums[2] = {0, 0};
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      values.load(call.x, share, base);
      if constexpr (has_residual) values.add_residual(dropout, share, base);
      if (!call.rms && base == 0) {
        // The pivot is the mean of the first tile, so close to the row's mean that the squares of the distances lose
        // no digits.
        F mean[1] = {values.mean_part(call.size < tile ? call.size : tile)};
        team_totals(mean, team, buffer);
        pivot = mean[0];
      }
      values.add_distances(share, pivot, sums);
    }
    team_totals(sums, team, buffer);

    const rows::Stats<F> stats = call.rms ? rows::Stats<F>::about(0, 0, sums[1] / size, F(call.eps))
                                          : rows::Stats<F>::about(pivot, sums[0] / size, sums[1] / size, F(call.eps));
    if (row < call.rows && threadIdx.x % team == 0) stats.keep(call.stats, call.rows, row);
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      if (tile < call.size) values.load(has_residual ? call.sum : call.x, share, base);
      values.normalise(share, base, stats, weight, bias);
    }
  }
}

// Threads of the largest block.
template <bool has_residual>
constexpr int most_threads = has_residual ? tuning::long_sum_threads : tuning::long_row_threads;

template <class T, int rounds, bool has_residual>
__global__ void __launch_bounds__(rounds == 1 ? tuning::row_threads : most_threads<has_residual>,
                                  rounds == 1 ? tuning::short_blocks_per_sm : 1)
    row_norm_kernel(ONEPASS_GRID_CONSTANT(RowNorm) call, int team) {
  norm_rows<T, width<T>, rounds, has_residual>(call, team);
}

// For rows of any length at any address.
template <class T, bool has_residual>
__global__ void __launch_bounds__(most_threads<has_residual>, has_residual ? 2 : 1)
    row_norm_narrow_kernel(ONEPASS_GRID_CONSTANT(RowNorm) call, int team) {
  norm_rows<T, 1, tuning::narrow_rounds, has_residual>(call, team);
}

template <class T, bool has_residual>
void launch_row_norm(const RowNorm& call, void* stream) {
  constexpr int w = width<T>, lanes = 32, rounds = tuning::row_rounds<sizeof(T)>, most = most_threads<has_residual>;
  bool wide = call.size % w == 0;
  for (const void* p : {call.x, call.residual, static_cast<const void*>(call.sum), static_cast<const void*>(call.y)})
    wide = wide && is_aligned16(p);
  if (!call.scalar_affine) wide = wide && is_aligned16(call.weight) && is_aligned16(call.bias);

  const bool fits_warp = call.size <= lanes * w;
  const int team = !wide       ? team_of(call.size, tuning::narrow_rounds, most)
                   : fits_warp ? team_of(call.size, w, lanes)
                               : team_of(call.size, rounds * w, most);
  const auto kernel = !wide       ? &row_norm_narrow_kernel<T, has_residual>
                      : fits_warp ? &row_norm_kernel<T, 1, has_residual>
                                  : &row_norm_kernel<T, rounds, has_residual>;
  const int threads = team < tuning::row_threads ? tuning::row_threads : team, teams = threads / team;
  launch("row_norm", kernel, grid_of((call.rows + teams - 1) / teams), dim3(threads), 0, stream, call, team);
}

template <class T>
void launch_row_norm(const RowNorm& call, void* stream) {
  call.residual != nullptr ? launch_row_norm<T, true>(call, stream) : launch_row_norm<T, false>(call, stream);
}

}  // namespace

void row_norm(const RowNorm& call, const StreamRef& where) {
  if (call.rows == 0) return;
  if (call.mask != nullptr && call.dropout.seed != nullptr)  // the kernel recomputes the bits
    dropout({call.dtype, call.rows * call.size, nullptr, nullptr, call.mask, false, call.dropout}, where);
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype, [&](auto type) { launch_row_norm<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
