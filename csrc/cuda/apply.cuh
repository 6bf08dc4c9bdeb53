// The CUDA engine of the update rules: one launch updates a list of tensors in chunks. A block updates one chunk and
// looks up the tensor it belongs to.
#pragma once
#include "core/grad_factor.hpp"
#include "core/rule.hpp"
#include "cuda/apply_stored.cuh"
#include "cuda/device.cuh"
#include "cuda/engine.hpp"
#include "cuda/prepare.cuh"
#include "cuda/tuning.hpp"
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

// The parameter block of the apply kernel, without empty tensors. by_rows: all gradients are sparse.
template <class Rule, class T, bool by_rows>
struct ApplyParams {
  using Step = typename Rule::template Step<Compute<T>>;
  static constexpr int n_streams = 1 + (Rule::reads_grad ? 1 : 0) + Rule::n_state;
  static constexpr int fixed_bytes = tuning::max_steps * sizeof(Step) + 64;
  static constexpr int bytes_per_element = (n_streams - Rule::n_state) * sizeof(T) + Rule::n_state * sizeof(Compute<T>);
  static constexpr int bytes_per_tensor = sizeof(void*) * n_streams + 8 + 4 + 4 + (by_rows ? 16 : 0);
  static constexpr int capacity = (tuning::parameter_bytes - fixed_bytes) / bytes_per_tensor;

  void* stream[n_streams][capacity];  // param, grad if the rule reads it, states
  std::int64_t size[capacity];
  const std::int64_t* rows[by_rows ? capacity : 1];
  std::int64_t row_size[by_rows ? capacity : 1];
  std::uint32_t first_chunk[capacity];
  std::int32_t step[capacity];    // index of the tensor's Step, in prepared or else in steps
  Step steps[tuning::max_steps];  // prepared by the host
  const Step* prepared;           // prepared by the prepare kernel, or null
  const float* found_inf;         // unless null: if it is not 0, the launch changes nothing
  std::int32_t n_tensors, chunk;  // chunk: its elements
  bool reversed;                  // the first block updates the last chunk

  static bool takes(const Item& item) { return (item.rows != nullptr) == by_rows; }
  // Fills in what the kernel needs to know of a tensor and of a step besides sizes and Steps.
  void set_tensor(int i, const Item& item, const Storage*) {
    int s = 0;
    stream[s++][i] = item.param;
    if (Rule::reads_grad) stream[s++][i] = const_cast<void*>(item.grad);
    for (int state = 0; state < Rule::n_state; ++state) stream[s++][i] = item.state[state];
    if constexpr (by_rows) {
      rows[i] = item.rows;
      row_size[i] = item.row_size;
    }
  }
  void set_step(int, const StepKey&) {}
  void set_prepared(const Step* steps, const double*) { prepared = steps; }
};

// Updates n adjacent elements, from element `at` of param and states on; grad points to their gradients, which are
// loaded grad_n at a time. Nothing is stored if found_inf is not 0. It comes from memory and is tested as late as can
// be, so that the loads need not wait for it; load_here() keeps the compiler from testing it at the kernel's start.
template <class Rule, int n, int grad_n, class T, class Step, class Index>
__device__ __forceinline__ void update_elements(const Step& k, T* param, const T* grad,
                                                Compute<T>* const (&state)[Rule::n_state > 0 ? Rule::n_state : 1],
                                                Index at, float found_inf) {
  using F = Compute<T>;
  constexpr int n_state = Rule::n_state, array_size = n_state > 0 ? n_state : 1;
  auto p = Elements<T, n>::load(param + at);
  Elements<T, n> g;
  if constexpr (Rule::reads_grad) g = Elements<T, n>::template load_by<grad_n>(grad);
  Elements<F, n> s[array_size];
  ONEPASS_UNROLL
  for (int j = 0; j < n_state; ++j) s[j] = Elements<F, n>::load(state[j] + at);
  ONEPASS_UNROLL
  for (int e = 0; e < n; ++e) {
    F element_state[array_size];
    ONEPASS_UNROLL
    for (int j = 0; j < n_state; ++j) element_state[j] = s[j].at[e];
    const F gradient = Rule::reads_grad ? decode(g.at[e]) : F(0);
    encode(p.at[e], Rule::template update<F>(k, decode(p.at[e]), gradient, element_state));
    ONEPASS_UNROLL
    for (int j = 0; j < n_state; ++j) s[j].at[e] = element_state[j];
  }
  load_here(found_inf);
  if (found_inf != 0) return;
  p.template store<tuning::state_store>(param + at);
  if constexpr (writes_state<Rule>) {
    ONEPASS_UNROLL
    for (int j = 0; j < n_state; ++j) s[j].template store<tuning::state_store>(state[j] + at);
  }
}

// Where param and states have the elements that a thread's gradients update, one gradient after another. Two divisions
// at the start replace one per gradient, which would take longer than the update.
class RowCursor {
 public:
  // From the gradient with index `first` on, in steps of `step`.
  __device__ RowCursor(const std::int64_t* rows, std::int64_t row_size, std::int64_t first, int step)
      : rows_(rows), row_size_(row_size), row_(first / row_size), row_step_(step / row_size) {
    column_ = first - row_ * row_size;
    column_step_ = step - row_step_ * row_size;
  }
  __device__ std::int64_t index() const { return rows_[row_] * row_size_ + column_; }
  __device__ void advance() {
    row_ += row_step_;
    column_ += column_step_;
    if (column_ < row_size_) return;
    column_ -= row_size_;
    ++row_;
  }

 private:
  const std::int64_t* rows_;
  std::int64_t row_size_, row_, row_step_, column_, column_step_;
};

template <class Rule, class T, bool by_rows>
__global__ void __launch_bounds__(tuning::apply_threads, tuning::apply_blocks_per_sm(sizeof(T), Rule::n_state,
                                                                                     by_rows || many_registers<Rule>))
    apply_kernel(ONEPASS_GRID_CONSTANT(ApplyParams<Rule, T, by_rows>) params) {
  using F = Compute<T>;
  using Params = ApplyParams<Rule, T, by_rows>;
  constexpr int w = width<T>, n_state = Rule::n_state;
  const float found_inf = params.found_inf != nullptr ? *params.found_inf : 0;
  const Chunk chunk = chunk_of(params, params.reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x, params.chunk);
  const int tensor = chunk.tensor, n = chunk.size;
  const std::int64_t offset = chunk.begin;
  const int key = params.step[tensor];
  const typename Params::Step k = params.prepared != nullptr ? params.prepared[key] : params.steps[key];

  const std::int64_t first = by_rows ? 0 : offset;  // element of param and states
  T* const param = static_cast<T*>(params.stream[0][tensor]) + first;
  const T* grad = nullptr;
  if constexpr (Rule::reads_grad) grad = static_cast<const T*>(params.stream[1][tensor]) + offset;
  F* state[n_state > 0 ? n_state : 1] = {};
  bool aligned = is_aligned16(param);
  ONEPASS_UNROLL
  for (int s = 0; s < n_state; ++s) {
    state[s] = static_cast<F*>(params.stream[Params::n_streams - n_state + s][tensor]) + first;
    aligned = aligned && is_aligned16(state[s]);
  }
  if constexpr (by_rows) aligned = aligned && params.row_size[tensor] % w == 0;

  // Updates the elements from `begin` to `end`, `width` adjacent ones per thread and round. Not unrolled: a store may
  // alias the next loads, so unrolling would only take registers.
  const auto update = [&](auto width, auto grad_width, int begin, int end) {
    constexpr int step = tuning::apply_threads * decltype(width)::value;
    int i = begin + int(threadIdx.x) * decltype(width)::value;
    const auto update_at = [&](auto at) {
      update_elements<Rule, decltype(width)::value, decltype(grad_width)::value>(
          k, param, Rule::reads_grad ? grad + i : nullptr, state, at, found_inf);
    };
    if constexpr (by_rows) {
      if (i >= end) return;
      RowCursor cursor(params.rows[tensor], params.row_size[tensor], offset + i, step);
      std::int64_t at = cursor.index();
      ONEPASS_NO_UNROLL
      while (i < end) {
        const std::int64_t now = at;
        cursor.advance();
        if (i + step < end) at = cursor.index();  // loaded together with the elements
        update_at(now);
        i += step;
      }
    } else {
      ONEPASS_NO_UNROLL
      for (; i < end; i += step) update_at(i);
    }
  };
  using One = std::integral_constant<int, 1>;
  using Wide = std::integral_constant<int, w>;
  const int whole = aligned ? n / w * w : 0;
  if (is_aligned16(grad))
    update(Wide{}, Wide{}, 0, whole);
  else  // as in the buckets of DistributedDataParallel, where only gradients are misaligned
    update(Wide{}, One{}, 0, whole);
  update(One{}, One{}, whole, n);
}

// Collects the tensors that its parameter block is for until the block is full, then launches the kernel.
template <class Rule, class F, class Params, auto kernel>
class Launcher {
 public:
  using Step = typename Params::Step;

  explicit Launcher(const Apply& call) : call_(call) {
    static_assert(sizeof(Params) <= tuning::parameter_bytes, "the table must fit the parameter block");
    if (call.workspace != nullptr) params_.set_prepared(prepared_steps<Step>(call), prepared_t(call));
    params_.found_inf = call.device_scaling.found_inf;
    params_.reversed = tuning::reverse_after_norm && call.device_scaling.scaled_norm != nullptr;
    std::int64_t elements = 0;
    for (std::int64_t i = 0; i < call.n_items; ++i)
      if (Params::takes(call.items[i])) elements += call.items[i].size;
    params_.chunk = tuning::apply_chunk(elements, Params::bytes_per_element);
  }

  void run() {
    for (std::int64_t i = 0; i < call_.n_items; ++i)
      if (Params::takes(call_.items[i])) add(call_.items[i], call_.storage != nullptr ? call_.storage + i : nullptr);
    flush();
  }

 private:
  void add(const Item& item, const Storage* storage) {
    if (item.size == 0) return;
    const std::uint64_t chunks = (std::uint64_t(item.size) + params_.chunk - 1) / std::uint64_t(params_.chunk);
    if (params_.n_tensors == Params::capacity || n_chunks_ + chunks > 0x7fffffffu) flush();
    int step = step_of(item.key);
    if (step < 0) {
      flush();
      step = step_of(item.key);
    }
    const int i = params_.n_tensors++;
    params_.set_tensor(i, item, storage);
    params_.size[i] = item.size;
    params_.first_chunk[i] = std::uint32_t(n_chunks_);
    params_.step[i] = step;
    n_chunks_ += chunks;
  }

  // Index of a StepKey's Step in this launch; -1 if the launch already has max_steps others.
  int step_of(int key) {
    if (params_.prepared != nullptr) return key;
    for (int i = n_steps_ - 1; i >= 0; --i)
      if (key_of_[i] == key) return i;
    if (n_steps_ == tuning::max_steps) return -1;
    typename Rule::Hyper hyper;
    double* const value = reinterpret_cast<double*>(&hyper);
    for (int i = 0; i < PrepareParams<Rule>::n_hyper; ++i) value[i] = call_.hyper[i].value;
    const StepKey& k = call_.keys[key];
    const StepContext context{k.t, grad_factor(call_.scaling, call_.grad_scale, call_.norm), k.fresh, k.carried};
    params_.steps[n_steps_] = Rule::template prepare<F>(hyper, context);
    params_.set_step(n_steps_, k);
    key_of_[n_steps_] = key;
    return n_steps_++;
  }

  void flush() {
    if (params_.n_tensors > 0)
      launch("apply", kernel, dim3(unsigned(n_chunks_)), dim3(tuning::apply_threads), 0, call_.where.stream, params_);
    params_.n_tensors = n_steps_ = 0;
    n_chunks_ = 0;
  }

  const Apply& call_;
  Params params_{};
  std::uint64_t n_chunks_ = 0;
  int n_steps_ = 0;
  int key_of_[tuning::max_steps] = {};
};

template <class Rule, class T>
void apply_to(const Apply& call) {
  using F = Compute<T>;
  if (call.workspace != nullptr) launch_prepare<Rule, F>(call);
  if constexpr (has_formats<Rule, T, __nv_bfloat16>) {
    if (call.storage != nullptr)
      return Launcher<Rule, F, StoredParams<Rule, T>, &apply_stored_kernel<Rule, T>>(call).run();
  }
  Launcher<Rule, F, ApplyParams<Rule, T, false>, &apply_kernel<Rule, T, false>>(call).run();
  if constexpr (takes_rows<Rule>)
    Launcher<Rule, F, ApplyParams<Rule, T, true>, &apply_kernel<Rule, T, true>>(call).run();
}

template <class Rule>
void apply(const Apply& call) {
  const DeviceGuard guard(call.where.device);
  with_dtype(call.dtype, [&](auto type) { apply_to<Rule, typename decltype(type)::type>(call); });
}

template <class>
struct ApplyTable;
template <class... Rules>
struct ApplyTable<Variants<Rules...>> {
  static constexpr ApplyFunction functions[] = {&apply<Rules>...};
};

}  // namespace onepass::cuda
