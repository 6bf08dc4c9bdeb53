#include "cpu/threads.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <string>

namespace onepass::cpu {
namespace {

// The functions of the OpenMP runtime that code compiled by GCC calls. LLVM's and Intel's runtimes have them too.
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned n_threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string name = "none";

  Runtime() {
    const auto find = [](auto& function, const char* symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, symbol));
      return function != nullptr;
    };
    if (!find(parallel, "GOMP_parallel") || !find(thread_num, "omp_get_thread_num") ||
        !find(num_threads, "omp_get_num_threads") || !find(in_parallel, "omp_in_parallel")) {
      parallel = nullptr;
      return;
    }
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(parallel), &info) != 0 && info.dli_fname != nullptr) {
      const std::string path = info.dli_fname;
      name = path.substr(path.find_last_of('/') + 1);
    }
    // A child of fork() has the runtime's memory but none of its threads: a parallel region would wait forever.
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }

  static bool forked;
};
bool Runtime::forked = false;

const Runtime& runtime() {
  static const Runtime instance;
  return instance;
}

struct Call {
  JobBody body;
  void* context;
};

}  // namespace

void run_parallel(int n_threads, JobBody body, void* context) {
  const Runtime& r = runtime();
  if (n_threads <= 1 || r.parallel == nullptr || Runtime::forked || r.in_parallel()) return body(context, 0, 1);
  Call call{body, context};
  r.parallel(
      [](void* data) {
        const Call& c = *static_cast<Call*>(data);
        c.body(c.context, runtime().thread_num(), runtime().num_threads());
      },
      &call, static_cast<unsigned>(n_threads), 0);
}

const char* thread_runtime() { return runtime().name.c_str(); }

}  // namespace onepass::cpu
