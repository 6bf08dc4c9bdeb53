// Kernels for test_compile_gate.py: the correct ones of the self-test, and one that breaks each rule of the gate.
#include "selftest_kernels.cuh"

namespace onepass::cuda::selftest {

template __global__ void copy<Mutant::none>(float*, const float*, int);
template __global__ void histogram<Mutant::none>(unsigned*, const unsigned char*, int);

struct Table {
  const float* in[1000];
  float* out[1000];
};

__global__ void scale_all(ONEPASS_GRID_CONSTANT(Table) table, float divisor) {
  float4 x = as_wide<float4>(table.in[blockIdx.x])[threadIdx.x];
  x.x = x.x / divisor, x.y = sqrtf(x.y);
  as_wide<float4>(table.out[blockIdx.x])[threadIdx.x] = x;
}

__global__ void narrow(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void local_array(float4* out, const float4* in, int n) {
  float local[64] = {};
  for (int i = 0; i < n; ++i) local[static_cast<int>(in[i].x) & 63] += in[i].y;
  out[n] = make_float4(local[n & 63], 0, 0, 0);
}

__global__ void __launch_bounds__(1024, 2) spills(float4* out, const float4* in) {  // 32 registers per thread
  float4 x[16];
  ONEPASS_UNROLL
  for (int i = 0; i < 16; ++i) x[i] = in[i * 1024 + threadIdx.x];
  ONEPASS_UNROLL
  for (int i = 0; i < 16; ++i) out[i * 1024 + threadIdx.x] = x[15 - i];
}

// Compiled only, to check that nvcc accepts the launching side.
void launch_copy(float* out, const float* in, int n, void* stream) {
  allow_dynamic_shared("copy", copy<Mutant::none>, 0);
  launch("copy", copy<Mutant::none>, 4, 256, 0, stream, out, in, n);
}

}  // namespace onepass::cuda::selftest
