// The Steps of an update whose scalars are in device memory: a kernel computes them, so that the host need not wait.
#pragma once
#include <cstring>

#include "core/grad_factor.hpp"
#include "core/rule.hpp"
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

// The parameter block of the prepare kernel.
template <class Rule>
struct PrepareParams {
  static constexpr int n_hyper = sizeof(typename Rule::Hyper) / sizeof(double);
  static constexpr int capacity = (tuning::parameter_bytes - 1024) / sizeof(StepKey);

  StepKey keys[capacity];
  std::int32_t n_keys;
  double hyper[n_hyper];
  const void* hyper_device[n_hyper];  // address in device memory; null: the number is in hyper
  bool hyper_is_double[n_hyper];
  GradScaling scaling;
  DeviceGradScaling device;
  double grad_scale;
};

// Computes Steps from scalars in device memory, so that the host need not wait for them: reads hyper-parameters, step
// counts, loss scale and gradient norm, and advances the counts. One thread per StepKey.
template <class Rule, class F>
__global__ void __launch_bounds__(tuning::prepare_threads)
    prepare_kernel(ONEPASS_GRID_CONSTANT(PrepareParams<Rule>) from, typename Rule::template Step<F>* steps, double* t) {
  const int u = int(blockIdx.x) * tuning::prepare_threads + int(threadIdx.x);
  if (u >= from.n_keys) return;
  const bool skip = from.device.found_inf != nullptr && *from.device.found_inf != 0;

  typename Rule::Hyper hyper;
  double* const value = reinterpret_cast<double*>(&hyper);
  ONEPASS_UNROLL
  for (int i = 0; i < PrepareParams<Rule>::n_hyper; ++i) {
    const void* const at = from.hyper_device[i];
    value[i] = at == nullptr             ? from.hyper[i]
               : from.hyper_is_double[i] ? *static_cast<const double*>(at)
                                         : double(*static_cast<const float*>(at));
  }

  const double scale = from.device.grad_scale != nullptr ? double(*from.device.grad_scale) : from.grad_scale;
  double norm = 0;
  if (from.device.scaled_norm != nullptr) {
    norm = *from.device.scaled_norm / scale;
    if (u == 0) *from.device.norm = norm;
  }

  StepContext context;
  context.t = from.keys[u].t;
  if (from.keys[u].device_step != nullptr) {
    context.t = double(*from.keys[u].device_step) + 1;
    if (!skip) *from.keys[u].device_step = float(context.t);
  }
  context.carried = from.keys[u].carried;
  float* const(&carried)[max_carried] = from.keys[u].device_carried;
  if (carried[0] != nullptr) {
    CarriedNumbers next{};
    ONEPASS_UNROLL
    for (int i = 0; i < max_carried; ++i)
      if (carried[i] != nullptr) context.carried.at[i] = double(*carried[i]);
    Carried<Rule>::template carry<float>(hyper, context.t, context.carried, next);
    ONEPASS_UNROLL
    for (int i = 0; i < max_carried; ++i)
      if (carried[i] != nullptr && !skip) *carried[i] = float(next.at[i]);
  }
  context.grad_factor = grad_factor(from.scaling, scale, norm);
  context.fresh = from.keys[u].fresh;
  t[u] = context.t;
  steps[u] = Rule::template prepare<F>(hyper, context);
}

// Where the prepare kernel writes: Steps, and the number of each step.
template <class Step>
Step* prepared_steps(const Apply& call) {
  static_assert(sizeof(Step) + sizeof(double) <= max_step_bytes, "raise max_step_bytes");
  return static_cast<Step*>(call.workspace);
}
inline double* prepared_t(const Apply& call) {
  return reinterpret_cast<double*>(static_cast<char*>(call.workspace) +
                                   call.n_keys * (max_step_bytes - std::int64_t(sizeof(double))));
}

template <class Rule, class F>
void launch_prepare(const Apply& call) {
  PrepareParams<Rule> from{};
  for (int i = 0; i < PrepareParams<Rule>::n_hyper; ++i) {
    from.hyper[i] = call.hyper[i].value;
    from.hyper_device[i] = call.hyper[i].device;
    from.hyper_is_double[i] = call.hyper[i].dtype == DType::float64;
  }
  from.scaling = call.scaling;
  from.device = call.device_scaling;
  from.grad_scale = call.grad_scale;
  for (int first = 0; first < call.n_keys; first += PrepareParams<Rule>::capacity) {
    const int n =
        call.n_keys - first < PrepareParams<Rule>::capacity ? call.n_keys - first : PrepareParams<Rule>::capacity;
    std::memcpy(from.keys, call.keys + first, n * sizeof(StepKey));
    from.n_keys = n;
    const int blocks = (n + tuning::prepare_threads - 1) / tuning::prepare_threads;
    launch("prepare", prepare_kernel<Rule, F>, dim3(blocks), dim3(tuning::prepare_threads), 0, call.where.stream, from,
           prepared_steps<typename Rule::template Step<F>>(call) + first, prepared_t(call) + first);
  }
}

}  // namespace onepass::cuda
