// Counters of what ran so far, which the Python tests look up by name in the extension.
#include <dlfcn.h>

#include "cuda_on_host.hpp"

#define ONEPASS_HOST_EXPORT extern "C" __attribute__((visibility("default")))

ONEPASS_HOST_EXPORT void onepass_host_counters(std::uint64_t* out) {
  const onepass::cuda_on_host::Counters counters = onepass::cuda_on_host::counters();
  out[0] = counters.launches, out[1] = counters.blocks, out[2] = counters.threads;
}

// Addresses, as in the library's symbol table, of the kernels that were launched; returns their number.
ONEPASS_HOST_EXPORT std::uint64_t onepass_host_kernels(std::uint64_t* out, std::uint64_t capacity) {
  Dl_info library{};
  dladdr(reinterpret_cast<const void*>(&onepass_host_kernels), &library);
  std::uint64_t n = 0;
  for (const void* kernel : onepass::cuda_on_host::launched_kernels())
    if (n++ < capacity)
      *out++ = reinterpret_cast<std::uintptr_t>(kernel) - reinterpret_cast<std::uintptr_t>(library.dli_fbase);
  return n;
}
