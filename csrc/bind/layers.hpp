// The extension's functions for layers. onepass._native allocates the outputs and onepass.nn settles the layouts; here
// the tensors of a call are checked against each other once more, because their addresses are about to leave Python.
#pragma once
#include "bind/layer_call.hpp"

namespace onepass {

// Arguments are tuples: tensors or None, the layer's options, and what the call runs with (see Resources).

// y: None if only the mask is wanted.
void bind_dropout(py::handle x, py::handle y, std::int64_t size, const DropoutArguments& dropout,
                  const py::tuple& resources);

// A norm with a user's unchecked arguments. Returns the elements per row; or 0, without doing anything, unless
// normalized_shape is a tuple, eps a float, and all tensors are contiguous, fit together and have no pending negation.
// inputs: x, weight, bias. outputs: y, stats.
std::int64_t try_row_norm(const py::tuple& inputs, const py::tuple& outputs, py::handle normalized_shape,
                          py::handle eps, bool rms, const py::tuple& resources);

// inputs: x, residual, weight, bias. outputs: y, sum, stats. norm: elements per row, eps, whether it is RMSNorm.
void bind_row_norm(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                   const DropoutArguments& dropout, const py::tuple& resources);
// inputs: dy, dsum, x, weight, stats. outputs: dx, dbranch, dweight, dbias.
void bind_row_norm_backward(const py::tuple& inputs, const py::tuple& outputs, const py::tuple& norm,
                            const DropoutArguments& dropout, const py::tuple& resources);

// (batch, channels, space, channels last)
using BatchShapeArguments = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>;
// (phase, eps, momentum, slope of the activation or None for no activation); phases are numbered as in core/layers.hpp
using BatchNormArguments = std::tuple<int, double, double, std::optional<double>>;
// (phase, training, elements per channel, slope)
using BatchNormBackwardArguments = std::tuple<int, bool, double, std::optional<double>>;

// inputs: x, residual, weight, bias. outputs: y, stats, running_mean, running_var.
void bind_batch_norm(const py::tuple& inputs, const py::tuple& outputs, const BatchShapeArguments& shape,
                     const BatchNormArguments& norm, const py::tuple& resources);
// inputs: dy, x, y, weight, stats. outputs: sums, dx, dresidual, dweight, dbias.
void bind_batch_norm_backward(const py::tuple& inputs, const py::tuple& outputs, const BatchShapeArguments& shape,
                              const BatchNormBackwardArguments& norm, const py::tuple& resources);

}  // namespace onepass
