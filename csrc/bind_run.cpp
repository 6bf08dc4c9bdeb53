// The second half of a step: norms over what was gathered, and the launches that write.
#include <algorithm>
#include <cmath>

#include "bind_plan.hpp"
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

double Plan::cpu_total(double norm_type, bool weighted, int max_threads) const {
  const Reduction reduction = reduction_of(norm_type, weighted);
  double total = empty_total(reduction.total);
  std::vector<double> partials;
  std::vector<const void*> data, weights;
  std::vector<std::int64_t> sizes;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    data.clear();
    weights.clear();
    sizes.clear();
    std::int64_t blocks = 0;
    for (const Group& group : groups_)
      for (const Entry& e : group.entries)
        if (!e.cuda && e.dtype == dtype) {
          data.push_back(e.item.grad != nullptr ? e.item.grad : e.item.param);
          weights.push_back(e.item.param);
          sizes.push_back(e.item.size);
          blocks += cpu::reduce_blocks(e.item.size);
        }
    if (data.empty()) continue;
    partials.resize(blocks);
    const py::gil_scoped_release release;
    total = join(reduction.total, total,
                 reduce_function()({reduction, dtype, data.data(), weights.data(), sizes.data(),
                                    static_cast<std::int64_t>(data.size()), partials.data(), max_threads}));
  }
  return total;
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

#if defined(ONEPASS_HAS_CUDA)
std::int64_t Plan::cuda_partials(int device) const {
  std::int64_t n = 0;
  for (const Group& group : groups_)
    for (const Entry& e : group.entries)
      if (e.cuda && e.device == device) n += cuda::reduce_chunks(e.item.size);
  return n;
}

void Plan::cuda_total(double norm_type, bool weighted, int device, std::uintptr_t partials, std::uintptr_t total,
                      std::uintptr_t stream) const {
  const Reduction reduction = reduction_of(norm_type, weighted);
  const cuda::Where where{device, reinterpret_cast<void*>(stream)};
  std::int64_t done = 0;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    std::vector<const void*> data, weights;
    std::vector<std::int64_t> sizes;
    std::int64_t chunks = 0;
    for (const Group& group : groups_)
      for (const Entry& e : group.entries)
        if (e.cuda && e.device == device && e.dtype == dtype) {
          data.push_back(e.item.grad != nullptr ? e.item.grad : e.item.param);
          weights.push_back(e.item.param);
          sizes.push_back(e.item.size);
          chunks += cuda::reduce_chunks(e.item.size);
        }
    if (data.empty()) continue;
    cuda::reduce({reduction, dtype, data.data(), weights.data(), sizes.data(), static_cast<std::int64_t>(data.size()),
                  reinterpret_cast<double*>(partials) + done, where});
    done += chunks;
  }
  cuda::join_partials(reduction.total, reinterpret_cast<double*>(partials), done, reinterpret_cast<double*>(total),
                      where);
}
#else
std::int64_t Plan::cuda_partials(int) const { return 0; }
void Plan::cuda_total(double, bool, int, std::uintptr_t, std::uintptr_t, std::uintptr_t) const {}
#endif

namespace {

// The items of one launch, and the few Uses they share.
struct Lists {
  std::vector<Item> items;
  std::vector<Use> uses;

  void add(Item item, const Use& use, bool unique) {
    std::size_t u = uses.size();
    if (!unique)
      while (u > 0 && !same(uses[u - 1], use)) --u;
    if (u == 0 || unique) {
      uses.push_back(use);
      u = uses.size();
    }
    item.use = static_cast<std::int32_t>(u - 1);
    items.push_back(item);
  }

  static bool same(const Use& a, const Use& b) { return a.t == b.t && a.fresh == b.fresh && a.product == b.product; }
};

}  // namespace

// What the step at hand makes of 0-d states that the host can read.
class Plan::HostScalars {
 public:
  HostScalars(const RuleVariant& rule, const std::vector<Scalar>& hyper) : rule_(rule) {
    for (const Scalar& scalar : hyper) hyper_.push_back(scalar.value);
  }

  Use use_of(const Entry& e) {
    Use use{1, 1, nullptr, nullptr, e.fresh};
    if (e.step.at != nullptr) use.t = e.step.read() + 1;
    if (e.product.at != nullptr) {
      if (use.t != t_) {  // most tensors are in the same step
        t_ = use.t;
        factor_ = rule_.product_factor(hyper_.data(), t_);
      }
      use.product = next_product(e.product.read(), factor_, e.product.is_double);
    }
    return use;
  }

  void advance(const std::vector<const Entry*>& entries) {
    for (const Entry* e : entries) {
      const Use use = use_of(*e);
      if (e->step.at != nullptr) e->step.write(use.t);
      if (e->product.at != nullptr) e->product.write(use.product);
    }
  }

  const double* hyper() const { return hyper_.data(); }

 private:
  const RuleVariant& rule_;
  std::vector<double> hyper_;
  double t_ = 0, factor_ = 1;
};

void Plan::run_cpu(const Group& group, const std::vector<const Entry*>& entries, int max_threads, double factor) const {
  const RuleVariant& rule = rule_variants()[group.options.variant];
  for (const Scalar& scalar : group.options.hyper)
    if (scalar.device != nullptr)
      throw py::value_error("a hyper-parameter in device memory for a parameter on the CPU");
  HostScalars scalars(rule, group.options.hyper);
  Lists lists;
  lists.items.reserve(entries.size());
  const auto flush = [&] {
    if (lists.items.empty()) return;
    const py::gil_scoped_release release;
    rule.cpu[current_isa]({entries[0]->dtype, lists.items.data(), static_cast<std::int64_t>(lists.items.size()),
                           lists.uses.data(), static_cast<int>(lists.uses.size()), scalars.hyper(), factor,
                           max_threads});
    lists.items.clear();
    lists.uses.clear();
  };
  for (const Entry* e : entries) {
    if (e->item.size == 0) continue;
    lists.add(e->item, scalars.use_of(*e), false);
    if (lists.uses.size() == cpu::max_uses) flush();
  }
  flush();
  scalars.advance(entries);
}

#if defined(ONEPASS_HAS_CUDA)
void Plan::run_cuda(const Group& group, const std::vector<const Entry*>& entries, const GradScaling& scaling,
                    double grad_scale, bool scaled_on_device, const py::function& on_device) const {
  const RuleVariant& rule = rule_variants()[group.options.variant];
  bool from_device = scaled_on_device || group.options.device_scalars;
  for (const Scalar& scalar : group.options.hyper) from_device = from_device || scalar.device != nullptr;

  Lists lists;
  HostScalars scalars(rule, group.options.hyper);
  const bool on_gpu = group.options.counts_steps && group.options.device_scalars;
  for (const Entry* e : entries) {
    if (on_gpu)
      lists.add(e->item, {1, 1, static_cast<float*>(e->step.at), static_cast<float*>(e->product.at), e->fresh}, true);
    else
      lists.add(e->item, scalars.use_of(*e), false);
  }
  const int n_uses = static_cast<int>(lists.uses.size());
  const py::tuple device = on_device(entries[0]->device, from_device ? cuda::workspace_bytes(n_uses) : 0);
  const auto address = [&](int i) { return reinterpret_cast<void*>(device[i].cast<std::uintptr_t>()); };
  const DeviceGradScaling device_scaling{static_cast<double*>(address(2)), static_cast<double*>(address(3)),
                                         static_cast<float*>(address(4)), static_cast<float*>(address(5))};
  rule.cuda({entries[0]->dtype,
             lists.items.data(),
             static_cast<std::int64_t>(lists.items.size()),
             lists.uses.data(),
             n_uses,
             group.options.hyper.data(),
             scaling,
             device_scaling,
             grad_scale,
             address(1),
             {entries[0]->device, address(0)}});
  if (!on_gpu) scalars.advance(entries);  // the prepare kernel advances the others
}
#else
void Plan::run_cuda(const Group&, const std::vector<const Entry*>&, const GradScaling&, double, bool,
                    const py::function&) const {
  throw py::value_error("this build of onepass has no CUDA kernels");  // onepass._native says so earlier, with advice
}
#endif

void Plan::run(int max_threads, const std::optional<double>& max_norm, bool normalize, double epsilon, double norm,
               double grad_scale, bool scaled_on_device, const py::function& on_device) {
  has_run_ = true;
  std::vector<const Entry*> same;
  for (const Group& group : groups_) {
    const GradScaling scaling{group.options.maximize, normalize, epsilon, max_norm.has_value(), max_norm.value_or(0)};
    const double factor = grad_factor(scaling, grad_scale, norm);
    for (int occurrence = 0; occurrence < group.occurrences; ++occurrence) {
      // One launch for each device and dtype; few, so a scan for each is cheaper than a map.
      std::vector<const Entry*> left;
      left.reserve(group.entries.size());
      for (const Entry& e : group.entries)
        if (e.occurrence == occurrence) left.push_back(&e);
      while (!left.empty()) {
        const Entry& key = *left[0];
        const auto differs = [&](const Entry* e) {
          return e->device != key.device || e->device_type != key.device_type || e->dtype != key.dtype;
        };
        const auto rest = std::stable_partition(left.begin(), left.end(), [&](const Entry* e) { return !differs(e); });
        same.assign(left.begin(), rest);
        left.erase(left.begin(), rest);
        if (key.cuda)
          run_cuda(group, same, scaling, grad_scale, scaled_on_device, on_device);
        else
          run_cpu(group, same, max_threads, factor);
      }
    }
  }
}

}  // namespace onepass
