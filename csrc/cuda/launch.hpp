// What the binding asks of the CUDA engines. No CUDA header: the binding compiles without one.
#pragma once
#include "core/layers.hpp"
#include "core/types.hpp"

namespace onepass::cuda {

// Device and stream of a launch; the engines switch to the device and back.
struct Where {
  int device;
  void* stream;  // cudaStream_t
};

// One update of a list of tensors of one dtype on one device.
struct Apply {
  DType dtype;
  const Item* items;
  std::int64_t n_items;
  const Use* uses;
  int n_uses;
  const Scalar* hyper;
  GradScaling scaling;
  DeviceGradScaling device_scaling;
  double grad_scale;  // where the host knows it, else 1
  void* workspace;    // workspace_bytes(n_uses), or null where nothing is read from device memory
  Where where;
};
using ApplyFunction = void (*)(const Apply&);

// Room for the Steps that the prepare kernel writes; no rule's Step is larger than this.
constexpr std::int64_t max_step_bytes = 256;
constexpr std::int64_t workspace_bytes(std::int64_t n_uses) { return n_uses * max_step_bytes; }

// partials[i]: the total of the i-th chunk of this list, in float64.
struct Reduce {
  Reduction reduction;
  DType dtype;
  const void* const* data;
  const void* const* weights;  // the second streams of Total::weighted_squares, arrays as large and of the same dtype
  const std::int64_t* sizes;
  std::int64_t n_tensors;
  double* partials;
  Where where;
};
void reduce(const Reduce& call);
std::int64_t reduce_chunks(std::int64_t size);

// *out: the partials joined, in an order that n alone decides.
void join_partials(Total total, const double* partials, std::int64_t n, double* out, const Where& where);

// The layers; see core/layers.hpp. Workspaces are on the device. A mask is made anew where that is needed, which is
// cheaper than to keep it; one that the call has is written, or read, by dropout() alone.
void dropout(const DropoutCall& call, const Where& where);
void row_norm(const RowNorm& call, const Where& where);
void row_norm_backward(const RowNormBackward& call, const Where& where);
std::int64_t row_norm_backward_workspace(std::int64_t rows, std::int64_t size, DType dtype);
void batch_norm(const BatchNorm& call, const Where& where);
void batch_norm_backward(const BatchNormBackward& call, const Where& where);
std::int64_t batch_norm_workspace(const BatchShape& shape);

// Number of devices; 0 without a driver.
int device_count();

}  // namespace onepass::cuda
