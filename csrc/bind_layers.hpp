// The layers' entries of the extension. Tensors come from onepass._native.layers, which makes outputs and sees to
// layouts; here they are read and checked against each other once more, because an address is about to leave Python.
#pragma once
#include <optional>
#include <tuple>

#include "bind_tensor.hpp"

namespace onepass {

// A call ends with where it runs: threads for the CPU; for CUDA the stream, and room(bytes), a function that gives a
// uint8 tensor on the device.

// A dropout: the seed (0-d, int64), p, whether it is inverted, the packed mask (uint8) or None, whether to read it.
using DropoutArguments = std::optional<std::tuple<py::object, double, bool, py::object, bool>>;

void bind_dropout(py::handle x, py::handle y, std::int64_t size, const DropoutArguments& dropout, int threads,
                  std::uintptr_t stream);

// Whether the binding below can take a call of layer_norm or rms_norm as it is: one normalised dimension, everything
// contiguous and matching, no sign pending. Asked in Python the same takes longer than a tiny norm.
bool is_usual_norm(py::handle x, py::handle normalized_shape, py::handle weight, py::handle bias, py::handle eps);

void bind_row_norm(py::handle x, py::handle residual, py::handle sum, py::handle weight, py::handle bias, py::handle y,
                   py::handle stats, std::int64_t size, double eps, bool rms, const DropoutArguments& dropout,
                   int threads, std::uintptr_t stream, py::handle room);

void bind_row_norm_backward(py::handle dy, py::handle dsum, py::handle x, py::handle weight, py::handle stats,
                            py::handle dx, py::handle dbranch, py::handle dweight, py::handle dbias, std::int64_t size,
                            double eps, bool rms, const DropoutArguments& dropout, int threads, std::uintptr_t stream,
                            py::handle room);

// shape: (batch, channels, space, channels last). half: 0 both, 1 first, 2 second, 3 running; see core/layers.hpp.
// slope: of the activation, None for none.
using BatchShapeArguments = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>;

void bind_batch_norm(py::handle x, py::handle weight, py::handle bias, py::handle residual, py::handle y,
                     py::handle stats, py::handle running_mean, py::handle running_var,
                     const BatchShapeArguments& shape, int half, double eps, double momentum,
                     std::optional<double> slope, int threads, std::uintptr_t stream, py::handle room);

void bind_batch_norm_backward(py::handle dy, py::handle x, py::handle y, py::handle weight, py::handle stats,
                              py::handle sums, py::handle dx, py::handle dresidual, py::handle dweight,
                              py::handle dbias, const BatchShapeArguments& shape, int half, bool training, double count,
                              std::optional<double> slope, int threads, std::uintptr_t stream, py::handle room);

}  // namespace onepass
