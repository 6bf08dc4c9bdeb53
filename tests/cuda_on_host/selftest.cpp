// Tests the tester, run by test_tester.py: `selftest KERNEL MUTANT` exits with 0 if the kernel's result is right and
// nothing was reported. `selftest list` lists them all; `selftest features` tests what the kernels do not use.
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>

#include "selftest_features.hpp"
#include "selftest_kernels.cuh"

namespace onepass::cuda::selftest {
namespace {

// Exactly n elements on the heap, so that AddressSanitizer detects the first access beyond them.
template <class T>
std::unique_ptr<T[]> array(int n, T value = T()) {
  std::unique_ptr<T[]> a(new T[n]);
  for (int i = 0; i < n; ++i) a[i] = value;
  return a;
}

std::unique_ptr<float[]> counting(int n) {
  auto a = array<float>(n);
  for (int i = 0; i < n; ++i) a[i] = static_cast<float>(i % 97);
  return a;
}

template <Mutant mutant>
bool copies() {
  bool right = true;
  for (const int offset : {0, 1}) {
    const int n = 1003;
    const auto in = counting(n + offset), out = array<float>(n + offset, -1);
    launch("copy", copy<mutant>, 3, 64, 0, nullptr, out.get() + offset, in.get() + offset, n);
    for (int i = 0; i < offset + n; ++i) right &= out[i] == (i < offset ? -1 : in[i]);
  }
  return right;
}

template <Mutant mutant>
bool sums_rows() {
  bool right = true;
  for (const int n_columns : {20, 300}) {
    const int n_rows = 11;
    const auto in = counting(n_rows * n_columns), sums = array<float>(n_rows, -1);
    launch("row_sums", row_sums<mutant>, 3, 64, 0, nullptr, sums.get(), in.get(), n_rows, n_columns);
    for (int r = 0; r < n_rows; ++r)
      right &= sums[r] == std::accumulate(&in[r * n_columns], &in[r * n_columns] + n_columns, 0.f);
  }
  return right;
}

template <Mutant mutant>
bool sums_grid() {
  const int n = 1000, n_blocks = 7;
  const auto in = counting(n), block_sums = array<float>(n_blocks), sum = array<float>(1);
  const auto counter = array<unsigned>(1);
  bool right = true;
  for (int launches = 0; launches < 2; ++launches) {
    sum[0] = -1;
    launch("grid_sum", grid_sum<mutant>, n_blocks, 32, 0, nullptr, sum.get(), block_sums.get(), counter.get(), in.get(),
           n);
    right &= sum[0] == std::accumulate(&in[0], &in[0] + n, 0.f);
  }
  return right;
}

template <Mutant mutant>
bool counts_values() {
  const int n = 5000;
  const auto in = array<unsigned char>(n);
  const auto totals = array<unsigned>(64), expected = array<unsigned>(64);
  for (int i = 0; i < n; ++i) ++expected[in[i] = static_cast<unsigned char>(i * i % 64)];
  launch("histogram", histogram<mutant>, 4, 64, 0, nullptr, totals.get(), in.get(), n);
  return std::equal(&totals[0], &totals[0] + 64, &expected[0]);
}

template <Mutant mutant>
bool transposes() {
  const int n_blocks = 3, n_warps = 2, n = n_blocks * n_warps * 1024;
  const auto in = counting(n), out = array<float>(n, -1);
  const std::size_t shared = n_warps * 32 * 33 * sizeof(float);
  launch("transpose", transpose<mutant>, n_blocks, n_warps * 32, shared, nullptr, out.get(), in.get());
  bool right = true;
  for (int i = 0; i < n; ++i) right &= out[i] == in[i / 1024 * 1024 + i % 32 * 32 + i / 32 % 32];
  return right;
}

struct Case {
  const char *kernel, *mutant;
  std::function<bool()> run;
};

#define ONEPASS_CASE(kernel, check, mutant) {#kernel, #mutant, check<Mutant::mutant>}
const Case cases[] = {
    ONEPASS_CASE(copy, copies, none),
    ONEPASS_CASE(copy, copies, off_by_one_bound),
    ONEPASS_CASE(copy, copies, missing_tail),
    ONEPASS_CASE(copy, copies, misaligned_wide_access),
    ONEPASS_CASE(copy, copies, unchecked_misaligned_access),
    ONEPASS_CASE(row_sums, sums_rows, none),
    ONEPASS_CASE(row_sums, sums_rows, missing_barrier),
    ONEPASS_CASE(row_sums, sums_rows, missing_second_barrier),
    ONEPASS_CASE(row_sums, sums_rows, divergent_barrier),
    ONEPASS_CASE(row_sums, sums_rows, early_return),
    ONEPASS_CASE(row_sums, sums_rows, lanes_left_out),
    ONEPASS_CASE(row_sums, sums_rows, uninitialised_shared),
    ONEPASS_CASE(row_sums, sums_rows, shared_overrun),
    ONEPASS_CASE(grid_sum, sums_grid, none),
    ONEPASS_CASE(grid_sum, sums_grid, missing_atomic),
    ONEPASS_CASE(grid_sum, sums_grid, missing_fence),
    ONEPASS_CASE(grid_sum, sums_grid, fence_of_the_block_only),
    ONEPASS_CASE(grid_sum, sums_grid, missing_second_fence),
    ONEPASS_CASE(grid_sum, sums_grid, counter_not_reset),
    ONEPASS_CASE(histogram, counts_values, none),
    ONEPASS_CASE(histogram, counts_values, missing_shared_atomic),
    ONEPASS_CASE(histogram, counts_values, missing_global_atomic),
    ONEPASS_CASE(histogram, counts_values, missing_barrier_after_clearing),
    ONEPASS_CASE(transpose, transposes, none),
    ONEPASS_CASE(transpose, transposes, missing_syncwarp),
    ONEPASS_CASE(transpose, transposes, dynamic_shared_overrun),
    {"features", "none", check_features},
};
#undef ONEPASS_CASE

int main(const std::string& kernel, const std::string& mutant) {
  for (const Case& c : cases) {
    if (kernel != c.kernel || mutant != c.mutant) continue;
    try {
      if (c.run()) return 0;
      std::puts("wrong result");
    } catch (const std::exception& error) {
      std::printf("error: %s\n", error.what());
    }
    return 1;
  }
  return 2;
}

}  // namespace
}  // namespace onepass::cuda::selftest

int main(int argc, char** argv) { return argc == 3 ? onepass::cuda::selftest::main(argv[1], argv[2]) : 2; }
