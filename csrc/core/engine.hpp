// What the binding asks of an engine. There is one for each instruction set of the CPU and one for CUDA, all of this
// form. Plain data and functions: no Python, no torch, no STL.
#pragma once
#include "core/layers.hpp"
#include "core/types.hpp"

namespace onepass {

// Where a call runs.
struct StreamRef {
  int max_threads;  // on the CPU; no result depends on it
  int device;       // on CUDA: the engine switches to the device and back
  void* stream;     // cudaStream_t
};

// One update of a list of tensors of one dtype on one device.
struct Apply {
  DType dtype;
  const Item* items;
  std::int64_t n_items;
  const StepKey* keys;
  int n_keys;
  const Scalar* hyper;  // in the order of the rule's hyper_names
  GradScaling scaling;
  double grad_scale, norm;           // where the host knows them, else 1 and 0
  DeviceGradScaling device_scaling;  // CUDA only
  void* workspace;                   // apply_workspace(n_keys) bytes; on CUDA null where the host knows every number
  StreamRef where;
};
using ApplyFunction = void (*)(const Apply&);  // one for each variant of a rule

// Room for the prepared Steps; no rule's Step is larger than this.
constexpr std::int64_t max_step_bytes = 256;
constexpr std::int64_t apply_workspace(std::int64_t n_keys) { return n_keys * max_step_bytes; }

// Totals over a list of arrays of one dtype: partials, in float64, that Engine::join makes one of. The order of the
// additions depends on the sizes alone.
struct Reduce {
  Reduction reduction;
  DType dtype;
  const void* const* data;
  const void* const* weights;  // the second streams of Total::weighted_squares, arrays as large and of the same dtype
  const std::int64_t* sizes;
  std::int64_t n_tensors;
  double* partials;  // Engine::reduce_partials(size) for each array, one after the other
  StreamRef where;
};

struct Engine {
  void (*reduce)(const Reduce&);
  std::int64_t (*reduce_partials)(std::int64_t size);
  void (*join)(Total, const double* partials, std::int64_t n, double* out, const StreamRef&);

  // The layers. On CUDA a mask is computed again where it is needed, which is cheaper than to keep it; one that the
  // call has is written, or read, by dropout alone.
  void (*dropout)(const DropoutCall&, const StreamRef&);
  void (*row_norm)(const RowNorm&, const StreamRef&);
  void (*row_norm_backward)(const RowNormBackward&, const StreamRef&);
  void (*batch_norm)(const BatchNorm&, const StreamRef&);
  void (*batch_norm_backward)(const BatchNormBackward&, const StreamRef&);

  // Bytes of workspace that the calls need, in memory of the device.
  std::int64_t (*row_norm_workspace)(const RowNorm&);
  std::int64_t (*row_norm_backward_workspace)(const RowNormBackward&);
  std::int64_t (*batch_norm_workspace)(const BatchShape&);
};

}  // namespace onepass
