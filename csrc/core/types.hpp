// Plain data that crosses the boundary between the binding and the engines. No Python, no torch, no STL.
#pragma once
#include <cstdint>

namespace onepass {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16 };
constexpr DType all_dtypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The dtype that kernels compute in and store states and statistics in: float32 for the 16-bit types.
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

// Passes a type to a generic lambda; see each engine's with_dtype().
template <class T>
struct Tag {
  using type = T;
};

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

constexpr int max_states = 4;

// The numbers that a rule carries from step to step for a parameter, besides the step count: see Carried in rule.hpp.
constexpr int max_carried = 2;
struct CarriedNumbers {
  double at[max_carried];
};

// One tensor of a launch: its memory streams and the index of its StepKey (below). The states of a 16-bit parameter are
// float32, those of any other parameter have its dtype.
struct Item {
  void* param;
  const void* grad;  // null if the rule does not read it
  void* state[max_states];
  std::int64_t size;  // elements to update
  std::int32_t key;
  // For a sparse gradient, else null. The gradient then holds the values of some rows of row_size elements each; the
  // r-th of them updates row rows[r] of param and states. The rows are distinct.
  const std::int64_t* rows;  // in the tensor's memory
  std::int64_t row_size;
};

// Whatever changes the scalars of a step and may differ between the tensors of one launch.
struct StepKey {
  double t;                // number of this step, from 1, if the host knows it
  CarriedNumbers carried;  // those of this step, if the host knows them
  float* device_step;      // else their addresses in device memory: the prepare kernel reads and advances them
  float* device_carried[max_carried];  // null if the rule carries none
  bool fresh;                          // the states were created for this step
};

// A hyper-parameter: a number, or the address of a float32 or float64 number in device memory.
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

// The same for numbers in device memory. Null: not used.
struct DeviceGradScaling {
  const double* scaled_norm;  // norm of the gradients before division by grad_scale
  double* norm;               // written: the norm after the division
  const float* grad_scale;
  const float* found_inf;
};

// What a reduction over many tensors computes; the p-norms are roots of these.
enum class Total : std::uint8_t {
  squares,
  weighted_squares,  // of products of corresponding elements of two arrays
  magnitudes,
  powers,
  largest,
  smallest
};
struct Reduction {
  Total total;
  double power;  // for Total::powers: the exponent of the magnitudes
};

// Compile-time list of the variants of one rule, which differ only in their memory streams.
template <class... Rules>
struct Variants {};

}  // namespace onepass
