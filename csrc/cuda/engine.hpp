// The functions of the CUDA engine, without a CUDA header, so that the binding compiles without one.
#pragma once
#include "core/engine.hpp"

namespace onepass::cuda {

extern const Engine engine;

void reduce(const Reduce& call);
std::int64_t reduce_partials(std::int64_t size);
void join_partials(Total total, const double* partials, std::int64_t n, bool root, double* out, const StreamRef& where);

void dropout(const DropoutCall& call, const StreamRef& where);
void row_norm(const RowNorm& call, const StreamRef& where);
void row_norm_backward(const RowNormBackward& call, const StreamRef& where);
void batch_norm(const BatchNorm& call, const StreamRef& where);
void batch_norm_backward(const BatchNormBackward& call, const StreamRef& where);
std::int64_t row_norm_backward_workspace(const RowNormBackward& call);
std::int64_t batch_norm_workspace(const BatchShape& shape);

// Number of devices; 0 without a driver.
int device_count();
// Of the CUDA that this was built with, and the newest that the driver supports: 13000 for 13.0, 0 without a driver.
struct Versions {
  int built, driver;
};
Versions versions();

}  // namespace onepass::cuda
