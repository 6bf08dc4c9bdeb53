// What a failed call of the CUDA runtime says to the user: kernel, device, cause and remedy.
#pragma once
#include <driver_types.h>

#include <string>

namespace onepass::cuda {

// The device that the failed call was made for.
struct FailedOn {
  int device;      // negative if there is none
  int capability;  // 90 for sm_90; 0 if the runtime did not say
};

inline const char* remedy_of(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "This build has no code that this GPU and driver can run: python -m onepass lists its architectures. "
             "Build "
             "with ONEPASS_CUDA_ARCHS=native on this machine, or install a newer driver.";
    case cudaErrorInsufficientDriver:
      return "The driver is older than the CUDA of this build: install a newer driver, or build with an older nvcc.";
    case cudaErrorNoDevice: return "The driver shows this process no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES.";
    case cudaErrorMemoryAllocation:
      return "The GPU has no memory left, for the kernel's code or the process itself: free some, or let torch keep "
             "less in its cache "
             "(torch.cuda.empty_cache()).";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return "A kernel that ran before, of any library in this process, has failed, and the GPU runs nothing more for "
             "it: "
             "restart the process. CUDA_LAUNCH_BLOCKING=1 shows which call it was.";
    default: return "CUDA_LAUNCH_BLOCKING=1 shows whether an earlier call caused it.";
  }
}

// `what`: a kernel, or a function of the runtime; `cause`: the runtime's own words.
inline std::string error_text(const char* what, cudaError_t error, const char* cause, const FailedOn& where) {
  std::string text = std::string("onepass: ") + what + " failed";
  if (where.device >= 0) text += " on cuda:" + std::to_string(where.device);
  if (where.capability > 0) text += " (sm_" + std::to_string(where.capability) + ")";
  return text + ": " + cause + ". " + remedy_of(error);
}

}  // namespace onepass::cuda
