// The binding of BatchNorm.
#include <pybind11/stl.h>

#include "bind/layers.hpp"

namespace onepass {
namespace {

// Fills in what forward and backward share: the shape, and the dtype of the weights, taken from the first one present.
template <class Call>
void fill_batch(Call& call, Tensors& tensors, const BatchShapeArguments& shape,
                std::initializer_list<py::handle> affine) {
  const auto& [batch, channels, space, channels_last] = shape;
  call.shape = {batch, channels, space, channels_last};
  if (batch * channels * space != tensors.first().size)
    throw py::value_error("x does not have the shape given for its batch norm");
  call.dtype = tensors.first().dtype;
  call.weight_dtype = compute_dtype(call.dtype);
  for (const py::handle tensor : affine)
    if (!tensor.is_none()) {
      call.weight_dtype = tensors.view(tensor, "weight").dtype;
      break;
    }
  if (call.weight_dtype != call.dtype && call.weight_dtype != compute_dtype(call.dtype))
    throw py::value_error("weights must have the input's dtype or the dtype that kernels compute in");
}

template <class Call>
void run_batch(const Tensors& tensors, Call& call, const Resources& resources,
               void (*Engine::*layer)(const Call&, const StreamRef&)) {
  if (tensors.first().size == 0) return;
  const bool on_cuda = tensors.on_cuda();
  const Workspace workspace(engine_for(on_cuda).batch_norm_workspace(call.shape), on_cuda, resources);
  call.workspace = workspace.address();
  run(tensors, call, resources, layer);
}

}  // namespace

void bind_batch_norm(const py::tuple& inputs, const py::tuple& outputs, const BatchShapeArguments& shape,
                     const BatchNormArguments& norm, const py::tuple& resource_arguments) {
  const Resources resources(resource_arguments);
  const auto [x, residual, weight, bias] = unpack<4>(inputs);
  const auto [y, stats, running_mean, running_var] = unpack<4>(outputs);
  const auto& [phase, eps, momentum, slope] = norm;
  Tensors tensors(x, std::get<3>(shape));
  const std::int64_t elements = tensors.first().size;
  BatchNorm call{};
  fill_batch(call, tensors, shape, {weight, bias});
  const std::int64_t channels = call.shape.channels;
  call.phase = static_cast<Phase>(phase);
  call.eps = eps;
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, channels, "weight");
  call.bias = tensors.optional(bias, call.weight_dtype, channels, "bias");
  call.residual = tensors.optional(residual, call.dtype, elements, "residual");
  call.activate = slope.has_value();
  call.slope = slope.value_or(0);
  if (call.phase != Phase::statistics) call.y = tensors.output(y, call.dtype, elements, "y");
  call.stats = tensors.address(stats, compute_dtype(call.dtype), 3 * channels, "stats");
  if (!running_mean.is_none()) {
    call.running_dtype = tensors.view(running_mean, "running_mean").dtype;
    call.running_mean = tensors.address(running_mean, call.running_dtype, channels, "running_mean");
    call.running_var = tensors.address(running_var, call.running_dtype, channels, "running_var");
    call.momentum = momentum;
  }
  if (call.phase == Phase::apply_running && call.running_mean == nullptr)
    throw py::value_error("a batch norm by running statistics needs running_mean and running_var");
  run_batch(tensors, call, resources, &Engine::batch_norm);
}

void bind_batch_norm_backward(const py::tuple& inputs, const py::tuple& outputs, const BatchShapeArguments& shape,
                              const BatchNormBackwardArguments& norm, const py::tuple& resource_arguments) {
  const Resources resources(resource_arguments);
  const auto [dy, x, y, weight, stats] = unpack<5>(inputs);
  const auto [sums, dx, dresidual, dweight, dbias] = unpack<5>(outputs);
  const auto& [phase, training, count, slope] = norm;
  Tensors tensors(x, std::get<3>(shape));
  const std::int64_t elements = tensors.first().size;
  BatchNormBackward call{};
  fill_batch(call, tensors, shape, {weight, dweight, dbias});
  const std::int64_t channels = call.shape.channels;
  const DType compute = compute_dtype(call.dtype);
  call.phase = static_cast<Phase>(phase);
  call.training = training;
  call.count = count;
  call.dy = tensors.address(dy, call.dtype, elements, "dy");
  call.x = tensors.address(x, call.dtype, elements, "x");
  call.weight = tensors.optional(weight, call.weight_dtype, channels, "weight");
  call.stats = tensors.address(stats, compute, 3 * channels, "stats");
  call.activate = slope.has_value();
  call.slope = slope.value_or(0);
  call.y = call.activate ? tensors.address(y, call.dtype, elements, "y") : nullptr;
  call.sums = tensors.optional(sums, compute, 2 * channels, "sums");
  if (call.phase != Phase::all && call.sums == nullptr)
    throw py::value_error("the phases statistics and apply of a backward need sums");
  call.dx = tensors.optional_output(dx, call.dtype, elements, "dx");
  call.dresidual = tensors.optional_output(dresidual, call.dtype, elements, "dresidual");
  call.dweight = tensors.optional(dweight, call.weight_dtype, channels, "dweight");
  call.dbias = tensors.optional(dbias, call.weight_dtype, channels, "dbias");
  run_batch(tensors, call, resources, &Engine::batch_norm_backward);
}

}  // namespace onepass
