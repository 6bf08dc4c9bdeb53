// Runs CUDA kernels as host code, for tests: g++ compiles the project's CUDA sources with this header instead of the
// CUDA runtime, and launch() executes them on the calling thread. It needs CUDA's headers, but neither nvcc nor a GPU.
//
//   g++ -x c++ -std=c++17 -ffp-contract=off -fno-strict-aliasing -DONEPASS_CUDA_ON_HOST
//       -I csrc -I tests/cuda_on_host -isystem <cuda>/include kernels.cu
//
// Blocks run one after another; the threads of a block are fibers (fibers.hpp, scheduler.hpp) that wait for one another
// at barriers and warp collectives. Mistakes are detected as follows:
//   - always, as an exception from launch(): barriers and collectives that diverge or wait for a thread that returned,
//     misaligned wide accesses, shared arrays over the limit or overrun, invalid launches;
//   - always, as NaN: the use of uninitialised shared memory;
//   - with -fsanitize=address,undefined: accesses out of bounds, also of shared arrays;
//   - with -fsanitize=thread: missing barriers, atomics and fences, whatever the order in which the threads ran.
// It cannot detect rounding that differs on a GPU, speed, registers and spills (compile_gate.py does), mistakes with
// streams or graphs, and blocks that wait for one another (they hang).
//
// The order of threads and blocks is ONEPASS_HOST_ORDER = forward | reverse | random[:seed], or that given to
// set_thread_order().
#pragma once

#if defined(__CUDACC__)
#error "for a host compiler; nvcc needs none of this"
#endif

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "intrinsics.hpp"
#include "scheduler.hpp"

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

inline std::mutex launch_mutex;  // one launch at a time; also guards the variables below
inline std::map<const void*, std::size_t> allowed_dynamic_shared;
inline std::set<const void*> kernels_so_far;
inline bool order_is_set = false;

// If set, launches are passed to it and not run; with the kernel's integer arguments. See launch_shapes.cpp.
inline void (*instead_of_running)(const char* name, const void* kernel, dim3 grid, dim3 block,
                                  std::size_t dynamic_shared, const std::vector<long long>& integers) = nullptr;

template <class T>
void append_integer(std::vector<long long>& to, const T& argument) {
  if constexpr (std::is_integral_v<T>) to.push_back(static_cast<long long>(argument));
}

// The same order and seed give the same schedule.
inline void set_order_locked(ThreadOrder order, std::uint64_t seed) {
  machine.order = order;
  machine.random_state = 0x9E3779B97F4A7C15u ^ seed * 0xD1342543DE82EF95u;
  if (machine.random_state == 0) machine.random_state = 1;
  order_is_set = true;
}
inline void set_thread_order(ThreadOrder order, std::uint64_t seed = 0) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  set_order_locked(order, seed);
}
// In the environment variable's format: "forward", "reverse", "random" or "random:7".
inline void set_order_locked(const std::string& text) {
  const std::string name = text.substr(0, text.find(':'));
  const bool seeded = name == "random" && name != text;
  const std::string seed = seeded ? text.substr(name.size() + 1) : "0";
  if ((name != text && !seeded) || seed.empty() || seed.find_first_not_of("0123456789") != std::string::npos ||
      (name != "forward" && name != "reverse" && name != "random"))
    throw std::runtime_error("thread order '" + text + "': expected forward, reverse, random or random:SEED");
  set_order_locked(name == "random"    ? ThreadOrder::random
                   : name == "reverse" ? ThreadOrder::reverse
                                       : ThreadOrder::forward,
                   std::stoull(seed));
}
inline void set_thread_order(const std::string& text) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  set_order_locked(text);
}

inline Counters counters() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return machine.counters;
}
inline std::set<const void*> launched_kernels() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return kernels_so_far;
}

// The limits that cudaLaunchKernel checks.
inline void check_configuration(const char* name, dim3 grid, dim3 block, std::size_t dynamic_shared,
                                std::size_t dynamic_allowed) {
  const std::uint64_t n_threads = std::uint64_t{block.x} * block.y * block.z;
  const bool block_fits = n_threads >= 1 && n_threads <= max_threads && block.z <= 64;
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535u && grid.z >= 1 && grid.z <= 65535u;
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  if (!block_fits || !grid_fits)
    throw std::runtime_error(std::string(name) + ": invalid launch configuration: grid " + text(grid) + ", block " +
                             text(block));
  if (dynamic_shared > (dynamic_allowed > default_shared_limit ? dynamic_allowed : default_shared_limit))
    throw std::runtime_error(std::string(name) + ": invalid launch configuration: " + std::to_string(dynamic_shared) +
                             " bytes of dynamic shared memory; more than 49152 need allow_dynamic_shared()");
}

inline void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_shared,
                     void (*body)(void*), void* arguments) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (!order_is_set) {
    const char* const order = std::getenv("ONEPASS_HOST_ORDER");
    set_order_locked(order == nullptr ? "forward" : order);
  }
  const auto allowed = allowed_dynamic_shared.find(kernel);
  check_configuration(name, grid, block, dynamic_shared, allowed == allowed_dynamic_shared.end() ? 0 : allowed->second);
  const std::uint64_t n_blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (n_blocks > 1u << 24) throw std::runtime_error(std::string(name) + ": too many blocks for a run on the host");

  Machine& m = machine;
  m.kernel = name;
  m.body = body;
  m.arguments = arguments;
  m.grid_size = grid;
  m.block_size = block;
  m.dynamic_shared = dynamic_shared;
  m.more_shared_allowed = allowed != allowed_dynamic_shared.end();
  m.n_threads = static_cast<int>(block.x * block.y * block.z);
  m.n_fiber_sets = fiber_sets(m.n_threads);
  m.failed = false;
  ++m.counters.launches;
  kernels_so_far.insert(kernel);
  come_home();
  std::vector<std::uint32_t> blocks(n_blocks);
  arrange(blocks.data(), static_cast<std::uint32_t>(n_blocks));
  for (std::uint64_t i = 0; i < n_blocks && !m.failed; ++i) run_block(blocks[i]);
  join();
  m.current = nullptr;
  if (m.failed) throw std::runtime_error(m.error);
}

// The names that platform.cuh gives the CUDA sources; see there.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared,
            void* /*stream*/, Arguments&&... arguments) {
  if (instead_of_running != nullptr) {
    std::vector<long long> integers;
    (append_integer(integers, arguments), ...);
    instead_of_running(name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, integers);
    return;
  }
  auto body = [&] { kernel(arguments...); };
  using Body = decltype(body);
  run_grid(
      name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared,
      [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

template <class... Parameters>
void allow_dynamic_shared(const char* name, void (*kernel)(Parameters...), std::size_t bytes) {
  if (bytes > shared_limit)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(bytes) +
                             " bytes of dynamic shared memory; the limit is " + std::to_string(shared_limit));
  const std::lock_guard<std::mutex> lock(launch_mutex);
  allowed_dynamic_shared[reinterpret_cast<const void*>(kernel)] = bytes;
}

}  // namespace onepass::cuda_on_host
#pragma GCC visibility pop
