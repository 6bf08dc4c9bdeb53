// The current device while an engine runs, and the grids of its launches.
#pragma once
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

#if defined(__CUDACC__)
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  // Back to where the caller was, unless nobody has used that device yet: cudaSetDevice() would make a context there,
  // of half a gigabyte in every process.
  ~DeviceGuard() {
    if (changed_ && has_context(before_)) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  // The driver's answer; yes where it gives none. The driver is asked for by name, so that nothing links it.
  static bool has_context(int device) {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const GetState get_state = [] {
      void* found = nullptr;
      cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
      constexpr unsigned since = 7000;  // CUDA 7.0 has it
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

// Of kernels whose blocks take several turns where there is more to do.
inline dim3 grid_of(std::int64_t blocks) {
  return dim3(unsigned(blocks < tuning::max_blocks ? blocks : tuning::max_blocks));
}

}  // namespace onepass::cuda
