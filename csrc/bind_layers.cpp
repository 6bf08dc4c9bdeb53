#include "bind_layers.hpp"

#include <pybind11/stl.h>
#include <sys/mman.h>

#include <cmath>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "bind_rules.hpp"

namespace onepass {
namespace {

const cpu::Layers& cpu_layers() {
#define ONEPASS_LAYERS_OF(isa) &cpu::isa::layers,
  static const cpu::Layers* const layers[] = {ONEPASS_ISAS(ONEPASS_LAYERS_OF)};
#undef ONEPASS_LAYERS_OF
  return *layers[current_isa];
}

// The tensors of one call: all on the device of the first one, dense.
class Tensors {
 public:
  // channels_last: the order in memory of every tensor of the call; otherwise contiguous.
  explicit Tensors(py::handle first, bool channels_last = false) : channels_last_(channels_last) {
    read(first, first_, "the first tensor");
  }

  const TensorView& first() const { return first_; }
  bool on_cuda() const { return runs_on_cuda(first_); }

  // Address of a tensor of so many elements in the order that the call asks for; null for None, where that is allowed.
  char* address(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    TensorView view;
    read(tensor, view, name);
    if (view.dtype != dtype || view.size != size || !is_beside_first(view) || !in_order(view)) refuse(name);
    return view.data;
  }
  char* optional(py::handle tensor, DType dtype, std::int64_t size, const char* name) {
    return tensor.is_none() ? nullptr : address(tensor, dtype, size, name);
  }

  // What forward keeps of a dropout beside its input: where they are, on the device of the first tensor.
  const std::int64_t* seed(const DropoutArguments& dropout) {
    if (!dropout) return nullptr;
    TensorView view;
    if (!reader->read(std::get<0>(*dropout).ptr(), Integers::seed, view, layouts_) || view.size != 1 ||
        !is_beside_first(view))
      refuse("seed");
    return reinterpret_cast<const std::int64_t*>(view.data);
  }
  // The packed mask of so many elements, one bit each; null where there is none.
  std::uint8_t* mask(const DropoutArguments& dropout, std::int64_t size) {
    if (!dropout || std::get<3>(*dropout).is_none()) return nullptr;
    TensorView view;
    if (!reader->read(std::get<3>(*dropout).ptr(), Integers::mask, view, layouts_) || view.size != (size + 7) / 8 ||
        !is_beside_first(view) || !view.is_contiguous())
      refuse("mask");
    return reinterpret_cast<std::uint8_t*>(view.data);
  }

  // The CPU's norms need not keep them.
  char* statistics(py::handle tensor, DType dtype, std::int64_t size) {
    return on_cuda() ? address(tensor, dtype, size, "stats") : optional(tensor, dtype, size, "stats");
  }

  TensorView view(py::handle tensor, const char* name) {
    TensorView view;
    read(tensor, view, name);
    return view;
  }

 private:
  [[noreturn]] static void refuse(const char* name) {
    throw py::value_error(std::string(name) + " is not of the size, dtype, device or layout its kernel needs");
  }
  bool is_beside_first(const TensorView& view) const {
    return view.device_type == first_.device_type && view.device == first_.device;
  }
  bool in_order(const TensorView& view) const {
    return channels_last_ ? view.is_channels_last() : view.is_contiguous();
  }

  void read(py::handle tensor, TensorView& out, const char* name) {
    if (!reader->read(tensor.ptr(), out, layouts_))
      throw std::runtime_error(std::string(name) + " is no floating-point tensor in memory that a kernel can reach");
  }

  TensorView first_;
  bool channels_last_;
  Layouts layouts_;
};

// Outputs of some megabytes often come fresh from the system, page by page, and taking 4 KB pages costs more than
// filling them: ask for large ones before the first write. A wish, so errors are none.
void* large_pages(void* output, std::int64_t bytes, bool on_cuda) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20;
  if (output != nullptr && bytes >= (4 << 20) && !on_cuda) {
    const auto begin = (reinterpret_cast<std::uintptr_t>(output) + page - 1) / page * page;
    const auto end = (reinterpret_cast<std::uintptr_t>(output) + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)bytes, (void)on_cuda;
#endif
  return output;
}

// A call's workspace: the engine's own on the CPU, a tensor on a GPU, where memory is reused in the stream's order.
class Workspace {
 public:
  Workspace(std::int64_t bytes, bool on_cuda, py::handle room) {
    if (bytes == 0) return;
    if (on_cuda) {
      tensor_ = room(bytes);
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

Dropout dropout_of(const DropoutArguments& arguments, Tensors& tensors) {
  if (!arguments) return {nullptr, 0, 1};
  const double p = std::get<1>(*arguments);
  if (!(p >= 0 && p <= 1)) throw py::value_error("p is a probability, but got " + std::to_string(p));
  return {tensors.seed(arguments), static_cast<std::uint64_t>(std::floor(p * 4294967296.0 + 0.5)),
          std::get<2>(*arguments) ? 1 / (1 - p) : 1};
}

// Runs a call on its device, without Python's lock unless giving it away takes longer.
template <class Call>
void run(const Tensors& tensors, std::int64_t elements, const Call& call, int threads, std::uintptr_t stream,
         void (*on_cpu)(const std::common_type_t<Call>&, int),
         void (*on_cuda)(const std::common_type_t<Call>&, const cuda::Where&)) {
  std::optional<py::gil_scoped_release> release;
  if (elements > 1 << 14 || tensors.on_cuda()) release.emplace();
  if (tensors.on_cuda())
    on_cuda(call, {tensors.first().device, reinterpret_cast<void*>(stream)});
  else
    on_cpu(call, threads);
}

#if defined(ONEPASS_HAS_CUDA)
#define ONEPASS_CUDA_LAYER(name) &cuda::name
#else
#define ONEPASS_CUDA_LAYER(name) nullptr  // onepass._native.layers refuses CUDA tensors, with advice
#endif

}  // namespace

void bind_dropout(py::handle x, py::handle y, std::int64_t size, const DropoutArguments& dropout, int threads,
                  std::uintptr_t stream) {
  Tensors tensors(x);
  DropoutCall call{};
  call.dtype = tensors.first().dtype;
  call.size = size;
  if (!y.is_none()) {
    call.x = tensors.address(x, call.dtype, size, "x");
    call.y = large_pages(tensors.address(y, call.dtype, size, "y"), size * size_of(call.dtype), tensors.on_cuda());
  }
  call.dropout = dropout_of(dropout, tensors);
  call.mask = tensors.mask(dropout, size);
  call.reads_mask = dropout && std::get<4>(*dropout);
  run(tensors, size, call, threads, stream, cpu_layers().dropout, ONEPASS_CUDA_LAYER(dropout));
}

bool is_usual_norm(py::handle x, py::handle normalized_shape, py::handle weight, py::handle bias, py::handle eps) {
  if (!PyFloat_CheckExact(eps.ptr()) || !PyTuple_CheckExact(normalized_shape.ptr()) ||
      PyTuple_GET_SIZE(normalized_shape.ptr()) != 1)
    return false;
  Layouts layouts;
  TensorView view;
  if (!reader->read(x.ptr(), view, layouts) || view.ndim == 0 || view.size < 2 || !view.is_contiguous() ||
      is_negated(x.ptr()))
    return false;
  const std::int64_t size = view.shape[view.ndim - 1];
  if (PyLong_AsLongLong(PyTuple_GET_ITEM(normalized_shape.ptr(), 0)) != size) {
    PyErr_Clear();
    return false;
  }
  DType dtype{};
  for (const py::handle affine : {weight, bias}) {
    if (affine.is_none()) continue;
    TensorView w;
    if (!reader->read(affine.ptr(), w, layouts) || w.ndim != 1 || w.size != size || w.size < 2 || !w.is_contiguous() ||
        w.device_type != view.device_type || w.device != view.device || (affine.is(bias) && w.dtype != dtype))
      return false;
    if (is_negated(affine.ptr())) return false;
    dtype = w.dtype;
    if (dtype != view.dtype && dtype != arithmetic_of(view.dtype)) return false;
  }
  return !weight.is_none() || bias.is_none();
}

void bind_row_norm(py::handle x, py::handle residual, py::handle sum, py::handle weight, py::handle bias, py::handle y,
                   py::handle stats, std::int64_t size, double eps, bool rms, const DropoutArguments& dropout,
                   int threads, std::uintptr_t stream, py::handle room) {
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNorm call{};
  call.dtype = tensors.first().dtype;
  const DType arithmetic = arithmetic_of(call.dtype);
  const py::handle affine = weight.is_none() ? bias : weight;
  call.weight_dtype = arithmetic;
  std::int64_t affine_size = size;
  if (!affine.is_none()) {
    const TensorView view = tensors.view(affine, "weight");
    call.weight_dtype = view.dtype;
    affine_size = view.size;
  }
  if (size < 1 || elements % size != 0 || (affine_size != size && affine_size != 1) ||
      (call.weight_dtype != call.dtype && call.weight_dtype != arithmetic))
    throw py::value_error("these are no rows and weights for a norm");
  call.rms = rms;
  call.scalar_affine = affine_size != size;
  call.size = size;
  call.rows = elements / size;
  call.eps = eps;
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.residual = tensors.optional(residual, call.dtype, elements, "residual");
  if (call.residual != nullptr)
    call.sum = large_pages(tensors.address(sum, call.dtype, elements, "sum"), elements * size_of(call.dtype),
                           tensors.on_cuda());
  call.dropout = dropout_of(dropout, tensors);
  call.mask = tensors.mask(dropout, elements);
  call.weight = tensors.optional(weight, call.weight_dtype, affine_size, "weight");
  call.bias = tensors.optional(bias, call.weight_dtype, affine_size, "bias");
  call.y =
      large_pages(tensors.address(y, call.dtype, elements, "y"), elements * size_of(call.dtype), tensors.on_cuda());
  call.stats = tensors.statistics(stats, arithmetic, 3 * call.rows);
  if (elements == 0) return;
  const bool direct = affine.is_none() || (call.weight_dtype == arithmetic && !call.scalar_affine);
  const Workspace workspace(tensors.on_cuda() || direct ? 0 : cpu::row_norm_workspace(size, call.dtype), false, room);
  call.workspace = workspace.address();
  run(tensors, elements, call, threads, stream, cpu_layers().row_norm, ONEPASS_CUDA_LAYER(row_norm));
}

void bind_row_norm_backward(py::handle dy, py::handle dsum, py::handle x, py::handle weight, py::handle stats,
                            py::handle dx, py::handle dbranch, py::handle dweight, py::handle dbias, std::int64_t size,
                            double eps, bool rms, const DropoutArguments& dropout, int threads, std::uintptr_t stream,
                            py::handle room) {
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNormBackward call{};
  call.dtype = tensors.first().dtype;
  const DType arithmetic = arithmetic_of(call.dtype);
  call.weight_dtype = arithmetic;
  std::int64_t affine_size = size;
  for (const py::handle affine : {weight, dweight, dbias})
    if (!affine.is_none()) {
      const TensorView view = tensors.view(affine, "weight");
      call.weight_dtype = view.dtype;
      affine_size = view.size;
    }
  if (size < 1 || elements % size != 0 || (affine_size != size && affine_size != 1) ||
      (call.weight_dtype != call.dtype && call.weight_dtype != arithmetic))
    throw py::value_error("these are no rows and weights for a norm");
  call.rms = rms;
  call.scalar_affine = affine_size != size;
  call.size = size;
  call.rows = elements / size;
  call.dy = tensors.address(dy, call.dtype, elements, "dy");
  call.dsum = tensors.optional(dsum, call.dtype, elements, "dsum");
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, affine_size, "weight");
  call.stats = tensors.statistics(stats, arithmetic, 3 * call.rows);
  call.eps = eps;
  call.dx =
      large_pages(tensors.optional(dx, call.dtype, elements, "dx"), elements * size_of(call.dtype), tensors.on_cuda());
  call.dbranch = large_pages(tensors.optional(dbranch, call.dtype, elements, "dbranch"), elements * size_of(call.dtype),
                             tensors.on_cuda());
  call.dropout = dropout_of(dropout, tensors);
  call.mask = tensors.mask(dropout, elements);
  call.dweight = tensors.optional(dweight, call.weight_dtype, affine_size, "dweight");
  call.dbias = tensors.optional(dbias, call.weight_dtype, affine_size, "dbias");
  const bool on_cuda = tensors.on_cuda();
#if defined(ONEPASS_HAS_CUDA)
  const auto workspace_bytes = on_cuda ? &cuda::row_norm_backward_workspace : &cpu::row_norm_backward_workspace;
#else
  const auto workspace_bytes = &cpu::row_norm_backward_workspace;
#endif
  const Workspace workspace(workspace_bytes(call.rows, size, call.dtype), on_cuda, room);
  call.workspace = workspace.address();
  if (elements == 0) return;
  run(tensors, elements, call, threads, stream, cpu_layers().row_norm_backward, ONEPASS_CUDA_LAYER(row_norm_backward));
}

namespace {

BatchShape shape_of(const BatchShapeArguments& arguments, std::int64_t elements) {
  const BatchShape shape{std::get<0>(arguments), std::get<1>(arguments), std::get<2>(arguments),
                         std::get<3>(arguments)};
  if (shape.batch * shape.channels * shape.space != elements)
    throw py::value_error("x is not of the shape that was given for its batch norm");
  return shape;
}

// The dtype of weights: that of the first one there is.
DType weight_dtype(Tensors& tensors, std::initializer_list<py::handle> affine) {
  const DType dtype = tensors.first().dtype;
  for (const py::handle tensor : affine)
    if (!tensor.is_none()) {
      const DType found = tensors.view(tensor, "weight").dtype;
      if (found != dtype && found != arithmetic_of(dtype))
        throw py::value_error("weights are of the input's dtype or of its arithmetic type");
      return found;
    }
  return arithmetic_of(dtype);
}

}  // namespace

void bind_batch_norm(py::handle x, py::handle weight, py::handle bias, py::handle residual, py::handle y,
                     py::handle stats, py::handle running_mean, py::handle running_var,
                     const BatchShapeArguments& shape, int half, double eps, double momentum,
                     std::optional<double> slope, int threads, std::uintptr_t stream, py::handle room) {
  Tensors tensors(x, std::get<3>(shape));
  const std::int64_t elements = tensors.first().size;
  BatchNorm call{};
  call.dtype = tensors.first().dtype;
  call.weight_dtype = weight_dtype(tensors, {weight, bias});
  call.shape = shape_of(shape, elements);
  call.half = static_cast<Half>(half);
  call.eps = eps;
  const std::int64_t channels = call.shape.channels;
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, channels, "weight");
  call.bias = tensors.optional(bias, call.weight_dtype, channels, "bias");
  call.residual = tensors.optional(residual, call.dtype, elements, "residual");
  call.activate = slope.has_value();
  call.slope = slope.value_or(0);
  call.y = call.half == Half::first ? nullptr
                                    : large_pages(tensors.address(y, call.dtype, elements, "y"),
                                                  elements * size_of(call.dtype), tensors.on_cuda());
  call.stats = tensors.address(stats, arithmetic_of(call.dtype), 3 * channels, "stats");
  if (!running_mean.is_none()) {
    call.running_dtype = tensors.view(running_mean, "running_mean").dtype;
    call.running_mean = tensors.address(running_mean, call.running_dtype, channels, "running_mean");
    call.running_var = tensors.address(running_var, call.running_dtype, channels, "running_var");
    call.momentum = momentum;
  }
  if (call.half == Half::running && call.running_mean == nullptr)
    throw py::value_error("a batch norm by running statistics needs them");
  const bool on_cuda = tensors.on_cuda();
#if defined(ONEPASS_HAS_CUDA)
  const auto workspace_bytes = on_cuda ? &cuda::batch_norm_workspace : &cpu::batch_norm_workspace;
#else
  const auto workspace_bytes = &cpu::batch_norm_workspace;
#endif
  const Workspace workspace(elements == 0 ? 0 : workspace_bytes(call.shape), on_cuda, room);
  call.workspace = workspace.address();
  if (elements == 0) return;
  run(tensors, elements, call, threads, stream, cpu_layers().batch_norm, ONEPASS_CUDA_LAYER(batch_norm));
}

void bind_batch_norm_backward(py::handle dy, py::handle x, py::handle y, py::handle weight, py::handle stats,
                              py::handle sums, py::handle dx, py::handle dresidual, py::handle dweight,
                              py::handle dbias, const BatchShapeArguments& shape, int half, bool training, double count,
                              std::optional<double> slope, int threads, std::uintptr_t stream, py::handle room) {
  Tensors tensors(x, std::get<3>(shape));
  const std::int64_t elements = tensors.first().size;
  BatchNormBackward call{};
  call.dtype = tensors.first().dtype;
  const DType arithmetic = arithmetic_of(call.dtype);
  call.weight_dtype = weight_dtype(tensors, {weight, dweight, dbias});
  call.shape = shape_of(shape, elements);
  call.half = static_cast<Half>(half);
  call.training = training;
  const std::int64_t channels = call.shape.channels;
  call.dy = tensors.address(dy, call.dtype, elements, "dy");
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, channels, "weight");
  call.stats = tensors.address(stats, arithmetic, 3 * channels, "stats");
  call.activate = slope.has_value();
  call.slope = slope.value_or(0);
  call.y = call.activate ? tensors.address(y, call.dtype, elements, "y") : nullptr;
  call.sums = tensors.optional(sums, arithmetic, 2 * channels, "sums");
  if (call.half != Half::both && call.sums == nullptr) throw py::value_error("the halves of a backward share sums");
  call.count = count;
  call.dx =
      large_pages(tensors.optional(dx, call.dtype, elements, "dx"), elements * size_of(call.dtype), tensors.on_cuda());
  call.dresidual = large_pages(tensors.optional(dresidual, call.dtype, elements, "dresidual"),
                               elements * size_of(call.dtype), tensors.on_cuda());
  call.dweight = tensors.optional(dweight, call.weight_dtype, channels, "dweight");
  call.dbias = tensors.optional(dbias, call.weight_dtype, channels, "dbias");
  const bool on_cuda = tensors.on_cuda();
#if defined(ONEPASS_HAS_CUDA)
  const auto workspace_bytes = on_cuda ? &cuda::batch_norm_workspace : &cpu::batch_norm_workspace;
#else
  const auto workspace_bytes = &cpu::batch_norm_workspace;
#endif
  const Workspace workspace(elements == 0 ? 0 : workspace_bytes(call.shape), on_cuda, room);
  call.workspace = workspace.address();
  if (elements == 0) return;
  run(tensors, elements, call, threads, stream, cpu_layers().batch_norm_backward,
      ONEPASS_CUDA_LAYER(batch_norm_backward));
}

}  // namespace onepass
