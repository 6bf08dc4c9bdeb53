// What the kernels of selftest_kernels.cuh do not use: every collective and atomic, 16-bit types, large parameters, the
// errors that launch() reports, and launches after an error and from several threads.
#pragma once

#include <cstdio>
#include <string>
#include <thread>

#include "cuda/platform.cuh"

namespace onepass::cuda::selftest {

// An assertion about a thread, inside a kernel.
#define ONEPASS_EXPECT(condition) \
  if (!(condition)) cuda_on_host::fail("line %d: expected %s", __LINE__, #condition)

inline int linear_index() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

template <class T>
void check_shuffles(T unit) {
  constexpr unsigned all = 0xffffffffu;
  const int lane = linear_index() % 32;
  const auto value = [unit](int l) { return static_cast<T>(unit * static_cast<T>(l)); };
  const T mine = value(lane);
  ONEPASS_EXPECT(__shfl_sync(all, mine, 5) == value(5));
  ONEPASS_EXPECT(__shfl_sync(all, mine, 5, 8) == value(lane / 8 * 8 + 5));
  ONEPASS_EXPECT(__shfl_xor_sync(all, mine, 3) == value(lane ^ 3));
  ONEPASS_EXPECT(__shfl_down_sync(all, mine, 4u) == value(lane < 28 ? lane + 4 : lane));
  ONEPASS_EXPECT(__shfl_down_sync(all, mine, 4u, 16) == value(lane % 16 < 12 ? lane + 4 : lane));
  ONEPASS_EXPECT(__shfl_up_sync(all, mine, 4u) == value(lane < 4 ? lane : lane - 4));
  if (lane < 16) ONEPASS_EXPECT(__shfl_xor_sync(0xffffu, mine, 8) == value(lane ^ 8));
}

__global__ void collectives() {
  check_shuffles(1.5f);
  check_shuffles(1e200);
  check_shuffles(-3);
  check_shuffles(0x80000000u / 32);
  check_shuffles(1LL << 40);
  check_shuffles(1ULL << 58);
  const int rank = linear_index();
  const int lane = rank % 32;
  ONEPASS_EXPECT(__ballot_sync(0xffffffffu, lane % 2) == 0xaaaaaaaau);
  ONEPASS_EXPECT(__any_sync(0xffffffffu, lane == 7) && !__any_sync(0xffffffffu, 0));
  ONEPASS_EXPECT(__all_sync(0xffffffffu, 2) && !__all_sync(0xffffffffu, lane));
  const int n_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  ONEPASS_EXPECT(__syncthreads_count(rank % 2) == n_threads / 2);
  ONEPASS_EXPECT(__syncthreads_or(rank == 40) && !__syncthreads_or(0));
  ONEPASS_EXPECT(__syncthreads_and(1) && !__syncthreads_and(rank));
}

template <class T>
struct Totals {
  T sum, most, least, all, any, odd, exchanged, compared;
};

template <class T>
__global__ void atomics(Totals<T>* totals, float* f, double* d) {
  const T mine = static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&totals->sum, mine);
  atomicMax(&totals->most, mine);
  atomicMin(&totals->least, mine);
  atomicAnd(&totals->all, mine | 64);
  atomicOr(&totals->any, mine);
  atomicXor(&totals->odd, mine);
  if (mine == 9) ONEPASS_EXPECT(atomicExch(&totals->exchanged, mine) == 1);
  atomicCAS(&totals->compared, 1, 2);
  atomicAdd(f, 0.5);
  atomicAdd(d, 0.25);
}

template <class T>
void check_atomics() {
  Totals<T> t{0, 0, 100, static_cast<T>(127), 0, 0, 1, 1};
  float f = 0;
  double d = 0;
  launch("atomics", atomics<T>, 2, 40, 0, nullptr, &t, &f, &d);
  const bool right = t.sum == 79 * 40 && t.most == 79 && t.least == 0 && t.all == 64 && t.any == 127 && t.odd == 0 &&
                     t.exchanged == 9 && t.compared == 2 && f == 40 && d == 20;
  if (!right) throw std::runtime_error("atomics: wrong result");
}

__global__ void arithmetic() {
  const __half h = __float2half_rn(1.0009765625f / 2);
  ONEPASS_EXPECT(__half2float(h) == 0.50048828125f);
  const __nv_bfloat16 b = __float2bfloat16_rn(1.00390625f);  // a tie: rounds to even
  ONEPASS_EXPECT(__bfloat162float(b) == 1.f && sizeof b == 2);
  ONEPASS_EXPECT(__half2float(__shfl_sync(0xffffffffu, h, 0)) == 0.50048828125f);
  ONEPASS_EXPECT(__umulhi(0x80000000u, 6u) == 3 && __umul64hi(1ULL << 63, 6) == 3);
  ONEPASS_EXPECT(__float_as_uint(1.f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.f);
  ONEPASS_EXPECT(__popc(255u) == 8 && __clz(1) == 31 && __ffs(8) == 4 && rsqrtf(4.f) == 0.5f);
  const float nan = std::nanf("");
  ONEPASS_EXPECT(max(nan, 1.f) == 1.f && min(1.f, nan) == 1.f && max(2, 3) == 3);
  // A product that a fused multiply-add would not round.
  const volatile float x = 1 + 0x1p-12f;
  ONEPASS_EXPECT(x * x - (1 + 0x1p-11f) == 0);
}

struct Table {
  const float* in[2000];
  float* out[2000];
};
static_assert(sizeof(Table) == 32000);

template <class T>
__global__ void move(ONEPASS_GRID_CONSTANT(T) table, long long n) {
  const long long i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) *table.out[i] = __ldg(table.in[i]);
}
extern template __global__ void move<Table>(ONEPASS_GRID_CONSTANT(Table), long long);
template __global__ void move<Table>(ONEPASS_GRID_CONSTANT(Table), long long);

__global__ void move_a_copy(Table table, int n) {  // 32 KB on every thread's stack
  if (static_cast<int>(threadIdx.x) < n) *table.out[threadIdx.x] = *table.in[threadIdx.x];
}

inline void check_large_parameters() {
  static float in[2000], out[2000];
  Table table;
  for (int i = 0; i < 2000; ++i) in[i] = static_cast<float>(i), table.in[i] = &in[i], table.out[i] = &out[1999 - i];
  launch("move", move<Table>, 32, 64, 0, nullptr, table, 2000);
  for (int i = 0; i < 2000; ++i)
    if (out[i] != static_cast<float>(1999 - i)) throw std::runtime_error("move: wrong result");
  launch("move_a_copy", move_a_copy, 1, 64, 0, nullptr, table, 64);
}

__global__ void take_static_shared() {
  ONEPASS_SHARED(double, large, 6145);
  large[threadIdx.x] = 0;
}
__global__ void take_both() {
  ONEPASS_SHARED(double, small, 16);
  ONEPASS_DYNAMIC_SHARED(double, rest);
  ONEPASS_EXPECT(reinterpret_cast<std::size_t>(rest) % 128 == 0);
  ONEPASS_EXPECT(small[threadIdx.x] != small[threadIdx.x] && rest[threadIdx.x] != rest[threadIdx.x]);
}
__global__ void throws(int which) {
  if (blockIdx.x == 1 && threadIdx.x == 3 && which == 0) throw std::runtime_error("of its own");
  if (threadIdx.x == 3 && which == 1) __trap();
  __syncthreads();
}
__global__ void waits_for_ever() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __ballot_sync(0xffffffffu, 1);
}
__global__ void shuffles_from_outside() { __shfl_sync(threadIdx.x < 16 ? 0xffffu : 0xffff0000u, 0, 20); }
__global__ void does_nothing() {}

template <class Kernel, class... Arguments>
void expect_error(const std::string& expected, Kernel kernel, dim3 grid, dim3 block, std::size_t shared,
                  Arguments... arguments) {
  std::string message = "no error";
  try {
    launch("kernel", kernel, grid, block, shared, nullptr, arguments...);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  if (message.find(expected) == std::string::npos)
    throw std::runtime_error("expected an error with '" + expected + "', came: " + message);
  launch("does_nothing", does_nothing, 2, 64, 0, nullptr);
}

inline void check_errors() {
  expect_error("kernel: invalid launch configuration: grid (1, 1, 1), block (1025, 1, 1)", does_nothing, 1, 1025, 0);
  expect_error("invalid launch configuration: grid (0, 1, 1)", does_nothing, 0, 32, 0);
  expect_error("invalid launch configuration", does_nothing, dim3(1, 65536), 32, 0);
  expect_error("allow_dynamic_shared", does_nothing, 1, 32, 49153);
  expect_error("the limit is 49152", take_static_shared, 1, 32, 0);
  expect_error("the limit is 49152", take_both, 1, 16, 49152);
  expect_error("kernel: block (1, 0, 0), thread (3, 0, 0): exception: of its own", throws, dim3(2), 64, 0, 0);
  expect_error("thread (3, 0, 0): __trap", throws, 1, 64, 0, 1);
  expect_error("deadlock", waits_for_ever, 1, 32, 0);
  expect_error("reads lane 20, which is not in mask 0000ffff", shuffles_from_outside, 1, 32, 0);
  allow_dynamic_shared("take_both", take_both, 227 << 10);
  launch("take_both", take_both, 1, 16, (227 << 10) - 128, nullptr);
  expect_error("the limit is 232448", take_both, 1, 16, 227 << 10);
  try {
    allow_dynamic_shared("take_both", take_both, (227 << 10) + 1);
  } catch (const std::runtime_error&) {
    return;
  }
  throw std::runtime_error("allow_dynamic_shared: expected an error");
}

__global__ void count(int* n) {
  atomicAdd(n, 1);
  __syncthreads();
}

inline void check_threads() {
  int n = 0;
  const auto work = [&n] {
    for (int i = 0; i < 20; ++i) launch("count", count, 2, 96, 0, nullptr, &n);
  };
  std::thread other(work);
  work();
  other.join();
  if (n != 2 * 20 * 2 * 96) throw std::runtime_error("count: wrong result");
}

inline bool check_features() {
  launch("collectives", collectives, dim3(2, 2, 2), dim3(8, 4, 2), 0, nullptr);
  launch("arithmetic", arithmetic, 1, 32, 0, nullptr);
  check_atomics<int>();
  check_atomics<unsigned>();
  check_atomics<unsigned long long>();
  check_large_parameters();
  check_errors();
  check_threads();
  return cuda_on_host::counters().launches > 60;
}

#undef ONEPASS_EXPECT

}  // namespace onepass::cuda::selftest
