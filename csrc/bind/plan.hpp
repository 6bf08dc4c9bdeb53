// One step of an optimizer: first gather and check everything, then write.
#pragma once
#include <array>
#include <map>
#include <optional>
#include <tuple>

#include "bind/rules.hpp"
#include "bind/tensor.hpp"

namespace onepass {

// A set of addresses with open addressing: a few nanoseconds per insertion, where a node-based set takes fifty.
class AddressSet {
 public:
  explicit AddressSet(std::size_t expected) {
    std::size_t slots = 16;
    while (slots < 2 * expected) slots *= 2;
    slots_.assign(slots, nullptr);
  }
  // False if the address is already in the set.
  bool insert(const void* address) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = (reinterpret_cast<std::uintptr_t>(address) * 0x9E3779B97F4A7C15u >> 20) & mask;
    for (; slots_[i] != nullptr; i = (i + 1) & mask)
      if (slots_[i] == address) return false;
    slots_[i] = address;
    return true;
  }

 private:
  std::vector<const void*> slots_;
};

// How a group's states and parameters are kept in memory.
struct Formats {
  std::vector<StateFormat> states;  // one per state of the rule
  ParamFormat param;
  std::size_t n_entries;  // of a parameter's state
  bool usual;             // all in the dtype of arithmetic
};

struct GroupOptions {
  int variant;
  std::vector<Scalar> hyper;
  bool counts_steps;    // the state has a "step"
  bool device_scalars;  // the 0-d states of parameters on a device are in its memory
  bool maximize;
  // Names of the entries of a parameter's state: a state in 8 bits is its codes, followed by their scales; the
  // remainders of the parameter come last.
  py::tuple entries;
  Formats formats;
};

// The same as Python passes it: (variant, hyper-parameters, counts steps, device scalars, maximize, entries, formats of
// the states and of the parameter).
using GroupArguments = std::tuple<int, py::tuple, bool, bool, bool, py::tuple, std::vector<std::string>, std::string>;
// Clipping of all gradients: (max_norm, normalize, epsilon).
using ClipArguments = std::tuple<std::optional<double>, bool, double>;
// Addresses on one device, 0 if absent: (stream, workspace, scaled_norm, norm, grad_scale, found_inf).
using DeviceArguments = std::array<std::uintptr_t, 6>;

class Plan {
 public:
  Plan(const TensorReader& reader, py::tuple tensor_types) : reader_(reader), tensor_types_(std::move(tensor_types)) {}
  Plan(const Plan&) = delete;
  ~Plan() {
    for (PyObject* object : references_) Py_DECREF(object);
  }

  // Records every parameter that has a gradient, and writes nothing. The kernels take dense tensors of matching dtype,
  // device and layout. For a parameter with any other tensor, stage(index, param, grad, states, scalars) is called; it
  // returns one-dimensional dense stand-ins [param, grad, *states], or raises an error that names the reason. For a
  // sparse gradient, grad's stand-in holds the values, and (address of the row indices, row size) follows the states.
  // Returns the indices of the parameters whose state is missing; if there are any, the plan must not be run.
  py::list gather(const GroupArguments& group, const py::object& params, const py::dict& state, const py::object& fresh,
                  const py::function& stage);

  // The total over all gradients in host memory. norm_type 2 gives the sum of squares, 1 that of magnitudes, any other
  // p that of |g|**p; infinity gives the largest magnitude and -infinity the smallest. weighted, for norm_type 2 only,
  // multiplies each gradient by its parameter, element by element.
  double cpu_total(double norm_type, bool weighted, int max_threads) const;
  // The same for the gradients on a CUDA device. Writes to `total` in its memory, without waiting. partials:
  // cuda_partials(device) doubles of workspace. root: of the total its square root.
  void cuda_total(double norm_type, bool weighted, bool root, int device, std::uintptr_t partials, std::uintptr_t total,
                  std::uintptr_t stream) const;
  std::int64_t cuda_partials(int device) const;

  // Whether any parameter, even one without a gradient, is of a subclass of Tensor and so may be sharded.
  bool has_subclasses() const { return has_subclasses_; }

  // Whether run() has started to write.
  bool has_run() const { return has_run_; }

  // Whether the CPU kernels update any of the parameters.
  bool has_cpu() const;

  // The CUDA devices that hold gradients.
  std::vector<int> cuda_devices() const;

  // The most bytes of workspace that run() needs on a device.
  std::int64_t cuda_workspace(int device) const;

  // Updates the parameters. grad_scale and norm are 1 and 0 if the host does not know them. devices: one entry for each
  // of cuda_devices().
  void run(int max_threads, const ClipArguments& clip, double grad_scale, double norm,
           const std::map<int, DeviceArguments>& devices);

  // The parameters that were gathered, for their version counters.
  py::list updated() const;

 private:
  // A 0-d state: the step count, or a number that the rule carries.
  struct ScalarState {
    void* at;  // null: the rule has none
    bool is_double;

    double read() const { return is_double ? *static_cast<const double*>(at) : double(*static_cast<const float*>(at)); }
    void write(double value) const {
      if (is_double)
        *static_cast<double*>(at) = value;
      else
        *static_cast<float*>(at) = float(value);
    }
  };
  // The same as Python objects; null if the rule has none.
  struct ScalarObjects {
    PyObject *step, *carried[max_carried];
  };
  struct Entry {
    Item item;
    Storage storage;
    int device_type, device;
    bool cuda, stored;  // stored: in `storage`
    DType dtype;
    ScalarState step, carried[max_carried];
    bool fresh;
    int occurrence;  // a parameter listed twice is updated twice, in order
  };
  static constexpr std::size_t max_entries = 2 * max_states + 1;
  // A parameter with a gradient, as Python objects: not yet read or checked.
  struct Candidate {
    Py_ssize_t index;
    PyObject *param, *grad, *states[max_entries];
    std::size_t n_states;  // as many as entries, or 0 if one is missing
    ScalarObjects scalars;
    bool complete;  // no state is missing
  };
  struct Group {
    GroupOptions options;
    std::vector<Entry> entries;
    int occurrences = 1;
  };

  PyObject* keep(PyObject* object) {
    Py_INCREF(object);
    references_.push_back(object);
    return object;
  }
  // Whether the object is of exactly one of the given tensor types, no subclass.
  bool is_exact_tensor(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensor_types_.ptr()); ++i)
      if (type == PyTuple_GET_ITEM(tensor_types_.ptr(), i)) return true;
    return false;
  }
  bool read(PyObject* object, TensorView& out) {
    return is_exact_tensor(object) && reader_.read(object, out, layouts_);
  }
  bool matches(const TensorView& param, const TensorView& other, DType dtype) const {
    return other.dtype == dtype && other.device_type == param.device_type && other.device == param.device &&
           param.same_layout(other);
  }
  std::vector<Scalar> read_hyper(const py::tuple& hyper);
  bool find_tensors(const RuleVariant& rule, const GroupOptions& options, PyObject* state, Candidate& candidate);
  void prefetch(const Candidate& candidate) const;
  bool read_tensors(PyObject* param, PyObject* grad, PyObject* const* states, std::size_t n_states,
                    const Formats& formats, Entry& entry, bool check_negation);
  bool read_stored(const TensorView& param, PyObject* const* states, const Formats& formats, Entry& entry);
  void stage_entry(const Candidate& candidate, const RuleVariant& rule, const GroupOptions& options,
                   const py::function& stage, Entry& entry);
  bool read_scalar(PyObject* object, bool device_scalars, const Entry& entry, ScalarState& out);
  bool read_scalars(const ScalarObjects& objects, bool device_scalars, Entry& entry) {
    bool readable = objects.step == nullptr || read_scalar(objects.step, device_scalars, entry, entry.step);
    for (int i = 0; i < max_carried && objects.carried[i] != nullptr; ++i)
      readable = readable && read_scalar(objects.carried[i], device_scalars, entry, entry.carried[i]);
    return readable;
  }
  class HostScalars;
  struct RunContext;
  void launch(const Group& group, const std::vector<const Entry*>& entries, RunContext& run) const;
  template <class Select>
  std::int64_t partials_of(const Engine& engine, const Select& select) const;
  template <class Select>
  std::int64_t reduce(const Engine& engine, const Reduction& reduction, double* partials, const StreamRef& where,
                      const Select& select) const;

  const TensorReader& reader_;
  Layouts layouts_;
  py::tuple tensor_types_;
  std::vector<Group> groups_;
  std::vector<PyObject*> references_;
  std::vector<PyObject*> to_update_;  // borrowed from references_
  bool has_subclasses_ = false, has_run_ = false;
};

}  // namespace onepass
