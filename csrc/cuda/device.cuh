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
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
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
