// The arguments of the layers, for every engine. Plain data: no Python, no torch, no STL.
//
// Below, F is the type that kernels compute in: float for float32 and the 16-bit types, double for float64. Statistics
// are F. Weights and biases have weight_dtype: the input's dtype, or float32 with a 16-bit input.
#pragma once
#include "core/types.hpp"

namespace onepass {

// Dropout by a counter-based mask: element i is kept if and only if word i of the seed's Philox sequence is
// >= threshold; see core/philox.hpp.
struct Dropout {
  const std::int64_t* seed;  // in the tensor's memory, so that the host never waits for a GPU. Null: no dropout
  std::uint64_t threshold;   // p * 2^32, rounded; 2^32 drops everything
  double scale;              // of the elements kept
};

// Dropout of `size` contiguous elements. Forward reads x and writes y, and `mask` unless it is null. Backward is the
// same call on the gradient; it reads the mask that forward wrote (reads_mask) or recomputes it.
struct DropoutCall {
  DType dtype;
  std::int64_t size;
  const void* x;
  void* y;             // may be x; null: only the mask is written
  std::uint8_t* mask;  // bit i % 8 of byte i / 8: element i is kept; the last byte is padded with zeros. May be null
  bool reads_mask;
  Dropout dropout;
};

// LayerNorm and RMSNorm over the rows of a contiguous [rows, size] array: of x or, with a residual, of
// sum = residual + dropout(x), which is stored too.
struct RowNorm {
  DType dtype, weight_dtype;
  bool rms;            // RMSNorm: no mean
  bool scalar_affine;  // weight and bias have one element
  std::int64_t rows, size;
  double eps;
  const void* x;
  const void* residual;  // null: norm of x itself
  void* sum;             // written if there is a residual
  std::uint8_t* mask;    // the dropout's, as in DropoutCall; may be null
  Dropout dropout;
  const void *weight, *bias;  // may be null
  void* y;
  void* stats;      // F[3][rows]: mean (0 for RMSNorm), 1 / standard deviation, mean - F(mean). On the CPU it may be
                    // null: not stored
  void* workspace;  // the engine's row_norm_workspace() bytes
};

struct RowNormBackward {
  DType dtype, weight_dtype;
  bool rms, scalar_affine;
  std::int64_t rows, size;
  double eps;  // for recomputed statistics
  const void* dy;
  const void* dsum;  // the gradient that reaches `sum` from its other users; may be null
  const void* x;     // the array that was normalised: x, or sum
  const void* weight;
  const void* stats;   // on the CPU it may be null: recomputed
  void* dx;            // the gradient of x or, with a residual, of both sum and residual
  void* dbranch;       // with a residual: the gradient of dropout's input; else null
  std::uint8_t* mask;  // as forward wrote it, or null: recomputed
  Dropout dropout;
  void *dweight, *dbias;  // of weight_dtype; null: not needed
  void* workspace;        // the engine's row_norm_backward_workspace() bytes
};

// BatchNorm over [batch, channels, space], or over [batch, space, channels] with channels_last; then "+ residual" and
// the leaky ReLU z > 0 ? z : slope * z, where the call has them.
struct BatchShape {
  std::int64_t batch, channels, space;
  bool channels_last;
};

// Which part of the work a call does. SyncBatchNorm calls `statistics`, sums over the processes, then calls `apply`.
// `apply_running`, in forward only, normalises by the running statistics.
enum class Phase : std::uint8_t { all, statistics, apply, apply_running };

struct BatchNorm {
  DType dtype, weight_dtype;
  BatchShape shape;
  Phase phase;  // statistics: stats from x; apply: y from stats; apply_running: y from the running ones, read only
  double eps;
  const void* x;
  const void *weight, *bias, *residual;  // may be null
  bool activate;
  double slope;
  void* y;
  void* stats;  // F[3][channels], as RowNorm's; phase statistics stores the biased variance in the second row
  // Phase apply_running reads them. Phase all: null, or running = (1 - momentum) * running + momentum * batch.
  DType running_dtype;
  void *running_mean, *running_var;
  double momentum;
  void* workspace;  // batch_norm_workspace() bytes
};

struct BatchNormBackward {
  DType dtype, weight_dtype;
  BatchShape shape;
  Phase phase;    // statistics: sums; apply: dx and dresidual from sums and count
  bool training;  // else the statistics are constants
  const void *dy, *x, *weight, *stats;
  const void* y;  // with activate: its sign tells which branch of the activation was taken
  bool activate;
  double slope;
  void* sums;             // F[2][channels]: of dz and of dz * xhat; dz is the gradient before the activation
  double count;           // elements per channel, over all processes
  void *dx, *dresidual;   // null: not needed
  void *dweight, *dbias;  // of weight_dtype; null: not needed; phase apply does not write them
  void* workspace;        // batch_norm_workspace() bytes
};

}  // namespace onepass
