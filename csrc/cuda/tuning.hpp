// Every launch constant of the CUDA engine, with its reason. The reasons are arithmetic, not measurements, for one GPU:
// an H100 SXM has 132 SMs, each with 65,536 registers and room for 2048 threads. Its memory moves 3.35 TB/s at about
// 750 ns of latency, so 19 KB of loads in flight per SM keep it busy.
#pragma once
#include <cstdint>

#include "cuda/tuned.hpp"

namespace onepass::cuda::tuning {

// The apply kernel: threads of a block, and the blocks per SM that the register limit of a thread must allow for.
//   4 blocks: 64 registers; Adam in float32 has 1024 threads * 4 loads * 16 bytes = 64 KB in flight per SM.
//   3 blocks: 80 registers, for 16-bit parameters with one state, which spill on sm_80 with 64; 48 KB in flight.
//   2 blocks: 128 registers, for three states, for rows of a table (their indices take registers), for rules that say
//     so, and for float64 (its divisions and roots do); 40 KB in flight with three states.
// Without a second number in __launch_bounds__, ptxas aims at 48 registers on sm_90, and spills.
constexpr int apply_threads = 256;
constexpr int apply_blocks_per_sm(int param_bytes, int n_state, bool many_registers) {
  return param_bytes == 8 || n_state > 2 || many_registers ? 2 : param_bytes == 2 && n_state == 1 ? 3 : 4;
}

// Elements of a block's chunk. Looking up the tensor, a binary search among some hundreds, is a small part of a block's
// work if the chunk is large: up to chunk_bytes, of all streams together. But a list has at least chunk_blocks chunks,
// two waves (132 SMs * 4 blocks), unless they are the smallest. Powers of two, at least a round of any kernel.
constexpr int smallest_chunk = 2048, chunk_blocks = 1024, chunk_bytes = ONEPASS_CHUNK_BYTES;
constexpr int apply_chunk(std::int64_t elements, int bytes_per_element) {
  int chunk = smallest_chunk;
  while (2 * chunk * bytes_per_element <= chunk_bytes && elements / (2 * chunk) >= chunk_blocks) chunk *= 2;
  return chunk;
}
constexpr bool reverse_after_norm = ONEPASS_REVERSE_AFTER_NORM != 0;

// How results are stored; see tuned.hpp.
enum class Store { write_back, streaming, plain };
static_assert(ONEPASS_STATE_STORE >= 0 && ONEPASS_STATE_STORE <= 2, "0, 1 or 2, see tuned.hpp");
static_assert(ONEPASS_OUTPUT_STORE >= 0 && ONEPASS_OUTPUT_STORE <= 2, "0, 1 or 2, see tuned.hpp");
constexpr Store state_store{ONEPASS_STATE_STORE}, output_store{ONEPASS_OUTPUT_STORE};

// With other formats a thread has 8 elements of every stream in registers: 80 of them, or 128 with three states.
constexpr int stored_blocks_per_sm(int n_state) { return n_state > 2 ? 2 : 3; }

// The parameter block of a launch: the limit of CUDA 12.1 and later on sm_70 and later.
constexpr int parameter_bytes = 32764;

// Distinct Steps of a launch that the host prepares; a list with more of them is split.
constexpr int max_steps = 16;

constexpr int prepare_threads = 128;

constexpr int reduce_threads = 256;
constexpr int reduce_blocks_per_sm = 4;  // 64 registers; sm_75 would use more for two float64 streams
constexpr int reduce_chunk = 8192;
// Loads of a thread at once: 64 bytes. 8 of single elements.
template <int width>
constexpr int reduce_rounds = width == 1 ? 8 : 4;
constexpr int join_threads = 512;  // of the single block that joins the partials

// The most threads of a grid with a grid-stride loop: about 4 waves of 132 SMs * 1024 threads, so that a last wave that
// is not full costs little. No grid depends on the device, because the order of additions must not.
constexpr int max_threads = 1 << 19;

// A thread has one 16-byte load in flight: 24 KB per SM with 6 blocks, for which 40 registers suffice. Without the
// second number ptxas aims at 8 blocks and 32 registers, and spills on sm_100. sm_75 has room for 4 blocks.
constexpr int dropout_threads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int dropout_blocks_per_sm = 4;
#else
constexpr int dropout_blocks_per_sm = 6;
#endif

// Rows of the norms: elements that a thread loads at once and keeps in registers between statistics and result. 16 of
// them are 64 bytes of float32 (64 KB in flight with 1024 threads per SM) or 32 bytes of 16 bits (32 KB). At most 8
// loads, because each takes an address: rows whose accesses are one element wide have 8 elements per thread.
template <int element_bytes>
constexpr int row_elements = element_bytes == 8 ? 4 : 16;
constexpr int max_rounds = 8;
template <int element_bytes, int width>
constexpr int row_rounds =
    row_elements<element_bytes> / width < max_rounds ? row_elements<element_bytes> / width : max_rounds;
// The largest block. With a residual, rows take more registers.
constexpr int row_threads(bool has_residual) { return has_residual ? 512 : 1024; }
// Blocks per SM that the register limit of a thread must allow for: 64 registers; with a residual 80, or 96 and more if
// accesses are narrow, because each takes an address. 8 elements in 16 bytes take fewer.
constexpr int row_blocks_per_sm(int element_bytes, int width, int threads, bool has_residual) {
  const int bytes = element_bytes * width;
  const int resident = !has_residual || width == 8 ? 1024 : bytes == 16 ? 768 : bytes == 4 ? 512 : 640;
  return resident > threads ? resident / threads : 1;
}

// Backward keeps the gradients of its columns' weights besides x and dy: up to 128 registers per thread, 512 threads
// per SM. Its blocks' sums of these gradients are 16 bytes per column, written and read: small compared with the rows
// if a block has many of them, hence at most 2^20 / size blocks, but 256, about one wave (132 SMs * 2); and at least 4
// rows a block where there are 128 blocks anyway. The narrower the accesses, the more registers their addresses take:
// at most 5 loads of x and of dy.
constexpr int gradient_threads = 512;
template <int element_bytes, int width>
constexpr int gradient_rounds = row_rounds<element_bytes, width> > 5 ? 5 : row_rounds<element_bytes, width>;
constexpr std::int64_t gradient_blocks(std::int64_t rows, std::int64_t size) {
  const std::int64_t by_size = (std::int64_t{1} << 20) / size, by_rows = rows / 4;
  const std::int64_t most = by_size < 256 ? 256 : by_size > 2048 ? 2048 : by_size;
  const std::int64_t busy = by_rows < 128 ? 128 : by_rows;
  return most < busy ? most : busy;
}
// Rows that do not fit the registers: loads at once of x and dy.
template <int element_bytes, int width>
constexpr int long_gradient_rounds = width * element_bytes == 16       ? 1
                                     : width == 1 && element_bytes < 8 ? 4
                                                                       : 2;

// Sums over columns: threads of a block, and rows that a thread loads at once. With 8 columns of 16-bit elements per
// thread, 4 rows would take more than 128 registers.
constexpr int column_threads = 256;
template <int width>
constexpr int column_rounds = width == 8   ? 2
                              : width == 1 ? 8
                                           : 4;
// The join of these sums: each thread loads so many at once, of as many adjacent columns as a sector of 32 bytes has.
constexpr int join_rounds = 8;
constexpr int join_columns = 8;

// BatchNorm: the least number of elements per block, so that the statistics it writes are small compared with what it
// reads: 24 bytes per channel, and with channels last a block has up to 128 of them (3 KB beside 32 KB of 16-bit
// elements). A large array is divided into about batch_blocks blocks, 4 waves as above.
constexpr int batch_part = 8192;
constexpr int batch_part_last = 16384;
constexpr int batch_columns_last = 128;
constexpr int batch_blocks = 2048;
// Along a channel: loads of a thread at once, 64 bytes if they are wide.
template <int width>
constexpr int channel_rounds = width == 1 ? 8 : 4;
constexpr int masked_rounds = 2;  // masks take registers
// Blocks per SM that the register limit of a thread must allow for, in forward: 80 registers, or 128 for float64 and
// with channels last, where a thread has sums for each of up to 8 channels.
constexpr int batch_blocks_per_sm(int element_bytes, bool channels_last) {
  return channels_last || element_bytes == 8 ? 2 : 3;
}

// Blocks of 256 threads per SM that may use 128 registers per thread. Without a number ptxas aims at as few as 32
// registers, and spills.
constexpr int blocks_per_sm_at_128_registers = 2;

}  // namespace onepass::cuda::tuning
