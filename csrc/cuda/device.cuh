// The current device while an engine runs, and the size of a grid.
#pragma once
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

#if defined(__CUDACC__)
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = device != before_;
  }
  // Restores the caller's device, unless it has no context yet: cudaSetDevice() would create one, which takes half a
  // gigabyte per process.
  ~DeviceGuard() {
    if (changed_ && has_context(before_)) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  // Asks the driver; true if it does not answer. Its function is looked up by name, so that nothing links the driver.
  static bool has_context(int device) {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const GetState get_state = [] {
      void* found = nullptr;
      cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
      constexpr unsigned since = 7000;  // the function is there since CUDA 7.0
      const auto error =
          cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, since, cudaEnableDefault, &result);
#else
      const auto error = cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#endif
      return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<GetState>(found)
                                                                           : nullptr;
    }();
    unsigned flags = 0;
    int active = 1;
    return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
  }

  int before_ = 0;
  bool changed_ = false;
};
#else
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#endif

// For kernels whose blocks loop: a large array has more parts than the grid has blocks.
inline dim3 grid_of(std::int64_t blocks, int threads) {
  const std::int64_t most = tuning::max_threads / threads;
  return dim3(unsigned(blocks < most ? blocks : most));
}

}  // namespace onepass::cuda
