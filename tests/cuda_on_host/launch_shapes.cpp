// Which kernels a call launches, and in what shape: the engine's own host code, with launches that are written down
// instead of run. machine_model.py reads the answers. A call is a line of the input,
//   KIND DTYPE NUMBER...
// and its launches are lines of the output, each with the kernel's address in this program's symbol table:
//   NAME ADDRESS GRID BLOCK DYNAMIC_SHARED [THE KERNEL'S INTEGER ARGUMENTS...]
// with an empty line after the last one. No memory is touched, so pointers are addresses that nothing stands at.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/engine.hpp"
#include "cuda/engine.hpp"
#include "cuda_on_host.hpp"

namespace onepass::cuda {
extern const ApplyFunction* const adam_table;  // the first of each rule's variants
extern const ApplyFunction* const sgd_table;
}  // namespace onepass::cuda

namespace {

using namespace onepass;
using Numbers = std::vector<std::int64_t>;

void* array(int number, std::int64_t offset = 0) {
  return reinterpret_cast<void*>((std::uintptr_t(number) << 40) + std::uintptr_t(offset));
}

DType dtype_named(const std::string& name) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};  // in DType's order
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return DType(i);
  throw std::runtime_error("no dtype '" + name + "'");
}

// ROWS SIZE RMS(0|1) RESIDUAL(0|1)
RowNorm row_norm_of(DType dtype, const Numbers& n) {
  RowNorm call{};
  call.dtype = dtype, call.weight_dtype = DType::float32, call.rows = n.at(0), call.size = n.at(1), call.rms = n.at(2);
  call.x = array(1), call.weight = array(2), call.bias = array(3), call.y = array(4), call.stats = array(5);
  if (n.at(3)) call.residual = array(6), call.sum = array(7);
  return call;
}
RowNormBackward row_norm_backward_of(DType dtype, const Numbers& n) {
  RowNormBackward call{};
  call.dtype = dtype, call.weight_dtype = DType::float32, call.rows = n.at(0), call.size = n.at(1), call.rms = n.at(2);
  call.dy = array(1), call.x = array(2), call.weight = array(3), call.stats = array(4), call.dx = array(5);
  call.dweight = array(6), call.dbias = array(7), call.workspace = array(8);
  if (n.at(3)) call.dsum = array(9);
  return call;
}

// BATCH CHANNELS SPACE CHANNELS_LAST(0|1)
BatchShape batch_shape(const Numbers& n) { return {n.at(0), n.at(1), n.at(2), n.at(3) != 0}; }

BatchNorm batch_norm_of(DType dtype, const Numbers& n) {
  BatchNorm call{};
  call.dtype = dtype, call.weight_dtype = DType::float32, call.shape = batch_shape(n), call.phase = Phase::all;
  call.x = array(1), call.weight = array(2), call.bias = array(3), call.y = array(4), call.stats = array(5);
  call.workspace = array(6);
  return call;
}
BatchNormBackward batch_norm_backward_of(DType dtype, const Numbers& n) {
  BatchNormBackward call{};
  call.dtype = dtype, call.weight_dtype = DType::float32, call.shape = batch_shape(n), call.phase = Phase::all;
  call.training = true;
  call.dy = array(1), call.x = array(2), call.weight = array(3), call.stats = array(4), call.dx = array(5);
  call.dweight = array(6), call.dbias = array(7), call.workspace = array(8);
  call.count = double(call.shape.batch * call.shape.space);
  return call;
}

// TENSORS SIZE BYTES_OF_MISALIGNMENT(of the gradients)
void update(ApplyFunction apply, DType dtype, const Numbers& n) {
  std::vector<Item> items(std::size_t(n.at(0)),
                          Item{array(1), array(2, n.at(2)), {array(3), array(4)}, n.at(1), 0, nullptr, 0});
  const StepKey key{1, {}, nullptr, {}, false};
  const std::vector<Scalar> hyper(16, Scalar{0.5, nullptr, DType::float64});
  Apply call{};
  call.dtype = dtype, call.items = items.data(), call.n_items = n.at(0);
  call.keys = &key, call.n_keys = 1, call.hyper = hyper.data(), call.grad_scale = 1;
  apply(call);
}

void norm_of_list(DType dtype, const Numbers& n) {
  const std::vector<const void*> data(std::size_t(n.at(0)), array(1, n.at(2)));
  const std::vector<std::int64_t> sizes(data.size(), n.at(1));
  Reduce call{};
  call.reduction.total = Total::squares, call.dtype = dtype;
  call.data = data.data(), call.sizes = sizes.data(), call.n_tensors = n.at(0);
  call.partials = static_cast<double*>(array(2));
  cuda::reduce(call);
}

// SIZE
void drop(DType dtype, const Numbers& n) {
  DropoutCall call{};
  call.dtype = dtype, call.size = n.at(0), call.x = array(1), call.y = array(2);
  call.dropout = {static_cast<const std::int64_t*>(array(3)), 1u << 30, 1};
  cuda::dropout(call, {});
}

void call_of(const std::string& kind, DType dtype, const Numbers& n) {
  if (kind == "row_norm") return cuda::row_norm(row_norm_of(dtype, n), {});
  if (kind == "row_norm_backward") return cuda::row_norm_backward(row_norm_backward_of(dtype, n), {});
  if (kind == "batch_norm") return cuda::batch_norm(batch_norm_of(dtype, n), {});
  if (kind == "batch_norm_backward") return cuda::batch_norm_backward(batch_norm_backward_of(dtype, n), {});
  if (kind == "adam") return update(cuda::adam_table[0], dtype, n);
  if (kind == "sgd") return update(cuda::sgd_table[0], dtype, n);
  if (kind == "norm") return norm_of_list(dtype, n);
  if (kind == "dropout") return drop(dtype, n);
  throw std::runtime_error("no kind '" + kind + "'");
}

void write_down(const char* name, const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_shared,
                const std::vector<long long>& integers) {
  std::printf("%s %llx %llu %llu %zu", name, static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(kernel)),
              1ull * grid.x * grid.y * grid.z, 1ull * block.x * block.y * block.z, dynamic_shared);
  for (const long long number : integers) std::printf(" %lld", number);
  std::printf("\n");
}

}  // namespace

int main() {
  onepass::cuda_on_host::instead_of_running = &write_down;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string kind, dtype;
    words >> kind >> dtype;
    Numbers numbers;
    for (std::int64_t n; words >> n;) numbers.push_back(n);
    try {
      call_of(kind, dtype_named(dtype), numbers);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "launch_shapes: '%s': %s\n", line.c_str(), error.what());
      return 2;
    }
    std::printf("\n");
  }
}
