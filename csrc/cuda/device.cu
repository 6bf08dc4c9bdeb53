// What the CUDA runtime says about devices, versions and failures.
#include "cuda/engine.hpp"
#include "cuda/platform.cuh"

#if defined(__CUDACC__)

#include <stdexcept>

#include "cuda/errors.hpp"

namespace onepass::cuda {

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  int major = 0, minor = 0;
  if (device < 0 && cudaGetDevice(&device) != cudaSuccess) device = -1;
  FailedOn where{device, 0};
  if (device >= 0 && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    where.capability = 10 * major + minor;
  cudaGetLastError();  // forgets it: it is reported here, and only once
  throw std::runtime_error(error_text(what, error, cudaGetErrorString(error), where));
}

int device_count() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

Versions versions() {
  int driver = 0;
  return {CUDART_VERSION, cudaDriverGetVersion(&driver) == cudaSuccess ? driver : 0};
}

}  // namespace onepass::cuda

#else

namespace onepass::cuda {

int device_count() { return 1; }
Versions versions() { return {0, 0}; }

}  // namespace onepass::cuda

#endif
