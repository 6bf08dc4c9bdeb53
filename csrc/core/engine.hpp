// The interface between the binding and the engines: one engine per CPU instruction set, and one for CUDA. Plain data
// and functions: no Python, no torch, no STL.
#pragma once
#include "core/layers.hpp"
#include "core/storage.hpp"
#include "core/types.hpp"

namespace onepass {

// Where a call runs.
struct StreamRef {
  int max_threads;  // CPU; no result depends on it
  int device;       // CUDA; the engine makes it current and restores the previous one
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
  double grad_scale, norm;           // 1 and 0 if the host does not know them
  DeviceGradScaling device_scaling;  // CUDA only
  void* workspace;                   // apply_workspace(n_keys) bytes; on CUDA null if the host knows every number
  StreamRef where;
  const Storage* storage;  // one per item; null if all are in the dtype of arithmetic
};
using ApplyFunction = void (*)(const Apply&);  // one per variant of a rule

// The workspace holds the prepared Steps; no rule's Step is larger than this.
constexpr std::int64_t max_step_bytes = 256;
constexpr std::int64_t apply_workspace(std::int64_t n_keys) { return n_keys * max_step_bytes; }

// Totals over a list of arrays of one dtype: float64 partials, which Engine::join combines into one. The order of the
// additions depends only on the sizes.
struct Reduce {
  Reduction reduction;
  DType dtype;
  const void* const* data;
  const void* const* weights;  // for Total::weighted_squares: a second array per array, of the same size and dtype
  const std::int64_t* sizes;
  std::int64_t n_tensors;
  double* partials;  // Engine::reduce_partials(size) per array, in the order of the arrays
  StreamRef where;
};

struct Engine {
  void (*reduce)(const Reduce&);
  std::int64_t (*reduce_partials)(std::int64_t size);
  // root: write the total's square root.
  void (*join)(Total, const double* partials, std::int64_t n, bool root, double* out, const StreamRef&);

  // The layers. On CUDA backward recomputes the dropout mask, which is cheaper than storing it; only `dropout` reads or
  // writes a mask given in a call.
  void (*dropout)(const DropoutCall&, const StreamRef&);
  void (*row_norm)(const RowNorm&, const StreamRef&);
  void (*row_norm_backward)(const RowNormBackward&, const StreamRef&);
  void (*batch_norm)(const BatchNorm&, const StreamRef&);
  void (*batch_norm_backward)(const BatchNormBackward&, const StreamRef&);

  // Bytes of workspace that the calls need, in the device's memory.
  std::int64_t (*row_norm_workspace)(const RowNorm&);
  std::int64_t (*row_norm_backward_workspace)(const RowNormBackward&);
  std::int64_t (*batch_norm_workspace)(const BatchShape&);
};

}  // namespace onepass
