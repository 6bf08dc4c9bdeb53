// Dropout and the norms over rows.
#include "bind/layers.hpp"

#include <pybind11/stl.h>

namespace onepass {

void bind_dropout(py::handle x, py::handle y, std::int64_t size, const DropoutArguments& dropout,
                  const py::tuple& place_arguments) {
  const Place place(place_arguments);
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
  run(tensors, call, place, &Engine::dropout);
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
    if (dtype != view.dtype && dtype != compute_dtype(view.dtype)) return false;
  }
  return !weight.is_none() || bias.is_none();
}

namespace {

// What forward and backward have in common: rows, and the dtype and number of weights.
template <class Call>
void describe_rows(Call& call, Tensors& tensors, const py::tuple& norm, std::initializer_list<py::handle> affine) {
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
    throw py::value_error("these are no rows and weights for a norm");
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

}  // namespace

void bind_row_norm(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                   const DropoutArguments& dropout, const py::tuple& place_arguments) {
  const Place place(place_arguments);
  const auto [x, residual, weight, bias] = unpack<4>(inputs);
  const auto [y, sum, stats] = unpack<3>(outputs);
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNorm call{};
  describe_rows(call, tensors, norm, {weight, bias});
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
  const Workspace workspace(engine_for(tensors.on_cuda()).row_norm_workspace(call), tensors.on_cuda(), place);
  call.workspace = workspace.address();
  run(tensors, call, place, &Engine::row_norm);
}

void bind_row_norm_backward(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                            const DropoutArguments& dropout, const py::tuple& place_arguments) {
  const Place place(place_arguments);
  const auto [dy, dsum, x, weight, stats] = unpack<5>(inputs);
  const auto [dx, dbranch, dweight, dbias] = unpack<4>(outputs);
  Tensors tensors(x);
  const std::int64_t elements = tensors.first().size;
  RowNormBackward call{};
  describe_rows(call, tensors, norm, {weight, dweight, dbias});
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
  const Workspace workspace(engine_for(tensors.on_cuda()).row_norm_backward_workspace(call), tensors.on_cuda(), place);
  call.workspace = workspace.address();
  run(tensors, call, place, &Engine::row_norm_backward);
}

}  // namespace onepass
