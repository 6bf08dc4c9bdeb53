// The CPU engine of the update rules: a list of tensors is one flat range of elements, divided equally among the
// threads.
#pragma once
#include "core/grad_factor.hpp"
#include "core/rule.hpp"
#include "cpu/pack.hpp"
#include "cpu/partition.hpp"
#include "cpu/storage.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

// Updates elements [i, i + count) of a tensor.
template <bool whole, class Rule, class T, class Step>
static inline __attribute__((always_inline)) void update_pack(const Item& item, std::int64_t i, int count,
                                                              const Step& k) {
  using F = Compute<T>;
  T* const param = static_cast<T*>(item.param) + i;
  // Hardware prefetchers follow loads, not stores: without this a pure copy takes 1.35 times as long. (The loads below
  // would do, but the compiler removes those that the rule does not use.)
  if constexpr (whole && overwrites<Rule>) {
    __builtin_prefetch(param, 1);
    if constexpr (writes_state<Rule>)
      for (int s = 0; s < Rule::n_state; ++s) __builtin_prefetch(static_cast<F*>(item.state[s]) + i, 1);
  }
  Reg<F> grad{}, state[Rule::n_state > 0 ? Rule::n_state : 1];
  const Reg<F> p = load<whole>(param, count);
  if constexpr (Rule::reads_grad) grad = load<whole>(static_cast<const T*>(item.grad) + i, count);
  for (int s = 0; s < Rule::n_state; ++s) state[s] = load<whole>(static_cast<F*>(item.state[s]) + i, count);
  store<whole>(param, Rule::template update<F>(k, p, grad, state), count);
  if constexpr (writes_state<Rule>)
    for (int s = 0; s < Rule::n_state; ++s) store<whole>(static_cast<F*>(item.state[s]) + i, state[s], count);
}

// Takes the item by value, so that its addresses stay in registers whatever the stores may alias.
template <class Rule, class T, class Step>
static void update_range(const Item item, std::int64_t begin, std::int64_t end, const Step k) {
  constexpr int width = lanes<Compute<T>>;
  std::int64_t i = begin;
#pragma GCC unroll 2
  for (; i + width <= end; i += width) update_pack<true, Rule, T>(item, i, width, k);
  if (i < end) update_pack<false, Rule, T>(item, i, static_cast<int>(end - i), k);
}

// For a sparse gradient: updates the rows, or parts of rows, that values [begin, end) belong to. Each is updated like a
// tensor whose param and states start at the row in the table.
template <class Rule, class T, class Step>
static void update_rows(const Item& item, std::int64_t begin, std::int64_t end, const Step& k) {
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t row = i / item.row_size, row_end = (row + 1) * item.row_size;
    const std::int64_t shift = (item.rows[row] - row) * item.row_size;
    Item part = item;
    part.param = static_cast<T*>(item.param) + shift;
    for (int s = 0; s < Rule::n_state; ++s) part.state[s] = static_cast<Compute<T>*>(item.state[s]) + shift;
    update_range<Rule, T>(part, i, row_end < end ? row_end : end, k);
    i = row_end;
  }
}

// For states and parameters in other formats: a tile of elements at a time is loaded as floats, updated and stored.
// begin is a multiple of scale_group; t is the number of the step.
template <class Rule, class T, class Step>
static void update_stored(const Item& item, const Storage& storage, std::int64_t begin, std::int64_t end, const Step& k,
                          double t) {
  constexpr std::int64_t tile = 8 * scale_group;  // in the first-level cache with everything else
  constexpr bool is_bfloat16 = same_type<T, bfloat16>;
  alignas(64) float states[Rule::n_state > 0 ? Rule::n_state : 1][tile];
  for (std::int64_t i = begin; i < end; i += tile) {
    const std::int64_t count = end - i < tile ? end - i : tile;
    Item part = item;
    part.param = static_cast<T*>(item.param) + i;
    part.grad = static_cast<const T*>(item.grad) + i;
    for (int s = 0; s < Rule::n_state; ++s) {
      if (storage.state[s] == StateFormat::full) {
        part.state[s] = static_cast<float*>(item.state[s]) + i;
      } else {
        part.state[s] = states[s];
        decode_state(storage.state[s], item.state[s], storage.scale[s], i, count, states[s]);
      }
    }
    if (storage.param == ParamFormat::plain) {
      update_range<Rule, T>(part, 0, count, k);
    } else if constexpr (is_bfloat16) {
      alignas(64) float param[tile], grad[tile];
      decode_param(storage, item.param, i, count, param);
      decode_bfloat16(item.grad, i, count, grad);
      part.param = param;
      part.grad = grad;
      update_range<Rule, float>(part, 0, count, k);
      encode_param(storage, param, i, count, storage::dither_start(t, max_states), item.param);
    }
    for (int s = 0; s < Rule::n_state; ++s)
      if (storage.state[s] != StateFormat::full)
        encode_state(storage.state[s], states[s], i, count, storage::dither_start(t, s), item.state[s],
                     storage.scale[s]);
  }
}

template <class Rule, class T>
struct ApplyJob {
  using Step = typename Rule::template Step<Compute<T>>;
  static constexpr std::int64_t bytes_per_element =
      (Rule::reads_grad ? 3 : 2) * sizeof(T) + (writes_state<Rule> ? 2 : 1) * Rule::n_state * sizeof(Compute<T>);

  const Apply& call;
  std::int64_t total;
  const Step* steps;  // one per key

  // The end of a thread's part of an item, where it may not divide a group of elements that share a scale.
  static std::int64_t whole_groups(std::int64_t end, const Item& item) {
    const std::int64_t rounded = scale_groups(end) * scale_group;
    return rounded < item.size ? rounded : item.size;
  }

  static void body(void* context, int thread, int n_threads) {
    const ApplyJob& job = *static_cast<ApplyJob*>(context);
    std::int64_t begin, end;
    part_of(job.total, 64, thread, n_threads, begin, end);
    std::int64_t first = 0;  // flat index of the item's first element
    for (const Item* item = job.call.items; first < end; first += item->size, ++item) {
      const std::int64_t from = begin > first ? begin - first : 0;
      const std::int64_t to = end - first < item->size ? end - first : item->size;
      if (from >= to) continue;
      if constexpr (has_formats<Rule, T, bfloat16>) {
        if (job.call.storage != nullptr) {
          update_stored<Rule, T>(*item, job.call.storage[item - job.call.items], whole_groups(from, *item),
                                 whole_groups(to, *item), job.steps[item->key], job.call.keys[item->key].t);
          continue;
        }
      }
      if (takes_rows<Rule> && item->rows != nullptr)
        update_rows<Rule, T>(*item, from, to, job.steps[item->key]);
      else
        update_range<Rule, T>(*item, from, to, job.steps[item->key]);
    }
  }

  static void run(const Apply& call) {
    typename Rule::Hyper hyper;
    static_assert(sizeof hyper % sizeof(double) == 0, "hyper-parameters are doubles");
    static_assert(sizeof(Step) <= max_step_bytes, "raise max_step_bytes");
    double* const value = reinterpret_cast<double*>(&hyper);
    for (unsigned i = 0; i < sizeof hyper / sizeof(double); ++i) value[i] = call.hyper[i].value;
    Step* const steps = static_cast<Step*>(call.workspace);
    const double factor = grad_factor(call.scaling, call.grad_scale, call.norm);
    for (int k = 0; k < call.n_keys; ++k) {
      const StepContext context{call.keys[k].t, factor, call.keys[k].fresh, call.keys[k].carried};
      steps[k] = Rule::template prepare<Compute<T>>(hyper, context);
    }
    ApplyJob job{call, 0, steps};
    for (std::int64_t i = 0; i < call.n_items; ++i) job.total += call.items[i].size;
    run_parallel(threads_for(job.total * bytes_per_element, call.where.max_threads), &body, &job);
  }
};

template <class Rule>
static void apply(const Apply& call) {
  with_dtype(call.dtype, [&](auto type) { ApplyJob<Rule, typename decltype(type)::type>::run(call); });
}

// The functions of a rule's variants, in their order; the binding picks one.
template <class>
struct ApplyTable;
template <class... Rules>
struct ApplyTable<Variants<Rules...>> {
  static constexpr ApplyFunction functions[] = {&apply<Rules>...};
};

}  // namespace onepass::cpu::ONEPASS_ISA
