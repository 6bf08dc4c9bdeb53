// The first half of a step: find the tensors, check them, note their addresses. Nothing is written here.
#include <algorithm>
#include <unordered_map>

#include "bind/plan.hpp"

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
// slow way. CPython calls the function private: elsewhere, and where it is gone, everyone takes the slow way.
PyObject* lookup_tensor(PyObject* dict, PyObject* tensor) {
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030F0000
  const auto hash = static_cast<Py_hash_t>(reinterpret_cast<std::intptr_t>(tensor));
  PyObject* const value = _PyDict_GetItem_KnownHash(dict, tensor, hash);
  if (value != nullptr) return value;
  PyErr_Clear();
#endif
  return lookup(dict, tensor);
}

// A thousand small tensors lie scattered over more memory than the caches hold. The object's first words lead to the
// tensor proper (in which of the two depends on the torch version); fetching is a hint only, whatever they hold.
void prefetch_tensor(PyObject* object) {
  void* const* const words = reinterpret_cast<void* const*>(object) + sizeof(PyObject) / sizeof(void*);
  for (int word = 0; word < 2; ++word)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(words[word]) + 64 * line);
}

}  // namespace

bool Plan::read_streams(PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states, Entry& entry,
                        bool check_negation) {
  TensorView p, other;
  if (!read(param, p) || !p.is_dense()) return false;
  const DType state_dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  entry.item.param = p.data;
  entry.item.size = p.size;
  entry.item.grad = nullptr;
  if (grad != nullptr) {
    if (!read(grad, other) || !fits(p, other, p.dtype)) return false;
    entry.item.grad = other.data;
  }
  for (std::size_t s = 0; s < n_states; ++s) {
    if (!read(states[s], other) || !fits(p, other, state_dtype)) return false;
    entry.item.state[s] = other.data;
  }
  // A lazily negated view (of the imaginary part of a conjugate) has a stride of 2, which is not dense, unless it has
  // but one element. Asking every tensor would cost as much as reading it.
  if (check_negation && p.size == 1) {
    if (is_negated(param) || (grad != nullptr && is_negated(grad))) return false;
    for (std::size_t s = 0; s < n_states; ++s)
      if (is_negated(states[s])) return false;
  }
  entry.dtype = p.dtype;
  entry.device_type = p.device_type;
  entry.device = p.device;
  entry.cuda = runs_on_cuda(p);
  return entry.cuda || p.device_type == dlpack::cpu;
}

bool Plan::read_scalar(PyObject* object, bool device_scalars, const Entry& entry, ScalarState& out) {
  TensorView s;
  if (!read(object, s) || s.size != 1) return false;
  out = {s.data, s.dtype == DType::float64};
  if (entry.cuda && device_scalars) return s.dtype == DType::float32 && runs_on_cuda(s) && s.device == entry.device;
  return (s.dtype == DType::float32 || s.dtype == DType::float64) && s.device_type == dlpack::cpu;
}

py::list Plan::gather(const GroupArguments& arguments, const py::object& param_list, const py::dict& state,
                      const py::object& fresh, const py::function& mend) {
  const auto& [variant, hyper, counts_steps, device_scalars, maximize] = arguments;
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
  // A copy of the list, kept: Python code that runs meanwhile, here or in another thread, may change the caller's.
  const py::list params = py::reinterpret_steal<py::list>(PySequence_List(param_list.ptr()));
  if (!params) throw py::error_already_set();
  keep(params.ptr());
  py::list missing;
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  group.entries.reserve(n);
  references_.reserve(references_.size() + n * (n_states + 2));
  AddressSet seen(n);
  std::unordered_map<const void*, int> repeats;  // stays empty but for parameters listed twice

  // First the Python objects, then their memory: so that the tensors ahead can be fetched while one is looked at.
  struct Found {
    Py_ssize_t index;
    PyObject *param, *grad, *states[max_states];
    ScalarObjects scalars;
    bool complete;
  };
  constexpr Py_ssize_t ahead = 8;
  std::vector<Found> found;
  found.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + ahead < n && plain(PyList_GET_ITEM(params.ptr(), i + ahead)))
      prefetch_tensor(PyList_GET_ITEM(params.ptr(), i + ahead));
    Found f{i, PyList_GET_ITEM(params.ptr(), i), nullptr, {}, {}, true};
    has_subclasses_ = has_subclasses_ || !plain(f.param);
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
      const auto find = [&](PyObject* name, PyObject*& scalar) {
        scalar = lookup(of_param, name);
        f.complete = scalar != nullptr && scalar != Py_None;
        if (f.complete) keep(scalar);
      };
      if (f.complete && counts_steps) find(step_name, f.scalars.step);
      if (f.complete && rule.product_key != nullptr) find(rule.product_key, f.scalars.product);
      if (!f.complete) {
        f.scalars = {};
        missing.append(i);
      }
    }
    found.push_back(f);
  }

  for (std::size_t i = 0; i < found.size(); ++i) {
    if (i + ahead < found.size()) {
      const Found& next = found[i + ahead];
      for (PyObject* object : {next.param, next.grad, next.scalars.step, next.scalars.product})
        if (object != nullptr && plain(object)) prefetch_tensor(object);
      for (std::size_t s = 0; next.complete && s < n_states; ++s)
        if (plain(next.states[s])) prefetch_tensor(next.states[s]);
    }
    const Found& f = found[i];
    const std::size_t n_known = f.complete ? n_states : 0;
    Entry entry{};
    bool fine = read_streams(f.param, f.grad, f.states, n_known, entry, true);
    if (fine) fine = read_scalars(f.scalars, device_scalars, entry);
    if (!fine) mend_entry(f.index, f.param, f.grad, f.states, n_known, rule, f.scalars, device_scalars, mend, entry);
    if (!f.complete) continue;
    if (!fresh.is_none()) {
      const int found = PySequence_Contains(fresh.ptr(), f.param);
      if (found < 0) throw py::error_already_set();  // the hash of a tensor is Python code, which may be interrupted
      entry.fresh = found == 1;
    }
    if (entry.item.size > 0 && !seen.insert(entry.item.param)) {
      entry.occurrence = ++repeats[entry.item.param];
      group.occurrences = std::max(group.occurrences, entry.occurrence + 1);
    }
    group.entries.push_back(entry);
    updated_.push_back(f.param);
  }
  return missing;
}

void Plan::mend_entry(Py_ssize_t index, PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states,
                      const RuleVariant& rule, const ScalarObjects& scalars, bool device_scalars,
                      const py::function& mend, Entry& entry) {
  const auto or_none = [](PyObject* object) { return object != nullptr ? py::handle(object) : py::handle(Py_None); };
  py::list known;
  for (std::size_t s = 0; s < n_states; ++s) known.append(py::handle(states[s]));
  py::dict of_scalars;
  if (scalars.step != nullptr) of_scalars["step"] = py::handle(scalars.step);
  if (scalars.product != nullptr) of_scalars[rule.product_key] = py::handle(scalars.product);
  const py::list stand_ins = mend(index, py::handle(param), or_none(grad), known, of_scalars);
  const auto scalar_now = [&](PyObject* before, const py::handle& name) {  // it may have been moved to another device
    return before != nullptr ? keep(of_scalars[name].ptr()) : nullptr;
  };
  const ScalarObjects moved{scalar_now(scalars.step, py::str("step")), scalar_now(scalars.product, rule.product_key)};
  std::vector<PyObject*> streams;
  for (const py::handle tensor : stand_ins) streams.push_back(keep(tensor.ptr()));
  const std::size_t first_state = grad != nullptr ? 2 : 1;
  const bool by_rows = streams.size() == first_state + n_states + 1 && rule.takes_rows && grad != nullptr;
  if (streams.size() != first_state + n_states + by_rows)
    throw py::value_error("mend() gave a wrong number of tensors");
  bool fine = read_streams(streams[0], grad != nullptr && !by_rows ? streams[1] : nullptr, streams.data() + first_state,
                           n_states, entry, false) &&
              read_scalars(moved, device_scalars, entry);
  if (fine && by_rows) {
    TensorView values;
    fine = read(streams[1], values) && values.dtype == entry.dtype && values.device_type == entry.device_type &&
           values.device == entry.device;
    const py::tuple rows(stand_ins[first_state + n_states]);
    entry.item.grad = values.data;
    entry.item.size = values.size;
    entry.item.rows = reinterpret_cast<const std::int64_t*>(rows[0].cast<std::uintptr_t>());
    entry.item.row_size = rows[1].cast<std::int64_t>();
  }
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

}  // namespace onepass
