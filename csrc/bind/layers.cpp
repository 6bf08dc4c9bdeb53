// The bindings of dropout and of the norms over rows.
#include "bind/layers.hpp"

#include <pybind11/stl.h>

namespace onepass {

void bind_dropout(py::handle x, py::handle y, std::int64_t size, const DropoutArguments& dropout,
                  const py::tuple& resource_arguments) {
  const Resources resources(resource_arguments);
  Tensors tensors(x);
  DropoutCall call{};
  call.dtype = tensors.first().dtype;
  call.size = size;
  if (!y.is_none()) {
    call.x = tensors.address(x, call.dtype, size, "x");
    call.y = tensors.output(y, call.dtype, size, "y");
  }
  call.dropout = tensors.dropout(dropout);
  call.mask = tensors.mask(dropout, size);
  call.reads_mask = dropout && std::get<4>(*dropout);
  run(tensors, call, resources, &Engine::dropout);
}

namespace {

// Fills in what forward and backward share: the rows, and the dtype and size of the weights.
template <class Call>
void fill_rows(Call& call, Tensors& tensors, const py::tuple& norm, std::initializer_list<py::handle> affine) {
  const auto [size_, eps, rms] = unpack<3>(norm);
  const std::int64_t size = PyLong_AsLongLong(size_.ptr()), elements = tensors.first().size;
  call.dtype = tensors.first().dtype;
  call.weight_dtype = compute_dtype(call.dtype);
  std::int64_t affine_size = size;
  for (const py::handle tensor : affine)
    if (!tensor.is_none()) {
      const TensorView view = tensors.view(tensor, "weight");
      call.weight_dtype = view.dtype;
      affine_size = view.size;
    }
  if (size < 1 || elements % size != 0 || (affine_size != size && affine_size != 1) ||
      (call.weight_dtype != call.dtype && call.weight_dtype != compute_dtype(call.dtype)))
    throw py::value_error("x does not consist of whole rows, or a weight has a size or dtype that the norm cannot use");
  call.size = size;
  call.rows = elements / size;
  call.eps = PyFloat_AsDouble(eps.ptr());
  call.rms = rms.ptr() == Py_True;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  call.scalar_affine = affine_size != size;
}

template <class Call>
std::int64_t affine_size(const Call& call) {
  return call.scalar_affine ? 1 : call.size;
}

void run_rows(const Tensors& tensors, RowNorm& call, const Resources& resources) {
  const bool on_cuda = tensors.on_cuda();
  const Workspace workspace(engine_for(on_cuda).row_norm_workspace(call), on_cuda, resources);
  call.workspace = workspace.address();
  run(tensors, call, resources, &Engine::row_norm);
}

// Whether `shape` is a tuple and equals the last dimensions of the tensor. Raises nothing.
bool ends_with(const TensorView& tensor, py::handle shape) {
  if (!PyTuple_Check(shape.ptr())) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims == 0 || dims > tensor.ndim) return false;
  for (Py_ssize_t d = 0; d < dims; ++d)
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d)) != tensor.shape[tensor.ndim - dims + d]) {
      PyErr_Clear();
      return false;
    }
  return true;
}

// Whether the kernel can use this weight or bias: it is normalized_shape or 0-d, on x's device, and of x's dtype or of
// float32 with a 16-bit x.
bool is_usable_affine(const TensorView& affine, const TensorView& x, py::handle normalized_shape) {
  if (affine.ndim != 0 && (affine.ndim != PyTuple_GET_SIZE(normalized_shape.ptr()) ||
                           !ends_with(affine, normalized_shape) || !affine.is_contiguous()))
    return false;
  return affine.device_type == x.device_type && affine.device == x.device &&
         (affine.dtype == x.dtype || affine.dtype == compute_dtype(x.dtype));
}

}  // namespace

std::int64_t try_row_norm(const py::tuple& inputs, const py::tuple& outputs, py::handle normalized_shape,
                          py::handle eps, bool rms, const py::tuple& resources) {
  const auto [x, weight, bias] = unpack<3>(inputs);
  const auto [y, stats] = unpack<2>(outputs);
  Layouts layouts;
  TensorView rows, weights, biases;
  const auto can_read = [&](py::handle tensor, TensorView& view) {
    return reader->read(tensor.ptr(), view, layouts) && !is_negated(tensor.ptr());
  };
  if (!PyFloat_Check(eps.ptr()) || !can_read(x, rows) || !rows.is_contiguous() || rows.size == 0 ||
      !ends_with(rows, normalized_shape))
    return 0;
  if (!weight.is_none() && (!can_read(weight, weights) || !is_usable_affine(weights, rows, normalized_shape))) return 0;
  if (!bias.is_none() && (!can_read(bias, biases) || !is_usable_affine(biases, rows, normalized_shape))) return 0;
  // Backward computes the gradient of a bias without a weight in one dimension.
  if (!bias.is_none() &&
      (weight.is_none() ? biases.ndim != 1 : biases.ndim != weights.ndim || biases.dtype != weights.dtype))
    return 0;
  const TensorView* const affine = !weight.is_none() ? &weights : !bias.is_none() ? &biases : nullptr;

  RowNorm call{};
  call.dtype = rows.dtype;
  call.weight_dtype = affine == nullptr ? compute_dtype(rows.dtype) : affine->dtype;
  call.size = 1;
  for (Py_ssize_t d = 1; d <= PyTuple_GET_SIZE(normalized_shape.ptr()); ++d) call.size *= rows.shape[rows.ndim - d];
  call.rows = rows.size / call.size;
  call.scalar_affine = affine != nullptr && affine->size != call.size;
  call.eps = PyFloat_AS_DOUBLE(eps.ptr());
  call.rms = rms;
  call.dropout = {nullptr, 0, 1};
  call.x = rows.data;
  call.weight = weights.data;
  call.bias = biases.data;
  Tensors tensors(rows);
  call.y = tensors.output(y, call.dtype, rows.size, "y");
  call.stats = tensors.statistics(stats, compute_dtype(call.dtype), 3 * call.rows);
  run_rows(tensors, call, Resources(resources));
  return call.size;
}

void bind_row_norm(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                   const DropoutArguments& dropout, const py::tuple& resource_arguments) {
  const Resources resources(resource_arguments);
  const auto [x, residual, weight, bias] = unpack<4>(inputs);
  const auto [y, sum, stats] = unpack<3>(outputs);
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNorm call{};
  fill_rows(call, tensors, norm, {weight, bias});
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.residual = tensors.optional(residual, call.dtype, elements, "residual");
  if (call.residual != nullptr) call.sum = tensors.output(sum, call.dtype, elements, "sum");
  call.dropout = tensors.dropout(dropout);
  call.mask = tensors.mask(dropout, elements);
  call.weight = tensors.optional(weight, call.weight_dtype, affine_size(call), "weight");
  call.bias = tensors.optional(bias, call.weight_dtype, affine_size(call), "bias");
  call.y = tensors.output(y, call.dtype, elements, "y");
  call.stats = tensors.statistics(stats, compute_dtype(call.dtype), 3 * call.rows);
  if (elements == 0) return;
  run_rows(tensors, call, resources);
}

void bind_row_norm_backward(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                            const DropoutArguments& dropout, const py::tuple& resource_arguments) {
  const Resources resources(resource_arguments);
  const auto [dy, dsum, x, weight, stats] = unpack<5>(inputs);
  const auto [dx, dbranch, dweight, dbias] = unpack<4>(outputs);
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNormBackward call{};
  fill_rows(call, tensors, norm, {weight, dweight, dbias});
  call.dy = tensors.address(dy, call.dtype, elements, "dy");
  call.dsum = tensors.optional(dsum, call.dtype, elements, "dsum");
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, affine_size(call), "weight");
  call.stats = tensors.statistics(stats, compute_dtype(call.dtype), 3 * call.rows);
  call.dx = tensors.optional_output(dx, call.dtype, elements, "dx");
  call.dbranch = tensors.optional_output(dbranch, call.dtype, elements, "dbranch");
  call.dropout = tensors.dropout(dropout);
  call.mask = tensors.mask(dropout, elements);
  call.dweight = tensors.optional(dweight, call.weight_dtype, affine_size(call), "dweight");
  call.dbias = tensors.optional(dbias, call.weight_dtype, affine_size(call), "dbias");
  if (elements == 0) return;
  const Workspace workspace(engine_for(tensors.on_cuda()).row_norm_backward_workspace(call), tensors.on_cuda(),
                            resources);
  call.workspace = workspace.address();
  run(tensors, call, resources, &Engine::row_norm_backward);
}

}  // namespace onepass
