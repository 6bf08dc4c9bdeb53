// Shared by the extension's functions for layers: reading and checking the tensors of a call, allocating its
// workspace, and running it.
#pragma once
#include <sys/mman.h>

#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bind/rules.hpp"
#include "bind/tensor.hpp"

namespace onepass {

// The elements of a tuple, as borrowed references. pybind's own casts of tuples take longer than a tiny norm.
template <std::size_t n>
std::array<py::handle, n> unpack(const py::tuple& values) {
  if (values.size() != n) throw py::type_error("expected a tuple of " + std::to_string(n));
  std::array<py::handle, n> out;
  for (std::size_t i = 0; i < n; ++i) out[i] = PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i));
  return out;
}

// What a call runs with: the number of threads on the CPU; on CUDA the stream, and allocate(bytes), which returns a
// uint8 tensor on the device.
struct Resources {
  int threads;
  void* stream;
  py::handle allocate;

  explicit Resources(const py::tuple& arguments) {
    const auto [count, address, function] = unpack<3>(arguments);
    threads = static_cast<int>(PyLong_AsLong(count.ptr()));
    stream = PyLong_AsVoidPtr(address.ptr());
    allocate = function;
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
};

// A dropout: the seed (0-d, int64), p, whether it is inverted, the packed mask (uint8) or None, whether to read the
// mask instead of writing it.
using DropoutArguments = std::optional<std::tuple<py::object, double, bool, py::object, bool>>;

// The tensors of one call, all on the device of the first one.
class Tensors {
 public:
  // channels_last: the memory format of every tensor of the call; otherwise they are contiguous.
  explicit Tensors(py::handle first, bool channels_last = false) : channels_last_(channels_last) {
    read(first, first_, "the first tensor");
  }
  explicit Tensors(const TensorView& first) : first_(first), channels_last_(false) {}

  const TensorView& first() const { return first_; }
  bool on_cuda() const { return runs_on_cuda(first_); }

  // The address of a tensor that must have this dtype, `size` elements, and the call's device and memory format.
  char* address(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    TensorView view;
    read(tensor, view, name);
    if (view.dtype != dtype || view.size != size || !on_device_of_first(view) || !in_memory_format(view)) refuse(name);
    return view.data;
  }
  char* optional(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    return tensor.is_none() ? nullptr : address(tensor, dtype, size, name);
  }

  // The same for tensors that the call is the first to write. Outputs of several megabytes are often fresh from the
  // system, and faulting in their 4 KB pages takes longer than filling them, so ask for huge pages. Best effort: errors
  // are ignored.
  char* output(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    char* const data = address(tensor, dtype, size, name);
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = 2 << 20;
    const std::int64_t bytes = size * size_of(dtype);
    if (bytes >= (4 << 20) && !on_cuda()) {
      const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
      const auto end = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / page * page;
      if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
    return data;
  }
  char* optional_output(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    return tensor.is_none() ? nullptr : output(tensor, dtype, size, name);
  }

  // Statistics of a row norm, which may be None on the CPU.
  char* statistics(py::handle tensor, DType dtype, std::int64_t size) {
    return on_cuda() ? address(tensor, dtype, size, "stats") : optional(tensor, dtype, size, "stats");
  }

  TensorView view(py::handle tensor, const char* name) {
    TensorView view;
    read(tensor, view, name);
    return view;
  }

  Dropout dropout(const DropoutArguments& arguments) {
    if (!arguments) return {nullptr, 0, 1};
    const double p = std::get<1>(*arguments);
    if (!(p >= 0 && p <= 1)) throw py::value_error("p is a probability, but got " + std::to_string(p));
    TensorView seed;
    if (!reader->read(std::get<0>(*arguments).ptr(), Integers::int64, seed, layouts_) || seed.size != 1 ||
        !on_device_of_first(seed))
      refuse("seed");
    return {reinterpret_cast<const std::int64_t*>(seed.data),
            static_cast<std::uint64_t>(std::floor(p * 4294967296.0 + 0.5)), std::get<2>(*arguments) ? 1 / (1 - p) : 1};
  }

  // The packed mask of `size` elements, one bit per element; null if there is none.
  std::uint8_t* mask(const DropoutArguments& arguments, std::int64_t size) {
    if (!arguments || std::get<3>(*arguments).is_none()) return nullptr;
    TensorView view;
    if (!reader->read(std::get<3>(*arguments).ptr(), Integers::uint8, view, layouts_) || view.size != (size + 7) / 8 ||
        !on_device_of_first(view) || !view.is_contiguous())
      refuse("mask");
    return reinterpret_cast<std::uint8_t*>(view.data);
  }

 private:
  [[noreturn]] static void refuse(const char* name) {
    throw py::value_error(std::string(name) + " is not of the size, dtype, device or layout its kernel needs");
  }
  bool on_device_of_first(const TensorView& view) const {
    return view.device_type == first_.device_type && view.device == first_.device;
  }
  bool in_memory_format(const TensorView& view) const {
    return channels_last_ ? view.is_channels_last() : view.is_contiguous();
  }

  void read(py::handle tensor, TensorView& out, const char* name) {
    if (!reader->read(tensor.ptr(), out, layouts_))
      throw std::runtime_error(std::string(name) +
                               " is not a floating-point tensor in memory that a kernel can access");
  }

  TensorView first_;
  bool channels_last_;
  Layouts layouts_;
};

// A call's workspace: heap memory on the CPU; on a GPU a tensor, because torch's allocator reuses memory in stream
// order.
class Workspace {
 public:
  Workspace(std::int64_t bytes, bool on_cuda, const Resources& resources) {
    if (bytes == 0) return;
    if (on_cuda) {
      tensor_ = resources.allocate(bytes);
      address_ = reinterpret_cast<void*>(tensor_.attr("data_ptr")().cast<std::uintptr_t>());
    } else {
      memory_.reset(new char[static_cast<std::size_t>(bytes)]);
      address_ = memory_.get();
    }
  }
  void* address() const { return address_; }

 private:
  std::unique_ptr<char[]> memory_;
  py::object tensor_;
  void* address_ = nullptr;
};

// Runs a call on its device, without Python's lock; small calls on the CPU keep it, because releasing it takes longer.
template <class Call>
void run(const Tensors& tensors, const Call& call, const Resources& resources,
         void (*Engine::*layer)(const Call&, const StreamRef&)) {
  std::optional<py::gil_scoped_release> release;
  if (tensors.first().size > 1 << 14 || tensors.on_cuda()) release.emplace();
  const StreamRef stream{resources.threads, tensors.first().device, resources.stream};
  (engine_for(tensors.on_cuda()).*layer)(call, stream);
}

}  // namespace onepass
