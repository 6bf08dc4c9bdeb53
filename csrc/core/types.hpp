// Plain data that crosses the boundary between the binding and the engines. No Python, no torch, no STL.
#pragma once
#include <cstdint>

namespace onepass {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16 };
constexpr DType all_dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// What kernels compute in, and keep states and statistics in: float32 for the 16-bit types.
constexpr DType compute_dtype(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

// Names a type in the arguments of a generic lambda; see with_dtype() of each engine.
template <class T>
struct Tag {
  using type = T;
};

constexpr int max_states = 4;

// One tensor of a launch: its memory streams and the StepKey (below) it belongs to. States are float32 beside 16-bit
// parameters and of the parameter's type otherwise.
struct Item {
  void* param;
  const void* grad;  // null when the rule reads none
  void* state[max_states];
  std::int64_t size;  // elements to update
  std::int32_t key;
  // Of a sparse gradient, else null: the gradient holds the values of some rows of row_size elements, one after the
  // other, and param and states are tables in which the r-th of them is row rows[r]. No row comes twice.
  const std::int64_t* rows;  // where the tensor lives
  std::int64_t row_size;
};

// What may differ between the tensors of one launch and changes the scalars of a step.
struct StepKey {
  double t;               // number of this step, from 1, where the host knows it
  double product;         // and the rule's running product, see core/rule.hpp
  float* device_step;     // else where they are in device memory: read, advanced and written by the prepare kernel
  float* device_product;  // null where the rule keeps none
  bool fresh;             // the states were made for this very step
};

// A hyper-parameter: a number, or the address of one in device memory (float32 or float64).
struct Scalar {
  double value;
  const void* device;
  DType dtype;
};

// What every optimizer does to a gradient before its rule sees it; see grad_factor.hpp.
struct GradScaling {
  bool maximize;
  bool normalize;
  double epsilon;  // added to the norm that normalize divides by
  bool clip;
  double max_norm;
};

// The same, where the numbers live in device memory. Null: not used.
struct DeviceGradScaling {
  const double* scaled_norm;  // of the gradients as they came
  double* norm;               // written: the norm after division by grad_scale
  const float* grad_scale;
  const float* found_inf;
};

// What a reduction over many tensors computes; the p-norms are roots of these.
enum class Total : std::uint8_t {
  squares,
  weighted_squares,  // of each element times that of a second stream
  magnitudes,
  powers,
  largest,
  smallest
};
struct Reduction {
  Total total;
  double power;  // for powers: of the magnitudes
};

// Compile-time list of the variants of one rule: they differ in their memory streams and in nothing else.
template <class... Rules>
struct Variants {};

}  // namespace onepass
