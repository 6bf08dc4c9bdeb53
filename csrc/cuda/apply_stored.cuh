// The apply kernel for states and parameters in the formats of core/storage.hpp. A thread updates 8 adjacent elements,
// so 8 lanes hold a group of elements that share a scale. Formats are the same for a whole launch: a branch on one
// costs no divergence, and needs no kernel of its own.
#pragma once
#include "core/engine.hpp"
#include "core/rule.hpp"
#include "cuda/device.cuh"
#include "cuda/tuning.hpp"
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

constexpr int stored_elements = 8;  // of a thread
constexpr int scale_lanes = scale_group / stored_elements;

template <class Rule, class T>
struct StoredParams {
  using Step = typename Rule::template Step<float>;
  // Streams: param, grad, remainder, then states and their scales.
  static constexpr int grad = 1, remainder = 2, first_state = 3, n_state = Rule::n_state;
  static constexpr int n_streams = first_state + 2 * n_state;
  static constexpr int fixed_bytes = tuning::max_steps * (sizeof(Step) + sizeof(double)) + 112;
  static constexpr int bytes_per_tensor = sizeof(void*) * n_streams + 8 + 4 + 4;
  static constexpr int bytes_per_element = 2 * sizeof(T) + n_state;  // the least: states in 8 bits
  static constexpr int capacity = (tuning::parameter_bytes - fixed_bytes) / bytes_per_tensor;

  void* stream[n_streams][capacity];
  std::int64_t size[capacity];
  std::uint32_t first_chunk[capacity];
  std::int32_t step[capacity];
  Step steps[tuning::max_steps];
  double t[tuning::max_steps];  // the number of the step, which decides how numbers are rounded
  const Step* prepared;
  const float* found_inf;
  const double* prepared_t;
  StateFormat format[max_states];
  ParamFormat param_format;
  std::int32_t n_tensors, chunk;
  bool reversed;

  static bool takes(const Item&) { return true; }
  void set_tensor(int i, const Item& item, const Storage* storage) {
    stream[0][i] = item.param;
    stream[grad][i] = const_cast<void*>(item.grad);
    stream[remainder][i] = storage->remainder;
    for (int s = 0; s < n_state; ++s) {
      stream[first_state + 2 * s][i] = item.state[s];
      stream[first_state + 2 * s + 1][i] = storage->scale[s];
      format[s] = storage->state[s];
    }
    param_format = storage->param;
  }
  void set_step(int i, const StepKey& key) { t[i] = key.t; }
  void set_prepared(const Step* steps_there, const double* t_there) {
    prepared = steps_there;
    prepared_t = t_there;
  }
};

// Where a thread's elements are: i is the index of the first in the tensor.
struct StoredPlace {
  std::int64_t i;
  int count;  // 0 behind the end of the tensor: its lanes still take part in shuffles
  bool is_wide;

  __device__ std::uint32_t random(std::uint32_t start, int k) const {
    return start + (static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(k)) * storage::golden;
  }
};

// A thread's elements of one stream; U is an integer of its size, or its type. What is not there is loaded as 0.
template <class U>
__device__ Elements<U, stored_elements> load_some(const void* p, const StoredPlace& place) {
  const U* const from = static_cast<const U*>(p) + place.i;
  auto e = Elements<U, stored_elements>::load(from, place.is_wide);
  if (place.is_wide) return e;
  ONEPASS_UNROLL
  for (int k = 0; k < stored_elements; ++k)
    if (k < place.count) e.at[k] = from[k];
  return e;
}
template <class U>
__device__ void store_some(const Elements<U, stored_elements>& e, void* p, const StoredPlace& place) {
  U* const to = static_cast<U*>(p) + place.i;
  if (place.is_wide) return e.template store<tuning::state_store>(to);
  ONEPASS_UNROLL
  for (int k = 0; k < stored_elements; ++k)
    if (k < place.count) to[k] = e.at[k];
}

__device__ inline void load_state(StateFormat format, const void* state, const void* scale, const StoredPlace& place,
                                  float (&x)[stored_elements]) {
  if (format == StateFormat::full) {
    const auto e = load_some<float>(state, place);
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) x[k] = e.at[k];
  } else if (format == StateFormat::bfloat16) {
    const auto e = load_some<std::uint16_t>(state, place);
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) x[k] = storage::from_bits<float>(std::uint32_t(e.at[k]) << 16);
  } else {
    const auto e = load_some<std::uint8_t>(state, place);
    const float s = place.count > 0 ? static_cast<const float*>(scale)[place.i / scale_group] : 0;
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) {
      const std::uint32_t code = e.at[k];
      if (format == StateFormat::signed8) {
        const float magnitude = storage::magnitude_of<StateFormat::signed8, float>(code & 0x7fu, s);
        x[k] = storage::from_bits<float>(storage::bits_of(magnitude) | (code & 0x80u) << 24);
      } else {
        x[k] = storage::magnitude_of<StateFormat::unsigned8, float>(code, s);
      }
    }
  }
}

// Every lane of the warp calls it.
__device__ inline void store_state(StateFormat format, void* state, void* scale, const StoredPlace& place,
                                   std::uint32_t start, const float (&x)[stored_elements]) {
  if (format == StateFormat::full) {
    Elements<float, stored_elements> e;
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) e.at[k] = x[k];
    store_some(e, state, place);
  } else if (format == StateFormat::bfloat16) {
    Elements<std::uint16_t, stored_elements> e;
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k)
      e.at[k] = static_cast<std::uint16_t>(storage::bfloat16_of(x[k], place.random(start, k)));
    store_some(e, state, place);
  } else {
    std::uint32_t largest = 0;
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) {
      const std::uint32_t magnitude = k < place.count ? storage::bits_of(x[k]) & 0x7fffffffu : 0;
      largest = magnitude > largest ? magnitude : largest;
    }
    ONEPASS_UNROLL
    for (int distance = scale_lanes / 2; distance > 0; distance /= 2) {
      const std::uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
      largest = other > largest ? other : largest;
    }
    const std::uint32_t bits = storage::scale_bits(format, largest);
    const bool overflows = bits >= storage::infinity_bits;
    const float inverse = overflows ? 0 : storage::from_bits<float>(storage::inverse_bits(bits));
    Elements<std::uint8_t, stored_elements> e;
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) {
      const std::uint32_t element = storage::bits_of(x[k]), magnitude = element & 0x7fffffffu;
      const float value = storage::from_bits<float>(magnitude);
      std::uint32_t code;
      if (format == StateFormat::signed8) {
        code = storage::code_of<StateFormat::signed8>(value, inverse, place.random(start, k)) | (element >> 24 & 0x80u);
      } else {
        code = storage::code_of<StateFormat::unsigned8>(value, inverse, place.random(start, k));
        if (code == 0 && magnitude != 0) code = 1;
      }
      e.at[k] = static_cast<std::uint8_t>(overflows ? 1 : code);
    }
    store_some(e, state, place);
    if (place.count > 0 && threadIdx.x % scale_lanes == 0)
      static_cast<float*>(scale)[place.i / scale_group] = storage::from_bits<float>(bits);
  }
}

__device__ inline float with_lower(float upper, int lower) {
  return storage::from_bits<float>(storage::bits_of(upper) + static_cast<std::uint32_t>(lower));
}

template <class T>
__device__ void load_param(ParamFormat format, const void* param, const void* remainder, const StoredPlace& place,
                           float (&x)[stored_elements]) {
  const auto e = load_some<T>(param, place);
  ONEPASS_UNROLL
  for (int k = 0; k < stored_elements; ++k) x[k] = decode(e.at[k]);
  if constexpr (same_type<T, __nv_bfloat16>) {
    if (format == ParamFormat::remainder16) {
      const auto lower = load_some<std::int16_t>(remainder, place);
      ONEPASS_UNROLL
      for (int k = 0; k < stored_elements; ++k) x[k] = with_lower(x[k], lower.at[k]);
    } else if (format == ParamFormat::remainder8) {
      const auto lower = load_some<std::int8_t>(remainder, place);
      ONEPASS_UNROLL
      for (int k = 0; k < stored_elements; ++k) x[k] = with_lower(x[k], lower.at[k] * 256);
    }
  }
}

__device__ inline void store_bfloat16(ParamFormat format, void* param, void* remainder, const StoredPlace& place,
                                      std::uint32_t start, const float (&x)[stored_elements]) {
  Elements<std::uint16_t, stored_elements> upper;
  Elements<std::int16_t, stored_elements> lower16;
  Elements<std::int8_t, stored_elements> lower8;
  ONEPASS_UNROLL
  for (int k = 0; k < stored_elements; ++k) {
    const std::uint32_t random = place.random(start, k);
    if (format == ParamFormat::stochastic) {
      upper.at[k] = static_cast<std::uint16_t>(storage::bfloat16_of(x[k], random));
    } else {
      const std::uint32_t master = format == ParamFormat::remainder16 ? storage::master_of<0>(x[k], random)
                                                                      : storage::master_of<8>(x[k], random);
      upper.at[k] = static_cast<std::uint16_t>(storage::nearest_bfloat16(master));
      lower16.at[k] = static_cast<std::int16_t>(master & 0xffffu);
      lower8.at[k] = static_cast<std::int8_t>(master >> 8 & 0xffu);
    }
  }
  store_some(upper, param, place);
  if (format == ParamFormat::remainder16) store_some(lower16, remainder, place);
  if (format == ParamFormat::remainder8) store_some(lower8, remainder, place);
}

template <class T>
__device__ void store_param(ParamFormat format, void* param, void* remainder, const StoredPlace& place,
                            std::uint32_t start, const float (&x)[stored_elements]) {
  if constexpr (same_type<T, __nv_bfloat16>) {
    if (format != ParamFormat::plain) return store_bfloat16(format, param, remainder, place, start, x);
  }
  Elements<T, stored_elements> e;
  ONEPASS_UNROLL
  for (int k = 0; k < stored_elements; ++k) encode(e.at[k], x[k]);
  store_some(e, param, place);
}

template <class Rule, class T>
__global__ void __launch_bounds__(tuning::apply_threads, tuning::stored_blocks_per_sm(Rule::n_state))
    apply_stored_kernel(ONEPASS_GRID_CONSTANT(StoredParams<Rule, T>) params) {
  using Params = StoredParams<Rule, T>;
  constexpr int n_state = Rule::n_state, array_size = n_state > 0 ? n_state : 1;
  constexpr int round = tuning::apply_threads * stored_elements;
  static_assert(tuning::smallest_chunk % round == 0, "a warp's lanes share their loop");
  const float found_inf = params.found_inf != nullptr ? *params.found_inf : 0;
  const Chunk chunk = chunk_of(params, params.reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x, params.chunk);
  const int tensor = chunk.tensor;
  const std::int64_t offset = chunk.begin, end = offset + chunk.size;
  const int key = params.step[tensor];
  const typename Params::Step step = params.prepared != nullptr ? params.prepared[key] : params.steps[key];
  const double t = params.prepared != nullptr ? params.prepared_t[key] : params.t[key];
  bool aligned = true;
  ONEPASS_UNROLL
  for (int s = 0; s < Params::n_streams; ++s)
    aligned = aligned && (s == Params::grad || is_aligned16(params.stream[s][tensor]));
  const bool grad_aligned = is_aligned16(params.stream[Params::grad][tensor]);

  for (std::int64_t first = offset; first < end; first += round) {
    StoredPlace place{first + std::int64_t(threadIdx.x) * stored_elements, 0, false};
    const std::int64_t left = end - place.i;
    place.count = left <= 0 ? 0 : left < stored_elements ? int(left) : stored_elements;
    place.is_wide = aligned && place.count == stored_elements;

    float param[stored_elements], grad[stored_elements], state[array_size][stored_elements];
    load_param<T>(params.param_format, params.stream[0][tensor], params.stream[Params::remainder][tensor], place,
                  param);
    StoredPlace grad_place = place;  // only the gradient may be misaligned: a view of DistributedDataParallel's buckets
    grad_place.is_wide = place.is_wide && grad_aligned;
    const auto g = load_some<T>(params.stream[Params::grad][tensor], grad_place);
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) grad[k] = decode(g.at[k]);
    ONEPASS_UNROLL
    for (int s = 0; s < n_state; ++s)
      load_state(params.format[s], params.stream[Params::first_state + 2 * s][tensor],
                 params.stream[Params::first_state + 2 * s + 1][tensor], place, state[s]);
    __syncwarp();  // a group's scale is read by all of its lanes, and written by the first
    ONEPASS_UNROLL
    for (int k = 0; k < stored_elements; ++k) {
      float element_state[array_size];
      ONEPASS_UNROLL
      for (int s = 0; s < n_state; ++s) element_state[s] = state[s][k];
      param[k] = Rule::template update<float>(step, param[k], grad[k], element_state);
      ONEPASS_UNROLL
      for (int s = 0; s < n_state; ++s) state[s][k] = element_state[s];
    }
    float skips = found_inf;
    load_here(skips);  // tested here and not before the loads, which would wait for it
    if (skips != 0) return;
    store_param<T>(params.param_format, params.stream[0][tensor], params.stream[Params::remainder][tensor], place,
                   storage::dither_start(t, max_states), param);
    ONEPASS_UNROLL
    for (int s = 0; s < n_state; ++s)
      store_state(params.format[s], params.stream[Params::first_state + 2 * s][tensor],
                  params.stream[Params::first_state + 2 * s + 1][tensor], place, storage::dither_start(t, s), state[s]);
  }
}

}  // namespace onepass::cuda
