// The calls of the layers, for every engine. Plain data, no Python, no torch, no STL.
//
// F below is the type that kernels compute in: float for float32 and the 16-bit types, double for float64. Statistics
// are F. Weights and biases are of weight_dtype: the input's type, or float32 beside a 16-bit input.
#pragma once
#include "core/types.hpp"

namespace onepass {

// Dropout by a counter-based mask: element i is kept iff word i of the seed's Philox sequence is >= threshold; see
// core/philox.hpp.
struct Dropout {
  const std::int64_t* seed;  // where the tensor lives: on a GPU nothing waits for it. Null: no dropout
  std::uint64_t threshold;   // p * 2^32, rounded; 2^32 drops everything
  double scale;              // of the elements kept
};

// The dropout of n contiguous elements. Forward: x to y, and to `mask` if there is one. Backward is the same call on
// the gradient, with the mask that forward wrote (reads_mask) or without one.
struct DropoutCall {
  DType dtype;
  std::int64_t size;
  const void* x;
  void* y;             // may be x; null: only the mask is wanted
  std::uint8_t* mask;  // bit i % 8 of byte i / 8: element i is kept; the last byte is padded with zeros. May be null
  bool reads_mask;
  Dropout dropout;
};

// LayerNorm and RMSNorm over the rows of a contiguous [rows, size] array; with a residual, of
// sum = residual + dropout(x), which is kept.
struct RowNorm {
  DType dtype, weight_dtype;
  bool rms;            // RMSNorm: no mean
  bool scalar_affine;  // weight and bias have one element
  std::int64_t rows, size;
  double eps;
  const void* x;
  const void* residual;  // null: norm of x itself
  void* sum;             // with a residual
  std::uint8_t* mask;    // of the dropout; may be null, as in DropoutCall
  Dropout dropout;
  const void *weight, *bias;  // may be null
  void* y;
  void* stats;      // F[3][rows]: mean (0 for RMSNorm), 1 / standard deviation, what F(mean) leaves of the mean. On the
                    // CPU null: not kept
  void* workspace;  // row_norm_workspace() bytes of the engine
};

struct RowNormBackward {
  DType dtype, weight_dtype;
  bool rms, scalar_affine;
  std::int64_t rows, size;
  double eps;  // for statistics made anew
  const void* dy;
  const void* dsum;  // the gradient that reaches `sum` from elsewhere; may be null
  const void* x;     // what was normalised: x, or sum
  const void* weight;
  const void* stats;   // on the CPU null: made anew
  void* dx;            // the gradient of x or, with a residual, of both sum and residual
  void* dbranch;       // with a residual: that of dropout's input; null where there was no residual
  std::uint8_t* mask;  // what forward wrote, or null: recomputed
  Dropout dropout;
  void *dweight, *dbias;  // of weight_dtype; null: not wanted
  void* workspace;        // row_norm_backward_workspace() bytes of the engine
};

// BatchNorm over [batch, channels, space], or [batch, space, channels] with channels_last, followed by
// + residual and by the leaky ReLU z > 0 ? z : slope * z.
struct BatchShape {
  std::int64_t batch, channels, space;
  bool channels_last;
};

// What a call does: everything; or its statistics and what follows from them apart, between which SyncBatchNorm sums
// over the processes; or, in forward, what follows from the running statistics.
enum class Phase : std::uint8_t { all, statistics, apply, apply_running };

struct BatchNorm {
  DType dtype, weight_dtype;
  BatchShape shape;
  Phase phase;  // statistics: stats of x; apply: y by the stats given; apply_running: y by the running ones, only read
  double eps;
  const void* x;
  const void *weight, *bias, *residual;  // may be null
  bool activate;
  double slope;
  void* y;
  void* stats;  // F[3][channels], as RowNorm's; of phase statistics the second row is the biased variance
  // Phase apply_running reads them. Phase all: null, or running = (1 - momentum) * running + momentum * the batch's.
  DType running_dtype;
  void *running_mean, *running_var;
  double momentum;
  void* workspace;  // batch_norm_workspace() bytes
};

struct BatchNormBackward {
  DType dtype, weight_dtype;
  BatchShape shape;
  Phase phase;    // statistics: sums; apply: dx and dresidual by the sums and count given
  bool training;  // else the statistics are constants
  const void *dy, *x, *weight, *stats;
  const void* y;  // with activate: its sign tells which side of the activation was taken
  bool activate;
  double slope;
  void* sums;             // F[2][channels]: of dz and of dz * xhat, dz the gradient before the activation
  double count;           // elements per channel, over all processes
  void *dx, *dresidual;   // null: not wanted
  void *dweight, *dbias;  // of weight_dtype; null: not wanted; not written by phase apply
  void* workspace;        // batch_norm_workspace() bytes
};

}  // namespace onepass
