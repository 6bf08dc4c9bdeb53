// The shared memory of the running block: filled with NaN, with red zones around the arrays, and limited as on a GPU.
#pragma once

#include "fibers.hpp"

#pragma GCC visibility push(hidden)
namespace onepass::cuda_on_host {

constexpr std::size_t default_shared_limit = 48 << 10;  // static + dynamic, unless the kernel was allowed more
constexpr std::size_t shared_limit = 227 << 10;         // compute capability 9.0

// Addresses for release() and acquire(), new ones for every block so that blocks do not order each other: two for
// barriers, one for fences, and for every warp one per lane to arrive and one per lane to leave.
constexpr int max_threads = 1024, warp_size = 32, syncs_per_warp = 2 * warp_size;
constexpr int barrier_syncs = 0, block_fence_sync = 2, warp_syncs = 3;
#if defined(__SANITIZE_THREAD__)
constexpr int n_syncs = warp_syncs + max_threads / warp_size * syncs_per_warp;
#else
constexpr int n_syncs = 0;  // unused
#endif

class SharedMemory {
 public:
  ONEPASS_HOST_UNCHECKED void begin_block(std::size_t dynamic_bytes, bool more_allowed) {
    limit_ = more_allowed ? shared_limit : default_shared_limit;
    capacity_ = n_syncs * sizeof *syncs_ + default_shared_limit + dynamic_bytes + max_arrays * 2 * alignment;
    capacity_ = round_up(capacity_);
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(alignment, capacity_));
    if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory_, capacity_);
#endif
    n_arrays_ = 0;
    used_ = static_bytes_ = 0;
    syncs_ = reinterpret_cast<std::uint64_t*>(take(nullptr, n_syncs * sizeof *syncs_));
    dynamic_ = take(nullptr, dynamic_bytes);
    dynamic_bytes_ = dynamic_bytes;
  }

  // The array of the ONEPASS_SHARED statement that owns `tag`, the same for all threads. Null: over the limit.
  ONEPASS_HOST_UNCHECKED void* static_array(const void* tag, std::size_t bytes) {
    for (int i = 0; i < n_arrays_; ++i)
      if (arrays_[i].tag == tag) return arrays_[i].memory;
    static_bytes_ += bytes;
    if (n_arrays_ == max_arrays || static_bytes_ > default_shared_limit || total_bytes() > limit_) return nullptr;
    return take(tag, bytes);
  }

  void* sync(int i) const { return syncs_ + i; }

  void* dynamic() const { return dynamic_; }
  std::size_t total_bytes() const { return static_bytes_ + dynamic_bytes_; }

  // Whether every red zone is unchanged. With AddressSanitizer the access itself is reported instead.
  ONEPASS_HOST_UNCHECKED bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < n_arrays_; ++i) {
      const Array& a = arrays_[i];
      const volatile unsigned char* memory = a.memory;
      for (std::size_t at = a.bytes; at < padded(a.bytes); ++at)
        if (memory[at] != red_zone_byte(at)) return false;
    }
#endif
    return true;
  }

  // To ThreadSanitizer two blocks that use the same address race. Memory is therefore reused only after all blocks so
  // far are ordered before what follows: join() in scheduler.hpp.
  ONEPASS_HOST_UNCHECKED void end_block() {
    retired_[n_retired_++] = memory_;
    retired_bytes_ += capacity_;
#if !defined(__SANITIZE_THREAD__)
    free_retired();
#endif
  }
  bool should_join() const { return n_retired_ == max_retired || retired_bytes_ > max_retired_bytes; }
  void free_retired() {
    while (n_retired_ > 0) std::free(retired_[--n_retired_]);
    retired_bytes_ = 0;
  }

 private:
  static constexpr std::size_t alignment = 128, red_zone_bytes = 64, max_retired_bytes = 64 << 20;
  static constexpr int max_arrays = 64, max_retired = 512;
  static constexpr std::size_t round_up(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }
  static constexpr std::size_t padded(std::size_t bytes) { return round_up(bytes + red_zone_bytes); }
  // NaN as fp16, bf16, float and double, and not a valid address.
  static constexpr unsigned char red_zone_byte(std::size_t at) { return at % 2 ? 0xFF : 0xF5; }

  struct Array {
    const void* tag;
    unsigned char* memory;
    std::size_t bytes;
  };

  // The next array: uninitialised memory followed by a red zone. Written through volatile, because the sanitizers would
  // instrument a memset.
  ONEPASS_HOST_UNCHECKED unsigned char* take(const void* tag, std::size_t bytes) {
    unsigned char* const memory = memory_ + used_;
    used_ += padded(bytes);
    std::size_t at = 0;
    for (; at + 8 <= bytes; at += 8) *reinterpret_cast<volatile std::uint64_t*>(memory + at) = ~std::uint64_t{0};
    volatile unsigned char* const byte = memory;
    for (; at < bytes; ++at) byte[at] = 0xFF;
    for (; at < padded(bytes); ++at) byte[at] = red_zone_byte(at);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
    arrays_[n_arrays_++] = {tag, memory, bytes};
    return memory;
  }

  unsigned char *memory_ = nullptr, *dynamic_ = nullptr;
  std::uint64_t* syncs_ = nullptr;
  std::size_t capacity_ = 0, used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0, limit_ = 0;
  Array arrays_[max_arrays] = {};
  int n_arrays_ = 0;
  unsigned char* retired_[max_retired] = {};
  int n_retired_ = 0;
  std::size_t retired_bytes_ = 0;
};

}  // namespace onepass::cuda_on_host
#pragma GCC visibility pop
