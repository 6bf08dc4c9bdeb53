// The second half of a step: norms of the gathered gradients, and the launches that write. No Python runs here.
#include <algorithm>
#include <cmath>

#include "bind/plan.hpp"
#include "core/reduction.hpp"

namespace onepass {
namespace {

Reduction reduction_of(double norm_type, bool weighted) {
  if (weighted && norm_type != 2) throw py::value_error("a weighted norm is of order 2");
  if (weighted) return {Total::weighted_squares, 2};
  if (norm_type == 2) return {Total::squares, 2};
  if (norm_type == 1) return {Total::magnitudes, 1};
  if (std::isinf(norm_type)) return {norm_type > 0 ? Total::largest : Total::smallest, norm_type};
  return {Total::powers, norm_type};
}

}  // namespace

// ---- totals

// Number of partials of all entries that select() accepts.
template <class Select>
std::int64_t Plan::partials_of(const Engine& engine, const Select& select) const {
  std::int64_t n = 0;
  for (const Group& group : groups_)
    for (const Entry& e : group.entries)
      if (select(e)) n += engine.reduce_partials(e.item.size);
  return n;
}

// Writes these partials, one dtype at a time, and returns their number.
template <class Select>
std::int64_t Plan::reduce(const Engine& engine, const Reduction& reduction, double* partials, const StreamRef& where,
                          const Select& select) const {
  std::vector<const void*> data, weights;
  std::vector<std::int64_t> sizes;
  std::int64_t done = 0;
  for (const DType dtype : all_dtypes) {
    data.clear();
    weights.clear();
    sizes.clear();
    std::int64_t n_partials = 0;
    for (const Group& group : groups_)
      for (const Entry& e : group.entries)
        if (select(e) && e.dtype == dtype) {
          data.push_back(e.item.grad != nullptr ? e.item.grad : e.item.param);
          weights.push_back(e.item.param);
          sizes.push_back(e.item.size);
          n_partials += engine.reduce_partials(e.item.size);
        }
    if (data.empty()) continue;
    engine.reduce({reduction, dtype, data.data(), weights.data(), sizes.data(), static_cast<std::int64_t>(data.size()),
                   partials + done, where});
    done += n_partials;
  }
  return done;
}

double Plan::cpu_total(double norm_type, bool weighted, int max_threads) const {
  const Reduction reduction = reduction_of(norm_type, weighted);
  const py::gil_scoped_release release;
  const Engine& engine = cpu_engine();
  const StreamRef where{max_threads, 0, nullptr};
  const auto on_cpu = [](const Entry& e) { return !e.cuda; };
  std::vector<double> partials(partials_of(engine, on_cpu));
  const std::int64_t n = reduce(engine, reduction, partials.data(), where, on_cpu);
  double total = 0;
  engine.join(reduction.total, partials.data(), n, false, &total, where);
  return total;
}

std::int64_t Plan::cuda_partials(int device) const {
  return partials_of(engine_for(true), [device](const Entry& e) { return e.cuda && e.device == device; });
}

void Plan::cuda_total(double norm_type, bool weighted, bool root, int device, std::uintptr_t partials,
                      std::uintptr_t total, std::uintptr_t stream) const {
  const Reduction reduction = reduction_of(norm_type, weighted);
  const Engine& engine = engine_for(true);
  const StreamRef where{1, device, reinterpret_cast<void*>(stream)};
  auto* const at = reinterpret_cast<double*>(partials);
  const auto there = [device](const Entry& e) { return e.cuda && e.device == device; };
  const std::int64_t n = reduce(engine, reduction, at, where, there);
  engine.join(reduction.total, at, n, root, reinterpret_cast<double*>(total), where);
}

bool Plan::has_cpu() const {
  for (const Group& group : groups_)
    for (const Entry& e : group.entries)
      if (!e.cuda) return true;
  return false;
}

std::vector<int> Plan::cuda_devices() const {
  std::vector<int> devices;
  for (const Group& group : groups_)
    for (const Entry& e : group.entries)
      if (e.cuda && std::find(devices.begin(), devices.end(), e.device) == devices.end()) devices.push_back(e.device);
  return devices;
}

// ---- launches

namespace {

// The items of one launch, and the keys they share.
struct LaunchItems {
  std::vector<Item> items;
  std::vector<Storage> storage;  // as many as items, or none
  std::vector<StepKey> keys;

  // Looks for an equal key among the last few only, as most tensors share one of them. A duplicate just costs a Step.
  void add(Item item, const StepKey& key, bool may_share) {
    const std::size_t n = keys.size(), oldest = n > 16 ? n - 16 : 0;
    std::size_t found = n;
    for (std::size_t k = n; may_share && k > oldest && found == n; --k)
      if (same(keys[k - 1], key)) found = k - 1;
    if (found == n) keys.push_back(key);
    item.key = static_cast<std::int32_t>(found);
    items.push_back(item);
  }

  static bool same(const StepKey& a, const StepKey& b) {
    return a.t == b.t && a.fresh == b.fresh && std::equal(a.carried.at, a.carried.at + max_carried, b.carried.at);
  }
};

}  // namespace

// The 0-d states that the host can read, in the current step.
class Plan::HostScalars {
 public:
  HostScalars(const RuleVariant& rule, const std::vector<Scalar>& hyper) : rule_(rule) {
    for (const Scalar& scalar : hyper) hyper_.push_back(scalar.value);
  }

  StepKey key_of(const Entry& e) {
    StepKey key{1, {}, nullptr, {}, e.fresh};
    if (e.step.at != nullptr) key.t = e.step.read() + 1;
    if (e.carried[0].at != nullptr) {
      carry(e, key.t);
      key.carried = now_;
    }
    return key;
  }

  void advance(const std::vector<const Entry*>& entries) {
    for (const Entry* e : entries) {
      const double t = key_of(*e).t;
      if (e->step.at != nullptr) e->step.write(t);
      for (int i = 0; i < max_carried && e->carried[i].at != nullptr; ++i) e->carried[i].write(next_.at[i]);
    }
  }

 private:
  // Computes now_ and next_ for an entry in step t, unless they are those of the last one, as they mostly are.
  void carry(const Entry& e, double t) {
    CarriedNumbers stored{};
    for (int i = 0; i < max_carried && e.carried[i].at != nullptr; ++i) stored.at[i] = e.carried[i].read();
    const bool is_double = e.carried[0].is_double;
    if (t == t_ && is_double == is_double_ && std::equal(stored.at, stored.at + max_carried, stored_.at)) return;
    t_ = t;
    is_double_ = is_double;
    now_ = stored_ = stored;
    rule_.carry(hyper_.data(), t, is_double, now_, next_);
  }

  const RuleVariant& rule_;
  std::vector<double> hyper_;
  double t_ = 0;  // of the numbers below
  bool is_double_ = false;
  CarriedNumbers stored_{}, now_{}, next_{};
};

// Shared by the launches of one run.
struct Plan::RunContext {
  int max_threads;
  GradScaling scaling;  // launch() sets `maximize`, which is an option of the group
  double grad_scale, norm;
  const std::map<int, DeviceArguments>& devices;
  std::map<int, std::int64_t> used = {};  // bytes used of each device's workspace
  std::vector<char> host_workspace = {};

  template <class T>
  static T* address(const DeviceArguments& device, int i) {
    return reinterpret_cast<T*>(device[i]);
  }
};

std::int64_t Plan::cuda_workspace(int device) const {
  std::int64_t bytes = 0;
  for (const Group& group : groups_)
    for (const Entry& e : group.entries)
      if (e.cuda && e.device == device) bytes += apply_workspace(1);
  return bytes;
}

// Updates tensors of one device and dtype, all of them stored or none.
void Plan::launch(const Group& group, const std::vector<const Entry*>& entries, RunContext& run) const {
  const GroupOptions& options = group.options;
  const RuleVariant& rule = rule_variants()[options.variant];
  const Entry& first = *entries[0];
  const bool reads_device = std::any_of(options.hyper.begin(), options.hyper.end(),
                                        [](const Scalar& scalar) { return scalar.device != nullptr; });
  if (reads_device && !first.cuda)
    throw std::invalid_argument("a hyper-parameter in device memory for a parameter on the CPU");

  HostScalars scalars(rule, options.hyper);
  const bool on_device = first.cuda && options.counts_steps && options.device_scalars;
  LaunchItems list;
  list.items.reserve(entries.size());
  for (const Entry* e : entries) {
    if (e->item.size == 0 && !first.cuda) continue;  // on CUDA the launch also writes the norm
    if (e->stored) list.storage.push_back(e->storage);
    if (on_device)
      list.add(e->item,
               {1,
                {},
                static_cast<float*>(e->step.at),
                {static_cast<float*>(e->carried[0].at), static_cast<float*>(e->carried[1].at)},
                e->fresh},
               false);
    else
      list.add(e->item, scalars.key_of(*e), true);
  }
  const int n_keys = static_cast<int>(list.keys.size());
  Apply call{first.dtype,
             list.items.data(),
             static_cast<std::int64_t>(list.items.size()),
             list.keys.data(),
             n_keys,
             options.hyper.data(),
             run.scaling,
             run.grad_scale,
             run.norm,
             {},
             nullptr,
             {run.max_threads, 0, nullptr},
             first.stored ? list.storage.data() : nullptr};
  call.scaling.maximize = options.maximize;
  if (first.cuda) {
    const DeviceArguments& device = run.devices.at(first.device);
    call.device_scaling = {RunContext::address<double>(device, 2), RunContext::address<double>(device, 3),
                           RunContext::address<float>(device, 4), RunContext::address<float>(device, 5)};
    call.norm = 0;
    call.where = {1, first.device, RunContext::address<void>(device, 0)};
    const bool scaled_on_device =
        call.device_scaling.scaled_norm != nullptr || call.device_scaling.grad_scale != nullptr;
    if (scaled_on_device || options.device_scalars || reads_device) {
      std::int64_t& used = run.used[first.device];
      call.workspace = RunContext::address<char>(device, 1) + used;
      used += apply_workspace(n_keys);
    }
  } else {
    run.host_workspace.resize(apply_workspace(n_keys));
    call.workspace = run.host_workspace.data();
  }
  if (call.n_items > 0) (first.cuda ? rule.cuda : rule.cpu[current_isa])(call);
  if (!on_device) scalars.advance(entries);  // otherwise the prepare kernel does
}

void Plan::run(int max_threads, const ClipArguments& clip, double grad_scale, double norm,
               const std::map<int, DeviceArguments>& devices) {
  has_run_ = true;
  const auto& [max_norm, normalize, epsilon] = clip;
  RunContext run{
      max_threads, {false, normalize, epsilon, max_norm.has_value(), max_norm.value_or(0)}, grad_scale, norm, devices};
  const py::gil_scoped_release release;
  std::vector<const Entry*> same;
  for (const Group& group : groups_) {
    for (int occurrence = 0; occurrence < group.occurrences; ++occurrence) {
      // One launch per device and dtype. There are few, so a scan per launch is cheaper than a map.
      std::vector<const Entry*> left;
      left.reserve(group.entries.size());
      for (const Entry& e : group.entries)
        if (e.occurrence == occurrence) left.push_back(&e);
      while (!left.empty()) {
        const Entry& key = *left[0];
        const auto rest = std::stable_partition(left.begin(), left.end(), [&](const Entry* e) {
          return e->device == key.device && e->device_type == key.device_type && e->dtype == key.dtype &&
                 e->stored == key.stored;
        });
        same.assign(left.begin(), rest);
        left.erase(left.begin(), rest);
        launch(group, same, run);
      }
    }
  }
}

}  // namespace onepass
