// A tensor as the binding sees it: address, dtype and layout, read without libtorch.
#pragma once
#include <pybind11/pybind11.h>

#include <forward_list>
#include <vector>

#include "core/types.hpp"

namespace onepass {

namespace py = pybind11;

// The parts of DLPack's stable C interface (github.com/dmlc/dlpack, version 1) that are used here.
namespace dlpack {
enum DeviceType : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3 };
struct Device {
  std::int32_t type, id;
};
enum TypeCode : std::uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, brain_floating = 4 };
struct Type {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  Type dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct ExchangeApi {
  std::uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_python, *managed_to_python;
  int (*view)(void* python_object, Tensor* out);  // borrows; -1 with a Python error
  void* current_stream;
};
}  // namespace dlpack

struct TensorView {
  char* data = nullptr;
  int device_type = 0, device = 0, ndim = 0;
  DType dtype = DType::float32;
  std::int64_t size = 0;
  const std::int64_t *shape = nullptr, *strides = nullptr;  // borrowed from the tensor: valid until it is changed

  bool same_layout(const TensorView& other) const {
    if (ndim != other.ndim) return false;
    for (int d = 0; d < ndim; ++d)
      if (shape[d] != other.shape[d] || (shape[d] != 1 && strides[d] != other.strides[d])) return false;
    return true;
  }

  bool is_contiguous() const {
    std::int64_t expected = 1;
    return size == 0 || continues(ndim - 1, 0, expected);
  }

  // Contiguous, except that the second dimension is the innermost one. With fewer than two dimensions: contiguous.
  bool is_channels_last() const {
    std::int64_t expected = 1;
    if (size == 0 || ndim < 2) return is_contiguous();
    return continues(1, 1, expected) && continues(ndim - 1, 2, expected) && continues(0, 0, expected);
  }

  // Whether the elements fill one piece of memory without gaps or overlaps, in any order of the dimensions.
  bool is_dense() const {
    std::int64_t expected = 1;
    int d = ndim - 1;
    for (; d >= 0 && (strides[d] == expected || shape[d] == 1); --d) expected *= shape[d];
    if (d < 0 || size == 0) return true;  // the usual case: contiguous
    std::int64_t covered = 1;
    for (int n = 0; n < ndim; ++n) {  // find the dimension whose stride is the extent of those before
      int next = -1;
      for (int e = 0; e < ndim && next < 0; ++e)
        if (shape[e] != 1 && strides[e] == covered) next = e;
      if (next < 0) break;
      covered *= shape[next];
    }
    return covered == size;
  }

 private:
  // Whether dimensions `last` to `first`, innermost first, continue an extent of `expected` elements without a gap.
  bool continues(int last, int first, std::int64_t& expected) const {
    for (int d = last; d >= first; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
};

// Keeps shapes and strides at stable addresses. An empty list costs nothing.
using Layouts = std::forward_list<std::vector<std::int64_t>>;

// The integer tensors that kernels take: int64 for seeds; uint8 for packed masks and codes; int8 and int16 for what
// bfloat16 parameters are short of a float32.
enum class Integers : std::uint8_t { int64, uint8, int16, int8 };

// Reads a tensor. Returns false if its memory cannot be accessed directly as the expected type (sparse, fake or meta
// tensors, subclasses without storage ...); the caller then leaves it to Python to stage a copy or to raise an error.
class TensorReader {
 public:
  // exchange_api: torch.Tensor.__dlpack_c_exchange_api__, or None before torch 2.10. Then the Python function
  // describe() is called per tensor; it returns (address, kind as in read_any(), device type, device index, shape,
  // strides).
  TensorReader(const py::object& exchange_api, py::object describe) : describe_(std::move(describe)) {
    if (exchange_api.is_none()) return;
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->major == 1) api_ = api;
  }

  bool uses_exchange_api() const { return api_ != nullptr && api_->view != nullptr; }

  // layouts: owns the arrays that out.shape and out.strides point to, if they are not the tensor's.
  bool read(PyObject* tensor, TensorView& out, Layouts& layouts) const {
    int kind = 0;
    if (!read_any(tensor, out, kind, layouts)) return false;
    switch (kind) {
      case dlpack::floating * 256 + 32: out.dtype = DType::float32; break;
      case dlpack::floating * 256 + 64: out.dtype = DType::float64; break;
      case dlpack::floating * 256 + 16: out.dtype = DType::float16; break;
      case dlpack::brain_floating * 256 + 16: out.dtype = DType::bfloat16; break;
      default: return false;
    }
    return true;
  }

  // The same for integers; out.dtype is not set.
  bool read(PyObject* tensor, Integers expected, TensorView& out, Layouts& layouts) const {
    int kind = 0;
    if (!read_any(tensor, out, kind, layouts)) return false;
    switch (expected) {
      case Integers::int64: return kind == dlpack::signed_integer * 256 + 64;
      case Integers::int16: return kind == dlpack::signed_integer * 256 + 16;
      case Integers::int8: return kind == dlpack::signed_integer * 256 + 8;
      default: return kind == dlpack::unsigned_integer * 256 + 8;
    }
  }

 private:
  // kind: DLPack's type code * 256 + bits per element.
  bool read_any(PyObject* tensor, TensorView& out, int& kind, Layouts& layouts) const {
    return uses_exchange_api() ? read_exchange(tensor, out, kind) : read_described(tensor, out, kind, layouts);
  }

  bool read_exchange(PyObject* tensor, TensorView& out, int& kind) const {
    dlpack::Tensor t;
    if (api_->view(tensor, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    if (t.dtype.lanes != 1) return false;
    kind = t.dtype.code * 256 + t.dtype.bits;
    out.device_type = t.device.type == dlpack::cuda_host ? dlpack::cpu : t.device.type;
    out.device = t.device.id;
    out.ndim = t.ndim;
    out.size = 1;
    out.shape = t.shape;
    out.strides = t.strides;
    for (int d = 0; d < t.ndim; ++d) out.size *= t.shape[d];
    out.data = static_cast<char*>(t.data) + t.byte_offset;
    return out.size == 0 || t.data != nullptr;
  }

  bool read_described(PyObject* tensor, TensorView& out, int& kind, Layouts& layouts) const {
    const py::object described = describe_(py::handle(tensor));
    if (described.is_none()) return false;
    const py::tuple d = described;
    const py::tuple shape = d[4], strides = d[5];
    out.data = reinterpret_cast<char*>(d[0].cast<std::uintptr_t>());
    kind = d[1].cast<int>();
    out.device_type = d[2].cast<int>();
    out.device = d[3].cast<int>();
    out.ndim = static_cast<int>(shape.size());
    out.size = 1;
    auto& layout = layouts.emplace_front();
    for (int i = 0; i < out.ndim; ++i) layout.push_back(shape[i].cast<std::int64_t>());
    for (int i = 0; i < out.ndim; ++i) layout.push_back(strides[i].cast<std::int64_t>());
    for (int i = 0; i < out.ndim; ++i) out.size *= layout[i];
    out.shape = layout.data();
    out.strides = layout.data() + out.ndim;
    return out.size == 0 || out.data != nullptr;
  }

  const dlpack::ExchangeApi* api_ = nullptr;
  py::object describe_;
};

// Never destroyed, because static destructors run after Python has shut down.
inline TensorReader* reader = nullptr;

// Whether the tensor has its negative bit set (torch.Tensor.is_neg): memory then holds the negated values.
inline bool is_negated(PyObject* tensor) {
  static PyObject* const method = PyUnicode_InternFromString("is_neg");
  PyObject* const answer = PyObject_CallMethodNoArgs(tensor, method);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

// Whether the CUDA kernels process the tensor. In the test build that runs them on the host, they process CPU tensors.
inline bool runs_on_cuda(const TensorView& t) {
#if defined(ONEPASS_CUDA_ON_HOST)
  return t.device_type == dlpack::cpu;
#else
  return t.device_type == dlpack::cuda;
#endif
}

}  // namespace onepass
