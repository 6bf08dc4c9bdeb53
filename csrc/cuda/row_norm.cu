// LayerNorm and RMSNorm: a team of threads a row, which stays in their registers between statistics and result. Rows
// too long for that are read once more.
#include "cuda/device.cuh"
#include "cuda/dropout.cuh"
#include "cuda/engine.hpp"
#include "cuda/row_team.cuh"
#include "rows/norm.hpp"

namespace onepass::cuda {
namespace {

template <class T, int w, int rounds, bool fits, bool adds>
__device__ void norm_rows(const RowNorm& call, int team) {
  using F = Compute<T>;
  using Values = Elements<T, w>;
  const bool drops = call.dropout.seed != nullptr;
  const std::uint64_t seed = drops ? std::uint64_t(*call.dropout.seed) : 0;
  const F scale = F(drops ? call.dropout.scale : 1), size = F(call.size);
  const bool is_arithmetic = call.weight_dtype != call.dtype;
  const Affine<T> weight{call.weight, is_arithmetic, call.scalar_affine, F(1)};
  const Affine<T> bias{call.bias, is_arithmetic, call.scalar_affine, F(0)};
  const std::int64_t tile = fits ? call.size : std::int64_t(team) * rounds * w, teams = blockDim.x / team;
  int turn = 0;

  // All teams of a block have the same number of turns, a last one perhaps without a row: they meet at barriers.
  for (std::int64_t first = blockIdx.x * teams; first < call.rows; first += gridDim.x * teams) {
    const std::int64_t row = first + threadIdx.x / team, begin = row * call.size;
    const auto share_from = [&](std::int64_t base) {
      const std::int64_t left = call.size - base;
      return Share<w>{int(threadIdx.x) % team, team, row < call.rows ? int(left < tile ? left : tile) : 0};
    };
    const T* const normed = (adds ? static_cast<T*>(call.sum) : static_cast<const T*>(call.x)) + begin;

    Values x[rounds];
    F pivot = 0, sums[2] = {0, 0};  // sums: of distances from pivot, and of their squares
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r) x[r] = share.load(static_cast<const T*>(call.x) + begin + base, r);
      if constexpr (adds) {
        Values residual[rounds];
        ONEPASS_UNROLL
        for (int r = 0; r < rounds; ++r)
          residual[r] = share.load(static_cast<const T*>(call.residual) + begin + base, r);
        ONEPASS_UNROLL
        for (int r = 0; r < rounds; ++r) {
          const std::int64_t i = begin + base + share.place(r);
          const unsigned bits = drops ? keep_bits<w>(seed, call.dropout.threshold, i) : ~0u;
          ONEPASS_UNROLL
          for (int e = 0; e < w; ++e)
            encode(x[r].at[e], decode(residual[r].at[e]) + drop(bits, e, decode(x[r].at[e]), scale));
        }
        ONEPASS_UNROLL
        for (int r = 0; r < rounds; ++r) share.store(static_cast<T*>(call.sum) + begin + base, r, x[r]);
      }
      if (!call.rms && base == 0) {
        // The mean of what is in the registers: near enough to the row's for the squares of the distances to lose
        // nothing. Divided before it is summed: the sum of huge numbers may overflow where their mean does not.
        F mean[1] = {0};
        const F part = 1 / F(call.size < tile ? call.size : tile);
        ONEPASS_UNROLL
        for (int k = 0; k < rounds * w; ++k) mean[0] += decode(x[k / w].at[k % w]) * part;
        team_totals(mean, team, turn);
        pivot = mean[0];
      }
      ONEPASS_UNROLL
      for (int k = 0; k < rounds * w; ++k) {
        const F distance = share.has(k / w) ? decode(x[k / w].at[k % w]) - pivot : F(0);
        sums[0] += distance;
        sums[1] += distance * distance;
      }
    }
    team_totals(sums, team, turn);

    const rows::Stats<F> stats = call.rms ? rows::Stats<F>::about(0, 0, sums[1] / size, F(call.eps))
                                          : rows::Stats<F>::about(pivot, sums[0] / size, sums[1] / size, F(call.eps));
    if (row < call.rows && threadIdx.x % team == 0) stats.keep(call.stats, call.rows, row);
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r) {
        if constexpr (!fits) x[r] = share.load(normed + base, r);
      }
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r) {
        const Elements<F, w> scales = weight.load(share, base, r), shifts = bias.load(share, base, r);
        ONEPASS_UNROLL
        for (int e = 0; e < w; ++e)
          encode(x[r].at[e], stats.normalised(F(decode(x[r].at[e]))) * scales.at[e] + shifts.at[e]);
      }
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r) share.store(static_cast<T*>(call.y) + begin + base, r, x[r]);
    }
  }
}

// Threads of the largest block.
template <bool adds>
constexpr int most_threads = adds ? tuning::long_sum_threads : tuning::long_row_threads;

// fits: the row does, in a team's registers. adds: there is a residual.
template <class T, int rounds, bool fits, bool adds>
__global__ void __launch_bounds__(rounds == 1 ? tuning::row_threads : most_threads<adds>,
                                  rounds == 1 ? tuning::short_blocks_per_sm : 1)
    row_norm_kernel(ONEPASS_GRID_CONSTANT(RowNorm) call, int team) {
  norm_rows<T, width<T>, rounds, fits, adds>(call, team);
}

// For rows of any length at any address.
template <class T, bool adds>
__global__ void __launch_bounds__(most_threads<adds>)
    row_norm_narrow_kernel(ONEPASS_GRID_CONSTANT(RowNorm) call, int team) {
  norm_rows<T, 1, tuning::narrow_rounds, false, adds>(call, team);
}

template <class T, bool adds>
void launch_row_norm(const RowNorm& call, void* stream) {
  constexpr int w = width<T>, lanes = 32, rounds = tuning::row_rounds<sizeof(T)>, most = most_threads<adds>;
  bool wide = call.size % w == 0;
  for (const void* p : {call.x, call.residual, static_cast<const void*>(call.sum), static_cast<const void*>(call.y)})
    wide = wide && is_aligned16(p);
  if (!call.scalar_affine) wide = wide && is_aligned16(call.weight) && is_aligned16(call.bias);

  const bool fits_warp = call.size <= lanes * w, fits = call.size <= most * rounds * w;
  const int team = !wide       ? team_of(call.size, tuning::narrow_rounds, most)
                   : fits_warp ? team_of(call.size, w, lanes)
                               : team_of(call.size, rounds * w, most);
  const auto kernel = !wide       ? &row_norm_narrow_kernel<T, adds>
                      : fits_warp ? &row_norm_kernel<T, 1, true, adds>
                      : fits      ? &row_norm_kernel<T, rounds, true, adds>
                                  : &row_norm_kernel<T, rounds, false, adds>;
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
  if (call.mask != nullptr && call.dropout.seed != nullptr)  // the kernel makes the bits anew
    dropout({call.dtype, call.rows * call.size, nullptr, nullptr, call.mask, false, call.dropout}, where);
  const DeviceGuard guard(where.device);
  with_dtype(call.dtype, [&](auto type) { launch_row_norm<typename decltype(type)::type>(call, where.stream); });
}

}  // namespace onepass::cuda
