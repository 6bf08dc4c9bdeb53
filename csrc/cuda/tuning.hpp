// Every launch constant of the CUDA engine, with its reason. The reasons are arithmetic, not measurements, for one GPU:
// an H100 SXM has 132 SMs, each with 65,536 registers and room for 2048 threads. Its memory moves 3.35 TB/s at about
// 750 ns of latency, so 19 KB of loads in flight per SM keep it busy.
#pragma once

namespace onepass::cuda::tuning {

// The apply kernel: threads of a block, and the blocks per SM that the register limit of a thread must allow for.
//   4 blocks: 64 registers; Adam in float32 has 1024 threads * 4 loads * 16 bytes = 64 KB in flight per SM.
//   3 blocks: 80 registers, for 16-bit parameters with one state, which spill on sm_80 with 64; 48 KB in flight.
//   2 blocks: 128 registers, for three states, for rows of a table (their indices take registers), and for float64
//     (its divisions and roots do); 40 KB in flight with three states.
// Without a second number in __launch_bounds__, ptxas aims at 48 registers on sm_90, and spills.
constexpr int apply_threads = 256;
constexpr int apply_blocks_per_sm(int param_bytes, int n_state, bool by_rows) {
  return param_bytes == 8 || n_state > 2 || by_rows ? 2 : param_bytes == 2 && n_state == 1 ? 3 : 4;
}

// Elements of a block's chunk: 8 rounds of 16-byte loads of float32. Looking up the tensor, a binary search among at
// most 800, is then a small part of a block's work, while 4.3 million elements already fill a wave (132 SMs * 4
// blocks). A multiple of every vector width.
constexpr int apply_chunk = 8192;

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
constexpr int join_threads = 512;  // of the single block that joins the partials

// The size of a grid with a grid-stride loop: about 4 waves of 132 SMs * 4 blocks, so that a last wave that is not full
// costs little. No grid depends on the device, because the order of additions must not.
constexpr int max_blocks = 2048;

// A thread has one 16-byte load in flight: 24 KB per SM with 6 blocks, for which 40 registers suffice. Without the
// second number ptxas aims at 8 blocks and 32 registers, and spills on sm_100. sm_75 has room for 4 blocks.
constexpr int dropout_threads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int dropout_blocks_per_sm = 4;
#else
constexpr int dropout_blocks_per_sm = 6;
#endif

// Rows of the norms: 16-byte words that a thread loads at once and keeps in registers between statistics and result, as
// many as fit 64 registers (1024 threads per SM): 64 KB in flight for float32, 32 KB for 16 bits. narrow_rounds counts
// elements, for rows that are not aligned. Blocks have row_threads threads unless a row needs more.
template <int element_bytes>
constexpr int row_rounds = element_bytes == 4 ? 4 : 2;
constexpr int narrow_rounds = 4;
constexpr int row_threads = 256;
constexpr int long_row_threads = 1024;
constexpr int long_sum_threads = 512;   // with a residual, whose elements take more registers
constexpr int short_blocks_per_sm = 4;  // rows that fit one warp

// Backward keeps the gradients of its columns' weights besides x and dy: up to 128 registers per thread, 2 blocks of
// 256 threads per SM. 256 blocks are about one wave (132 SMs * 2); with several rows per block, the blocks' sums are
// small compared with the rows.
constexpr int long_gradient_threads = 512;
constexpr int gradient_blocks = 256;

// Sums over columns: threads of a block, and rows that a thread loads at once. With 8 columns of 16-bit elements per
// thread, 4 rows would take more than 128 registers.
constexpr int column_threads = 256;
template <int element_bytes>
constexpr int column_rounds = element_bytes == 2 ? 2 : 4;

// BatchNorm: the least number of elements per block, so that the statistics it writes are small compared with what it
// reads: 24 bytes per channel, and with channels last a block has up to 128 of them (3 KB beside 32 KB of 16-bit
// elements). A large array is
// divided into about batch_blocks blocks, 4 waves as above.
constexpr int batch_part = 8192;
constexpr int batch_part_last = 16384;
constexpr int batch_columns_last = 128;
constexpr int batch_blocks = 2048;

// Blocks of 256 threads per SM that may use 128 registers per thread. Without a number ptxas aims at as few as 32
// registers, and spills.
constexpr int blocks_per_sm_at_128_registers = 2;

}  // namespace onepass::cuda::tuning
