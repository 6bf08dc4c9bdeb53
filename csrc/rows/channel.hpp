// What BatchNorm computes for a channel once its moments, or the sums of its gradients, are known. Each engine passes
// Numbers, which reads and writes one number of a dtype known at run time:
//   static double get(DType, const void*, std::int64_t);  static void set(DType, void*, std::int64_t, double);
#pragma once
#include "core/layers.hpp"
#include "rows/moments.hpp"
#include "rows/norm.hpp"

namespace onepass::rows {

// The channel's statistics for this phase, stored in call.stats; phase all also updates the running statistics.
template <class F, class Numbers>
ONEPASS_HD Stats<F> finish_channel(const BatchNorm& call, std::int64_t c, const Moments& batch) {
  const std::int64_t channels = call.shape.channels;
  if (call.phase == Phase::apply) return Stats<F>::kept(call.stats, channels, c);
  const bool running = call.phase == Phase::apply_running;
  const Stats<F> stats =
      Stats<F>::of(running ? Numbers::get(call.running_dtype, call.running_mean, c) : batch.mean,
                   running ? Numbers::get(call.running_dtype, call.running_var, c) : batch.variance(), call.eps);
  stats.keep(call.stats, channels, c);
  if (call.phase == Phase::statistics) static_cast<F*>(call.stats)[channels + c] = F(batch.variance());
  if (call.phase == Phase::all && call.running_mean != nullptr) {
    const double kept = 1 - call.momentum, unbiased = batch.squares / (batch.n - 1);
    const double mean = Numbers::get(call.running_dtype, call.running_mean, c);
    const double var = Numbers::get(call.running_dtype, call.running_var, c);
    Numbers::set(call.running_dtype, call.running_mean, c, kept * mean + call.momentum * batch.mean);
    Numbers::set(call.running_dtype, call.running_var, c, kept * var + call.momentum * unbiased);
  }
  return stats;
}

template <class F, class Numbers>
ONEPASS_HD Normaliser<F> normaliser_of(const BatchNorm& call, std::int64_t c, const Stats<F>& stats) {
  const F weight = call.weight != nullptr ? F(Numbers::get(call.weight_dtype, call.weight, c)) : F(1);
  const F bias = call.bias != nullptr ? F(Numbers::get(call.weight_dtype, call.bias, c)) : F(0);
  return Normaliser<F>::of(stats, weight, bias);
}

// Sums over a channel of dz (the gradient before the activation) and of dz * (x - mean).
struct GradientSums {
  double dz = 0, dz_distance = 0;

  ONEPASS_HD void add(const GradientSums& other) {
    dz += other.dz;
    dz_distance += other.dz_distance;
  }
};

// Writes the gradients of weight and bias, and call.sums: of dz and of dz * xhat.
template <class F, class Numbers>
ONEPASS_HD void finish_channel_gradient(const BatchNormBackward& call, std::int64_t c, const GradientSums& sums) {
  const Stats<F> stats = Stats<F>::kept(call.stats, call.shape.channels, c);
  const double rstd = double(stats.rstd);
  // rstd == 0: the sums of huge numbers may be infinite, and infinity * 0 would be NaN.
  const double dz_xhat = rstd == 0 ? 0 : (sums.dz_distance - sums.dz * double(stats.mean_low)) * rstd;
  static_cast<F*>(call.sums)[c] = F(sums.dz);
  static_cast<F*>(call.sums)[call.shape.channels + c] = F(dz_xhat);
  if (call.dweight != nullptr) Numbers::set(call.weight_dtype, call.dweight, c, dz_xhat);
  if (call.dbias != nullptr) Numbers::set(call.weight_dtype, call.dbias, c, sums.dz);
}

// From call.sums, which are sums over all processes.
template <class F, class Numbers>
ONEPASS_HD InputGradient<F> input_gradient_of(const BatchNormBackward& call, std::int64_t c) {
  const std::int64_t channels = call.shape.channels;
  const Stats<F> stats = Stats<F>::kept(call.stats, channels, c);
  const F weight = call.weight != nullptr ? F(Numbers::get(call.weight_dtype, call.weight, c)) : F(1);
  if (!call.training) return InputGradient<F>::of_constants(stats, weight);
  const F* const sums = static_cast<const F*>(call.sums);
  return InputGradient<F>::of(stats, weight, sums[c] / F(call.count), sums[channels + c] / F(call.count));
}

}  // namespace onepass::rows
