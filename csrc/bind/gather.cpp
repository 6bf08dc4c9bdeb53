// The first half of a step: find the tensors, check them, record their addresses. Nothing is written here.
#include <algorithm>
#include <unordered_map>

#include "bind/plan.hpp"

namespace onepass {
namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// dict[key] as a borrowed reference; null if absent.
PyObject* lookup(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// The same with a tensor as key. A tensor's hash is its address, but computing it calls a Python function, which costs
// more than everything else this file does for a parameter; hence the lookup by known hash. After a miss the usual
// lookup decides. CPython considers the function private; without it, the usual lookup does all the work.
PyObject* lookup_tensor(PyObject* dict, PyObject* tensor) {
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030F0000
  const auto hash = static_cast<Py_hash_t>(reinterpret_cast<std::intptr_t>(tensor));
  PyObject* const value = _PyDict_GetItem_KnownHash(dict, tensor, hash);
  if (value != nullptr) return value;
  PyErr_Clear();
#endif
  return lookup(dict, tensor);
}

// A thousand small tensors are scattered over more memory than the caches hold. One of the first two words of the
// object (which one depends on the torch version) points to the C++ tensor. A prefetch is only a hint, so any word is
// safe.
void prefetch_tensor(PyObject* object) {
  void* const* const words = reinterpret_cast<void* const*>(object) + sizeof(PyObject) / sizeof(void*);
  for (int word = 0; word < 2; ++word)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(words[word]) + 64 * line);
}

}  // namespace

namespace {

Formats formats_named(const std::vector<std::string>& states, const std::string& param) {
  static const std::map<std::string, StateFormat> state_formats = {{"full", StateFormat::full},
                                                                   {"bfloat16", StateFormat::bfloat16},
                                                                   {"signed8", StateFormat::signed8},
                                                                   {"unsigned8", StateFormat::unsigned8}};
  static const std::map<std::string, ParamFormat> param_formats = {{"plain", ParamFormat::plain},
                                                                   {"stochastic", ParamFormat::stochastic},
                                                                   {"remainder16", ParamFormat::remainder16},
                                                                   {"remainder8", ParamFormat::remainder8}};
  Formats out{{}, param_formats.at(param), 0, param == "plain"};
  for (const std::string& name : states) {
    const StateFormat format = out.states.emplace_back(state_formats.at(name));
    out.n_entries += is_8bit(format) ? 2 : 1;
    out.usual = out.usual && format == StateFormat::full;
  }
  out.n_entries += out.param == ParamFormat::remainder16 || out.param == ParamFormat::remainder8;
  return out;
}

}  // namespace

// The states and the remainders, some of which are not in the dtype of arithmetic.
bool Plan::read_stored(const TensorView& param, PyObject* const* states, const Formats& formats, Entry& entry) {
  if (compute_dtype(param.dtype) != DType::float32) return false;
  TensorView view;
  const auto read_integers = [&](PyObject* tensor, Integers expected) {
    const bool readable = is_exact_tensor(tensor) && reader_.read(tensor, expected, view, layouts_);
    view.dtype = param.dtype;
    return readable && matches(param, view, param.dtype);
  };
  for (std::size_t s = 0; s < formats.states.size(); ++s) {
    const StateFormat format = formats.states[s];
    if (is_8bit(format)) {
      if (!read_integers(*states++, Integers::uint8)) return false;
      TensorView scales;
      if (!read(*states++, scales) || scales.dtype != DType::float32 || scales.device_type != param.device_type ||
          scales.device != param.device || scales.size != scale_groups(param.size) || !scales.is_contiguous())
        return false;
      entry.storage.scale[s] = reinterpret_cast<float*>(scales.data);
    } else {
      const DType dtype = format == StateFormat::bfloat16 ? DType::bfloat16 : DType::float32;
      if (!read(*states++, view) || !matches(param, view, dtype)) return false;
    }
    entry.item.state[s] = view.data;
    entry.storage.state[s] = format;
  }
  if (formats.param != ParamFormat::plain && param.dtype != DType::bfloat16) return false;
  if (formats.param == ParamFormat::remainder16 || formats.param == ParamFormat::remainder8) {
    const bool is_long = formats.param == ParamFormat::remainder16;
    if (!read_integers(*states, is_long ? Integers::int16 : Integers::int8)) return false;
    entry.storage.remainder = view.data;
  }
  entry.storage.param = formats.param;
  entry.stored = true;
  return true;
}

bool Plan::read_tensors(PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states,
                        const Formats& formats, Entry& entry, bool check_negation) {
  TensorView p, other;
  if (!read(param, p) || !p.is_dense()) return false;
  const DType state_dtype = compute_dtype(p.dtype);
  entry.item.param = p.data;
  entry.item.size = p.size;
  entry.item.grad = nullptr;
  if (grad != nullptr) {
    if (!read(grad, other) || !matches(p, other, p.dtype)) return false;
    entry.item.grad = other.data;
  }
  if (formats.usual) {
    for (std::size_t s = 0; s < n_states; ++s) {
      if (!read(states[s], other) || !matches(p, other, state_dtype)) return false;
      entry.item.state[s] = other.data;
    }
  } else if (n_states == formats.n_entries && !read_stored(p, states, formats, entry)) {
    return false;
  }
  // A tensor with the negative bit set (torch.Tensor.is_neg) is a view of the imaginary part of a conjugate. Its stride
  // is 2, so it is not dense unless it has one element. Asking every tensor would cost as much as reading it.
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

std::vector<Scalar> Plan::read_hyper(const py::tuple& hyper) {
  std::vector<Scalar> out;
  for (const py::handle value : hyper) {
    Scalar scalar{0, nullptr, DType::float64};
    TensorView view;
    if (PyFloat_Check(value.ptr()))
      scalar.value = PyFloat_AS_DOUBLE(value.ptr());
    else if (read(value.ptr(), view) && (view.dtype == DType::float32 || view.dtype == DType::float64))
      scalar = {0, view.data, view.dtype}, keep(value.ptr());
    else
      throw py::type_error("a hyper-parameter must be a float, or a float32 or float64 tensor in device memory");
    out.push_back(scalar);
  }
  return out;
}

// Finds the gradient and the states of candidate.param; false if it has no gradient.
bool Plan::find_tensors(const RuleVariant& rule, const GroupOptions& options, PyObject* state, Candidate& c) {
  static PyObject* const grad_name = interned("grad");
  static PyObject* const step_name = interned("step");
  c.n_states = options.entries.size();
  c.complete = true;
  if (rule.reads_grad) {
    c.grad = PyObject_GetAttr(c.param, grad_name);
    if (c.grad == nullptr) throw py::error_already_set();
    references_.push_back(c.grad);
    if (c.grad == Py_None) return false;
  }
  if (c.n_states == 0 && !options.counts_steps) return true;
  PyObject* const param_state = lookup_tensor(state, c.param);
  c.complete = param_state != nullptr && PyDict_Check(param_state);
  const auto find = [&](PyObject* name, PyObject*& out) {
    if (!c.complete) return;
    out = lookup(param_state, name);
    c.complete = out != nullptr && out != Py_None;
    if (c.complete) keep(out);
  };
  for (std::size_t s = 0; s < c.n_states; ++s)
    find(PyTuple_GET_ITEM(options.entries.ptr(), static_cast<Py_ssize_t>(s)), c.states[s]);
  if (options.counts_steps) find(step_name, c.scalars.step);
  for (std::size_t i = 0; i < rule.carried_keys.size(); ++i) find(rule.carried_keys[i], c.scalars.carried[i]);
  if (!c.complete) {
    c.n_states = 0;
    c.scalars = {};
  }
  return true;
}

void Plan::prefetch(const Candidate& c) const {
  for (PyObject* object : {c.param, c.grad, c.scalars.step, c.scalars.carried[0], c.scalars.carried[1]})
    if (object != nullptr && is_exact_tensor(object)) prefetch_tensor(object);
  for (std::size_t s = 0; s < c.n_states; ++s)
    if (is_exact_tensor(c.states[s])) prefetch_tensor(c.states[s]);
}

py::list Plan::gather(const GroupArguments& arguments, const py::object& param_list, const py::dict& state,
                      const py::object& fresh, const py::function& stage) {
  const auto& [variant, hyper, counts_steps, device_scalars, maximize, entries, state_formats, param_format] =
      arguments;
  const RuleVariant& rule = rule_variants().at(variant);
  Group& group = groups_.emplace_back();
  group.options = {variant,
                   read_hyper(hyper),
                   counts_steps,
                   device_scalars,
                   maximize,
                   entries,
                   formats_named(state_formats, param_format)};
  if (state_formats.size() != rule.state_names.size() || entries.size() != group.options.formats.n_entries)
    throw py::value_error("gather() takes one format per state and one name per entry");
  // Keeps a copy of the list: Python code that runs meanwhile, here or in another thread, may change the caller's.
  const py::list params = py::reinterpret_steal<py::list>(PySequence_List(param_list.ptr()));
  if (!params) throw py::error_already_set();
  keep(params.ptr());
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  references_.reserve(references_.size() + n * (rule.state_names.size() + 2));

  // First finds the Python objects, then reads the tensors: so that the next tensors can be prefetched.
  constexpr Py_ssize_t ahead = 8;
  py::list missing;
  std::vector<Candidate> candidates;
  candidates.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + ahead < n && is_exact_tensor(PyList_GET_ITEM(params.ptr(), i + ahead)))
      prefetch_tensor(PyList_GET_ITEM(params.ptr(), i + ahead));
    Candidate c{};
    c.index = i;
    c.param = PyList_GET_ITEM(params.ptr(), i);
    has_subclasses_ = has_subclasses_ || !is_exact_tensor(c.param);
    if (!find_tensors(rule, group.options, state.ptr(), c)) continue;
    if (!c.complete) missing.append(i);
    candidates.push_back(c);
  }

  group.entries.reserve(candidates.size());
  AddressSet seen(candidates.size());
  std::unordered_map<const void*, int> repeats;  // of parameters listed more than once
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (i + ahead < candidates.size()) prefetch(candidates[i + ahead]);
    const Candidate& c = candidates[i];
    Entry entry{};
    if (!read_tensors(c.param, c.grad, c.states, c.n_states, group.options.formats, entry, true) ||
        !read_scalars(c.scalars, device_scalars, entry)) {
      entry = {};
      stage_entry(c, rule, group.options, stage, entry);
    }
    if (!c.complete) continue;
    if (!fresh.is_none()) {
      const int found = PySequence_Contains(fresh.ptr(), c.param);
      if (found < 0) throw py::error_already_set();  // a tensor's hash is a Python function, which can be interrupted
      entry.fresh = found == 1;
    }
    if (entry.item.size > 0 && !seen.insert(entry.item.param)) {
      entry.occurrence = ++repeats[entry.item.param];
      group.occurrences = std::max(group.occurrences, entry.occurrence + 1);
    }
    group.entries.push_back(entry);
    to_update_.push_back(c.param);
  }
  return missing;
}

void Plan::stage_entry(const Candidate& c, const RuleVariant& rule, const GroupOptions& options,
                       const py::function& stage, Entry& entry) {
  const auto or_none = [](PyObject* object) { return object != nullptr ? py::handle(object) : py::handle(Py_None); };
  py::list states;
  for (std::size_t s = 0; s < c.n_states; ++s) states.append(py::handle(c.states[s]));
  py::dict scalars;
  if (c.scalars.step != nullptr) scalars["step"] = py::handle(c.scalars.step);
  for (std::size_t i = 0; i < rule.carried_keys.size(); ++i)
    if (c.scalars.carried[i] != nullptr) scalars[rule.carried_keys[i]] = py::handle(c.scalars.carried[i]);
  const py::list stand_ins = stage(c.index, py::handle(c.param), or_none(c.grad), states, scalars);
  const auto staged = [&](PyObject* before, const py::handle& name) {  // stage() may have moved it to another device
    return before != nullptr ? keep(scalars[name].ptr()) : nullptr;
  };
  ScalarObjects staged_scalars{staged(c.scalars.step, py::str("step")), {}};
  for (std::size_t i = 0; i < rule.carried_keys.size(); ++i)
    staged_scalars.carried[i] = staged(c.scalars.carried[i], rule.carried_keys[i]);
  std::vector<PyObject*> streams;
  for (const py::handle tensor : stand_ins) streams.push_back(keep(tensor.ptr()));
  const std::size_t first_state = c.grad != nullptr ? 2 : 1;
  const bool by_rows = streams.size() == first_state + c.n_states + 1 && rule.takes_rows && c.grad != nullptr;
  if (streams.size() != first_state + c.n_states + by_rows)
    throw py::value_error("stage() returned a wrong number of tensors");
  bool readable = read_tensors(streams[0], c.grad != nullptr && !by_rows ? streams[1] : nullptr,
                               streams.data() + first_state, c.n_states, options.formats, entry, false) &&
                  read_scalars(staged_scalars, options.device_scalars, entry);
  if (readable && by_rows) {
    TensorView values;
    readable = read(streams[1], values) && values.dtype == entry.dtype && values.device_type == entry.device_type &&
               values.device == entry.device;
    const py::tuple rows(stand_ins[first_state + c.n_states]);
    entry.item.grad = values.data;
    entry.item.size = values.size;
    entry.item.rows = reinterpret_cast<const std::int64_t*>(rows[0].cast<std::uintptr_t>());
    entry.item.row_size = rows[1].cast<std::int64_t>();
  }
  if (!readable)
    throw py::value_error("parameter " + std::to_string(c.index) + " is of a kind that no kernel can update");
}

py::list Plan::updated() const {
  py::list out(to_update_.size());
  for (std::size_t i = 0; i < to_update_.size(); ++i) {
    Py_INCREF(to_update_[i]);
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), to_update_[i]);
  }
  return out;
}

}  // namespace onepass
