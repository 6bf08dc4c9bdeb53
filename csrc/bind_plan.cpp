#include "bind_plan.hpp"

#include <algorithm>
#include <cmath>

#include "core/reduction.hpp"

namespace onepass {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// dict[key], borrowed; null if absent.
PyObject* lookup(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// The same for a tensor as key. A tensor's hash is its address, but asking for it runs a Python function that costs
// more than everything else this file does for a parameter; hence the lookup by known hash. A miss is asked again the
// slow way.
PyObject* lookup_tensor(PyObject* dict, PyObject* tensor) {
  const auto hash = static_cast<Py_hash_t>(reinterpret_cast<std::intptr_t>(tensor));
  PyObject* const value = _PyDict_GetItem_KnownHash(dict, tensor, hash);
  if (value != nullptr) return value;
  PyErr_Clear();
  return lookup(dict, tensor);
}

// A thousand small tensors lie scattered over more memory than the caches hold. The object's first words lead to the
// tensor proper (in which of the two depends on the torch version); fetching both is a hint only, it never faults.
void prefetch_tensor(PyObject* object) {
  void* const* const words = reinterpret_cast<void* const*>(object) + sizeof(PyObject) / sizeof(void*);
  for (int word = 0; word < 2; ++word)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(words[word]) + 64 * line);
}

}  // namespace

bool Plan::is_negated(PyObject* tensor) const {
  static PyObject* const method = interned("is_neg");
  PyObject* const answer = PyObject_CallMethodNoArgs(tensor, method);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

bool Plan::read_streams(PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states, Entry& entry,
                        bool check_negation) const {
  TensorView p, other;
  if (!read(param, p) || !p.is_dense()) return false;
  const DType state_dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  entry.item.param = p.data;
  entry.item.size = p.size;
  entry.item.grad = nullptr;
  if (grad != nullptr) {
    if (!read(grad, other) || !fits(p, other, p.dtype)) return false;
    entry.item.grad = other.data;
    // A lazily negated view (of the imaginary part of a conjugate) has a stride of 2, which fits nothing here, unless
    // it has but one element. Asking every tensor would cost as much as all else together.
    if (check_negation && other.size == 1 && is_negated(grad)) return false;
  }
  for (std::size_t s = 0; s < n_states; ++s) {
    if (!read(states[s], other) || !fits(p, other, state_dtype)) return false;
    entry.item.state[s] = other.data;
  }
  entry.dtype = p.dtype;
  entry.device_type = p.device_type;
  entry.device = p.device;
  entry.cuda = runs_on_cuda(p);
  return entry.cuda || p.device_type == dlpack::cpu;
}

bool Plan::read_step(PyObject* step, bool device_scalars, Entry& entry) const {
  TensorView s;
  if (!read(step, s) || s.size != 1) return false;
  entry.step = s.data;
  entry.step_is_double = s.dtype == DType::float64;
  if (entry.cuda && device_scalars) return s.dtype == DType::float32 && runs_on_cuda(s) && s.device == entry.device;
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && s.device_type == dlpack::cpu;
}

py::list Plan::gather(int variant, const py::list& params, const py::dict& state, const py::tuple& hyper,
                      bool counts_steps, bool device_scalars, bool maximize, const py::object& fresh,
                      const py::function& mend) {
  static PyObject* const grad_name = interned("grad");
  static PyObject* const step_name = interned("step");
  const RuleVariant& rule = rule_variants().at(variant);
  const std::size_t n_states = rule.state_names.size();

  Group& group = groups_.emplace_back();
  group.options = {variant, {}, counts_steps, device_scalars, maximize};
  for (const py::handle value : hyper) {
    Scalar scalar{0, nullptr, DType::float64};
    TensorView view;
    if (PyFloat_Check(value.ptr()))
      scalar.value = PyFloat_AS_DOUBLE(value.ptr());
    else if (read(value.ptr(), view) && (view.dtype == DType::float32 || view.dtype == DType::float64))
      scalar = {0, view.data, view.dtype}, keep(value.ptr());
    else
      throw py::type_error("a hyper-parameter must be a float, or a float32 or float64 tensor in device memory");
    group.options.hyper.push_back(scalar);
  }
  py::list missing;
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  group.entries.reserve(n);
  references_.reserve(references_.size() + n * (n_states + 2));
  AddressSet seen(n);
  std::unordered_map<const void*, int> repeats;  // stays empty but for parameters listed twice

  // First the Python objects, then their memory: so that the tensors ahead can be fetched while one is looked at.
  struct Found {
    Py_ssize_t index;
    PyObject *param, *grad, *step, *states[max_states];
    bool complete;
  };
  constexpr Py_ssize_t ahead = 8;
  std::vector<Found> found;
  found.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + ahead < n) prefetch_tensor(PyList_GET_ITEM(params.ptr(), i + ahead));
    Found f{i, PyList_GET_ITEM(params.ptr(), i), nullptr, nullptr, {}, true};
    if (rule.reads_grad) {
      f.grad = PyObject_GetAttr(f.param, grad_name);
      if (f.grad == nullptr) throw py::error_already_set();
      references_.push_back(f.grad);
      if (f.grad == Py_None) continue;
    }
    if (n_states > 0 || counts_steps) {
      PyObject* const of_param = lookup_tensor(state.ptr(), f.param);
      f.complete = of_param != nullptr && PyDict_Check(of_param);
      for (std::size_t s = 0; f.complete && s < n_states; ++s) {
        f.states[s] = lookup(of_param, rule.state_keys[s]);
        f.complete = f.states[s] != nullptr && f.states[s] != Py_None;
        if (f.complete) keep(f.states[s]);
      }
      if (f.complete && counts_steps) {
        f.step = lookup(of_param, step_name);
        f.complete = f.step != nullptr;
        if (f.complete) keep(f.step);
      }
      if (!f.complete) {
        f.step = nullptr;
        missing.append(i);
      }
    }
    found.push_back(f);
  }

  for (std::size_t i = 0; i < found.size(); ++i) {
    if (i + ahead < found.size()) {
      const Found& next = found[i + ahead];
      prefetch_tensor(next.param);
      if (next.grad != nullptr) prefetch_tensor(next.grad);
      if (next.step != nullptr) prefetch_tensor(next.step);
      for (std::size_t s = 0; next.complete && s < n_states; ++s) prefetch_tensor(next.states[s]);
    }
    const Found& f = found[i];
    const std::size_t n_known = f.complete ? n_states : 0;
    Entry entry{};
    bool fine = read_streams(f.param, f.grad, f.states, n_known, entry, true);
    if (fine && f.step != nullptr) fine = read_step(f.step, device_scalars, entry);
    if (!fine) mend_entry(f.index, f.param, f.grad, f.states, n_known, f.step, device_scalars, mend, entry);
    if (!f.complete) continue;
    entry.fresh = !fresh.is_none() && PySequence_Contains(fresh.ptr(), f.param) == 1;
    if (entry.item.size > 0 && !seen.insert(entry.item.param)) {
      entry.occurrence = ++repeats[entry.item.param];
      entry.fresh = false;
      group.occurrences = std::max(group.occurrences, entry.occurrence + 1);
    }
    group.entries.push_back(entry);
    updated_.push_back(f.param);
  }
  return missing;
}

void Plan::mend_entry(Py_ssize_t index, PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states,
                      PyObject* step, bool device_scalars, const py::function& mend, Entry& entry) {
  const auto or_none = [](PyObject* object) { return object != nullptr ? py::handle(object) : py::handle(Py_None); };
  py::list known;
  for (std::size_t s = 0; s < n_states; ++s) known.append(py::handle(states[s]));
  const py::list stand_ins = mend(index, py::handle(param), or_none(grad), known, or_none(step));
  std::vector<PyObject*> streams;
  for (const py::handle tensor : stand_ins) streams.push_back(keep(tensor.ptr()));
  const std::size_t first_state = grad != nullptr ? 2 : 1;
  if (streams.size() != first_state + n_states) throw py::value_error("mend() gave a wrong number of tensors");
  const bool fine = read_streams(streams[0], grad != nullptr ? streams[1] : nullptr, streams.data() + first_state,
                                 n_states, entry, false) &&
                    (step == nullptr || read_step(step, device_scalars, entry));
  if (!fine) throw py::value_error("parameter " + std::to_string(index) + " is of a kind that no kernel can update");
}

py::list Plan::updated() const {
  py::list out(updated_.size());
  for (std::size_t i = 0; i < updated_.size(); ++i) {
    Py_INCREF(updated_[i]);
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), updated_[i]);
  }
  return out;
}

namespace {

Reduction reduction_of(double norm_type) {
  if (norm_type == 2) return {Total::squares, 2};
  if (norm_type == 1) return {Total::magnitudes, 1};
  if (std::isinf(norm_type)) return {norm_type > 0 ? Total::largest : Total::smallest, norm_type};
  return {Total::powers, norm_type};
}

}  // namespace

double Plan::cpu_total(double norm_type, int max_threads) const {
  const Reduction reduction = reduction_of(norm_type);
  double total = empty_total(reduction.total);
  std::vector<double> partials;
  std::vector<const void*> data;
  std::vector<std::int64_t> sizes;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    data.clear();
    sizes.clear();
    std::int64_t blocks = 0;
    for (const Group& group : groups_)
      for (const Entry& e : group.entries)
        if (!e.cuda && e.dtype == dtype) {
          data.push_back(e.item.grad != nullptr ? e.item.grad : e.item.param);
          sizes.push_back(e.item.size);
          blocks += cpu::reduce_blocks(e.item.size);
        }
    if (data.empty()) continue;
    partials.resize(blocks);
    const py::gil_scoped_release release;
    total = join(reduction.total, total,
                 reduce_function()({reduction, dtype, data.data(), sizes.data(), static_cast<std::int64_t>(data.size()),
                                    partials.data(), max_threads}));
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

void Plan::cuda_total(double norm_type, int device, std::uintptr_t partials, std::uintptr_t total,
                      std::uintptr_t stream) const {
  const Reduction reduction = reduction_of(norm_type);
  const cuda::Where where{device, reinterpret_cast<void*>(stream)};
  std::int64_t done = 0;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    std::vector<const void*> data;
    std::vector<std::int64_t> sizes;
    std::int64_t chunks = 0;
    for (const Group& group : groups_)
      for (const Entry& e : group.entries)
        if (e.cuda && e.device == device && e.dtype == dtype) {
          data.push_back(e.item.grad != nullptr ? e.item.grad : e.item.param);
          sizes.push_back(e.item.size);
          chunks += cuda::reduce_chunks(e.item.size);
        }
    if (data.empty()) continue;
    cuda::reduce({reduction, dtype, data.data(), sizes.data(), static_cast<std::int64_t>(data.size()),
                  reinterpret_cast<double*>(partials) + done, where});
    done += chunks;
  }
  cuda::join_partials(reduction.total, reinterpret_cast<double*>(partials), done, reinterpret_cast<double*>(total),
                      where);
}
#else
std::int64_t Plan::cuda_partials(int) const { return 0; }
void Plan::cuda_total(double, int, std::uintptr_t, std::uintptr_t, std::uintptr_t) const {}
#endif

namespace {

// The items of one launch, and the few Uses they share.
struct Lists {
  std::vector<Item> items;
  std::vector<Use> uses;

  void add(Item item, const Use& use, bool unique) {
    std::size_t u = uses.size();
    if (!unique)
      while (u > 0 && !(uses[u - 1].t == use.t && uses[u - 1].fresh == use.fresh)) --u;
    if (u == 0 || unique) {
      uses.push_back(use);
      u = uses.size();
    }
    item.use = static_cast<std::int32_t>(u - 1);
    items.push_back(item);
  }
};

}  // namespace

void Plan::run_cpu(const Group& group, const std::vector<const Entry*>& entries, int max_threads, double factor) const {
  const RuleVariant& rule = rule_variants()[group.options.variant];
  std::vector<double> hyper;
  for (const Scalar& scalar : group.options.hyper) {
    if (scalar.device != nullptr)
      throw py::value_error("a hyper-parameter in device memory for a parameter on the CPU");
    hyper.push_back(scalar.value);
  }
  Lists lists;
  lists.items.reserve(entries.size());
  const auto flush = [&] {
    if (lists.items.empty()) return;
    const py::gil_scoped_release release;
    rule.cpu[current_isa]({entries[0]->dtype, lists.items.data(), static_cast<std::int64_t>(lists.items.size()),
                           lists.uses.data(), static_cast<int>(lists.uses.size()), hyper.data(), factor, max_threads});
    lists.items.clear();
    lists.uses.clear();
  };
  for (const Entry* e : entries) {
    double t = 1;
    if (e->step != nullptr) {
      t = 1 + (e->step_is_double ? *static_cast<double*>(e->step) : double(*static_cast<float*>(e->step)));
      if (e->step_is_double)
        *static_cast<double*>(e->step) = t;
      else
        *static_cast<float*>(e->step) = float(t);
    }
    if (e->item.size == 0) continue;
    lists.add(e->item, {t, nullptr, e->fresh}, false);
    if (lists.uses.size() == cpu::max_uses) flush();
  }
  flush();
}

#if defined(ONEPASS_HAS_CUDA)
void Plan::run_cuda(const Group& group, const std::vector<const Entry*>& entries, const GradScaling& scaling,
                    double grad_scale, bool scaled_on_device, const py::function& on_device) const {
  const RuleVariant& rule = rule_variants()[group.options.variant];
  bool from_device = scaled_on_device || group.options.device_scalars;
  for (const Scalar& scalar : group.options.hyper) from_device = from_device || scalar.device != nullptr;

  Lists lists;
  const bool device_step = group.options.counts_steps && group.options.device_scalars;
  for (const Entry* e : entries) {
    Use use{1, nullptr, e->fresh};
    if (device_step) {
      use.device_step = static_cast<float*>(e->step);
    } else if (e->step != nullptr) {
      use.t = 1 + (e->step_is_double ? *static_cast<double*>(e->step) : double(*static_cast<float*>(e->step)));
      if (e->step_is_double)
        *static_cast<double*>(e->step) = use.t;
      else
        *static_cast<float*>(e->step) = float(use.t);
    }
    lists.add(e->item, use, device_step);
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
}
#else
void Plan::run_cuda(const Group&, const std::vector<const Entry*>&, const GradScaling&, double, bool,
                    const py::function&) const {
  throw py::value_error("this build of onepass has no CUDA kernels");  // onepass._native says so earlier, with advice
}
#endif

void Plan::run(int max_threads, double max_norm, bool normalize, double norm, double grad_scale, bool scaled_on_device,
               const py::function& on_device) {
  std::vector<const Entry*> same;
  for (const Group& group : groups_) {
    const GradScaling scaling{group.options.maximize, normalize, max_norm};
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
