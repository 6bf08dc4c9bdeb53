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

  // Loads x or, with a residual, computes and stores sum = residual + dropout(x).
  __device__ void load(const DropoutBits<F>& dropout, const Share<w>& share, std::int64_t base) {
    unsigned bits[rounds];  // before the loads, so that nothing stands between them
    ONEPASS_UNROLL
    for (int r = 0; r < rounds && has_residual; ++r) bits[r] = dropout.template at<w>(begin + base + share.offset(r));
    Elements<T, w> residual[rounds];
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      x[r] = share.load(static_cast<const T*>(call.x) + begin + base, r);
      if constexpr (has_residual) residual[r] = share.load(static_cast<const T*>(call.residual) + begin + base, r);
    }
    if constexpr (has_residual) {
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r) {
        ONEPASS_UNROLL
        for (int e = 0; e < w; ++e)
          encode(x[r].at[e], decode(residual[r].at[e]) + drop(bits[r], e, decode(x[r].at[e]), dropout.scale));
      }
      store<tuning::Store::write_back>(call.sum, share, base);  // reload() reads it
    }
  }
  // Loads again what was normalised.
  __device__ void reload(const Share<w>& share, std::int64_t base) {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r)
      x[r] = share.load(static_cast<const T*>(has_residual ? call.sum : call.x) + begin + base, r);
  }
  template <tuning::Store how = tuning::output_store>
  __device__ void store(void* to, const Share<w>& share, std::int64_t base) const {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) share.template store<how>(static_cast<T*>(to) + begin + base, r, x[r]);
  }

  // The thread's part of the mean, of elements that count `factor` each. Multiplied before the summation, because a sum
  // of huge numbers may overflow where their mean does not.
  __device__ F mean_part(F factor) const {
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

template <class T, int w, int threads, bool has_residual>
__global__ void __launch_bounds__(threads, tuning::row_blocks_per_sm(sizeof(T), w, threads, has_residual))
    row_norm_kernel(ONEPASS_GRID_CONSTANT(RowNorm) call, int log2_team) {
  using F = Compute<T>;
  constexpr int rounds = tuning::row_rounds<sizeof(T), w>;
  const Team<threads> team{log2_team};
  const DropoutBits<F> dropout(call.dropout);
  const Affine<T> weight(call.weight, call.weight_dtype, call.dtype, call.scalar_affine, F(1));
  const Affine<T> bias(call.bias, call.weight_dtype, call.dtype, call.scalar_affine, F(0));
  // Elements of a row that the team's registers hold at once.
  const std::int64_t tile = std::int64_t(team.size()) * rounds * w;
  const F per_element = 1 / F(call.size), eps = F(call.eps);
  const F per_element_of_tile = 1 / F(call.size < tile ? call.size : tile);
  int buffer = 0;

  // All teams of a block make the same number of iterations, because they meet at barriers; in the last one a team may
  // have no row.
  for (std::int64_t first = std::int64_t(blockIdx.x) * team.per_block(); first < call.rows;
       first += std::int64_t(gridDim.x) * team.per_block()) {
    const std::int64_t row = first + team.number();
    RowShare<T, w, rounds, has_residual> values{call, row * call.size, {}};
    const auto share_from = [&](std::int64_t base) {
      const std::int64_t left = call.size - base;
      return Share<w>{team.lane(), team.size(), row < call.rows ? int(left < tile ? left : tile) : 0};
    };

    F pivot = 0, sums[2] = {0, 0};
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      values.load(dropout, share, base);
      if (!call.rms && base == 0) {
        // The pivot is the mean of the first tile, so close to the row's mean that the squares of the distances lose
        // no digits.
        F mean[1] = {values.mean_part(per_element_of_tile)};
        team.totals(mean, buffer);
        pivot = mean[0];
      }
      values.add_distances(share, pivot, sums);
    }
    team.totals(sums, buffer);

    const F mean_distance = call.rms ? F(0) : sums[0] * per_element;
    const rows::Stats<F> stats = rows::Stats<F>::about(pivot, mean_distance, sums[1] * per_element, eps);
    if (row < call.rows && team.lane() == 0) stats.keep(call.stats, call.rows, row);
    for (std::int64_t base = 0; base < call.size; base += tile) {
      const Share<w> share = share_from(base);
      if (tile < call.size) values.reload(share, base);
      values.normalise(share, base, stats, weight, bias);
    }
  }
}

template <class T, bool has_residual>
void launch_row_norm(const RowNorm& call, void* stream) {
  CommonWidth<T> common(call.size);
  for (const void* p : {call.x, call.residual, static_cast<const void*>(call.sum), static_cast<const void*>(call.y)})
    common.add(p);
  if (!call.scalar_affine)
    for (const void* p : {call.weight, call.bias}) common.add(p, size_of(call.weight_dtype));

  common.with([&](auto width) {
    constexpr int w = width, rounds = tuning::row_rounds<sizeof(T), w>, most = tuning::row_threads(has_residual);
    const int team = team_of(call.size, rounds * w, most);
    with_block<most>(team, [&](auto threads) {
      const int teams = threads / team;
      launch("row_norm", row_norm_kernel<T, w, threads, has_residual>,
             grid_of((call.rows + teams - 1) / teams, threads), dim3(threads), 0, stream, call, log2_of(team));
    });
  });
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
