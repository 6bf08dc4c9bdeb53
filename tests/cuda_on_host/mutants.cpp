// The engines of csrc/cuda without Python, for test_mutants.py: exits with 0 if every result is right and nothing was
// reported. One rule and one dtype (16 bits, with 32-bit states), so that it compiles in seconds.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/apply.cuh"
#include "cuda/reduce.cu"
#include "rules/adam.hpp"

namespace onepass::cuda {
namespace {

using Rule = rules::Adam<false>;
constexpr double hyper[] = {0.1, 0.9, 0.999, 1e-4, 0, 0, 1, 0, 0};
constexpr int n_hyper = sizeof hyper / sizeof *hyper;
constexpr std::int64_t chunk = tuning::reduce_chunk;
static_assert(chunk % tuning::smallest_chunk == 0, "a size at the end of a chunk is one for both kernels");

// Exactly n elements on the heap after `offset` others, so that AddressSanitizer detects the first access beyond them.
template <class T>
struct Array {
  Array(std::int64_t n, int offset) : memory(new T[n + offset]), data(memory.get() + offset) {}
  std::unique_ptr<T[]> memory;
  T* data;
};

// A tensor with its streams, and a copy as plain numbers to which the rule is applied one by one.
template <class T>
struct Tensor {
  std::int64_t size;
  int use;
  Array<T> param, grad;
  Array<float> m, v;
  std::vector<float> p, g, s[2];

  Tensor(std::int64_t n, int use, int param_offset = 0, int grad_offset = 0, int state_offset = 0)
      : size(n), use(use), param(n, param_offset), grad(n, grad_offset), m(n, 0), v(n, state_offset) {
    for (std::int64_t i = 0; i < n; ++i) {
      encode(param.data[i], float(i % 13) - 6);
      encode(grad.data[i], float(i % 7) - 3);
      m.data[i] = float(i % 5) - 2;
      v.data[i] = float(i % 3);
      p.push_back(decode(param.data[i])), g.push_back(decode(grad.data[i]));
      s[0].push_back(m.data[i]), s[1].push_back(v.data[i]);
    }
  }
  Item item() const { return {param.data, grad.data, {m.data, v.data}, size, use, nullptr, 0}; }

  bool is_right(const Rule::Step<float>& k, bool skipped) {
    bool right = true;
    for (std::int64_t i = 0; i < size; ++i) {
      float state[] = {s[0][i], s[1][i]};
      T expected;
      encode(expected, skipped ? p[i] : Rule::update<float>(k, p[i], g[i], state));
      right &= decode(param.data[i]) == decode(expected) && m.data[i] == state[0] && v.data[i] == state[1];
    }
    return right;
  }
};

Rule::Step<float> step_of(double t, double factor) {
  Rule::Hyper h;
  static_assert(sizeof h == sizeof hyper);
  std::memcpy(&h, hyper, sizeof h);
  return Rule::prepare<float>(h, {t, factor, false, 1});
}

enum class Scalars { from_host, from_device, skipping };

// One update of the list. Step counts in host memory, or in device memory with a loss scale.
template <class T>
bool update(std::vector<Tensor<T>>& tensors, int n_keys, Scalars scalars) {
  const bool on_device = scalars != Scalars::from_host, skipping = scalars == Scalars::skipping;
  std::vector<Item> items;
  for (const Tensor<T>& tensor : tensors) items.push_back(tensor.item());
  Array<float> counts(n_keys, 0), grad_scale(1, 0), found_inf(1, 0);
  double scaled_norm = 1, norm = 0;  // nothing is clipped, but chunks are walked in reverse
  std::vector<StepKey> keys;
  for (int u = 0; u < n_keys; ++u) {
    counts.data[u] = float(u);
    keys.push_back({double(u + 1), {}, on_device ? counts.data + u : nullptr, {}, false});
  }
  *grad_scale.data = 4;
  *found_inf.data = skipping;
  Scalar numbers[n_hyper];
  for (int i = 0; i < n_hyper; ++i) numbers[i] = {hyper[i], nullptr, DType::float64};
  Array<unsigned char> workspace(apply_workspace(n_keys), 0);
  Apply call{};
  call.items = items.data(), call.n_items = std::int64_t(items.size());
  call.keys = keys.data(), call.n_keys = n_keys;
  call.hyper = numbers;
  call.scaling.max_norm = -1;
  call.grad_scale = 1;
  if (on_device) {
    call.workspace = workspace.data;
    call.device_scaling.grad_scale = grad_scale.data;
    call.device_scaling.found_inf = found_inf.data;
    call.device_scaling.scaled_norm = &scaled_norm, call.device_scaling.norm = &norm;
  }
  apply_to<Rule, T>(call);

  bool right = true;
  for (int u = 0; on_device && u < n_keys; ++u) right &= counts.data[u] == float(u + !skipping);
  for (Tensor<T>& tensor : tensors) right &= tensor.is_right(step_of(tensor.use + 1, on_device ? 0.25 : 1), skipping);
  return right;
}

template <class T>
bool updates() {
  bool right = true;
  for (const Scalars scalars : {Scalars::from_host, Scalars::from_device, Scalars::skipping}) {
    std::vector<Tensor<T>> chunks, many;
    for (const std::int64_t n : {std::int64_t{1}, chunk - 1, std::int64_t{0}, chunk, chunk + 1, 2 * chunk + 100})
      chunks.emplace_back(n, 0);
    for (const int stream : {0, 1, 2}) chunks.emplace_back(chunk + 9, 1, stream == 0, stream == 1, stream == 2);
    right &= update(chunks, 2, scalars);
    // More tensors and Steps than fit in one launch; on the device more than one launch of the prepare kernel.
    const int n_keys = scalars == Scalars::from_host ? tuning::max_steps + 5 : PrepareParams<Rule>::capacity + 5;
    for (int i = 0; i < n_keys + ApplyParams<Rule, T, false>::capacity; ++i) many.emplace_back(1 + i % 3, i % n_keys);
    right &= update(many, n_keys, scalars);
  }
  return right;
}

// Aligned and unaligned arrays, each with an aligned and an unaligned second stream; of numbers times a power of two.
template <class T>
bool sums(DType dtype, Total kind, int exponent = 0) {
  const bool weighted = kind == Total::weighted_squares;
  std::vector<Array<T>> arrays, factors;
  std::vector<std::int64_t> sizes = {1, chunk - 1, 0, chunk, chunk + 1, 2 * chunk + 100, chunk - 8};
  for (int i = 0; i < ReduceTable::capacity; ++i) sizes.push_back(1 + i % 3);
  double expected = 0;
  std::int64_t n_partials = 0;
  std::vector<const void*> data, weights;
  for (const std::int64_t n : sizes) {
    const auto& array = arrays.emplace_back(n, int(arrays.size() % 2));
    const auto& factor = factors.emplace_back(n, int(factors.size() % 3 == 1));
    for (std::int64_t i = 0; i < n; ++i) {
      encode(array.data[i], std::ldexp(float(i % 13) - 6, exponent));
      encode(factor.data[i], float(i % 5) - 2);
      const double x = double(decode(array.data[i])) * (weighted ? decode(factor.data[i]) : 1);
      expected += x * x;  // exact
    }
    n_partials += reduce_partials(n);
  }
  for (const auto& array : arrays) data.push_back(array.data);
  for (const auto& factor : factors) weights.push_back(factor.data);
  Array<double> partials(n_partials, 0), total(1, 0);
  for (std::int64_t i = 0; i < n_partials; ++i) partials.data[i] = NAN;
  reduce({{kind, 2}, dtype, data.data(), weights.data(), sizes.data(), std::int64_t(sizes.size()), partials.data, {}});
  join_partials(kind, partials.data, n_partials, false, total.data, {});
  bool right = *total.data == expected;
  join_partials(kind, partials.data, n_partials, true, total.data, {});
  return right && *total.data == std::sqrt(expected);
}

}  // namespace
}  // namespace onepass::cuda

int main() {
  using namespace onepass;
  using namespace onepass::cuda;
  try {
    if (updates<__nv_bfloat16>() && sums<__nv_bfloat16>(DType::bfloat16, Total::squares) &&
        sums<__nv_bfloat16>(DType::bfloat16, Total::weighted_squares) && sums<float>(DType::float32, Total::squares) &&
        sums<float>(DType::float32, Total::squares, 100) && sums<float>(DType::float32, Total::squares, -80) &&
        sums<float>(DType::float32, Total::weighted_squares))
      return 0;
    std::puts("wrong result");
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
  }
  return 1;
}
