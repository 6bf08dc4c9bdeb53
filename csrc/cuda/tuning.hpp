// Every launch constant of the CUDA engines, with its reason.
#pragma once

namespace onepass::cuda::tuning {

// Threads of a block, and blocks of an SM that registers must leave room for: 64 registers a thread; 80 for 8 elements
// of 16 bits with one state, which spill on sm_80 otherwise (48 KB of loads in flight remain); and 128 with three
// states, for rows of a table, whose places take registers too, or for float64, whose divisions and roots need more.
// Without the second number ptxas aims at 48 on sm_90 and spills. 1024 threads with 4 loads of 16 bytes in flight each
// saturate the memory; so do 512 with more of them.
constexpr int apply_threads = 256;
constexpr int apply_blocks_per_sm(int param_bytes, int n_state, bool by_rows) {
  return param_bytes == 8 || n_state > 2 || by_rows ? 2 : param_bytes == 2 && n_state == 1 ? 3 : 4;
}

// Elements of a block's chunk: 8 rounds of 16-byte loads of float32. Long enough that finding the tensor is free, short
// enough that a list of a few million elements still fills a large GPU. A multiple of every pack width.
constexpr int apply_chunk = 8192;

// The parameter block of a launch: what CUDA 12.1 and later give on sm_70 and later.
constexpr int parameter_bytes = 32764;

// Steps that the host prepares and a launch carries; lists with more distinct ones are split.
constexpr int max_steps = 16;

constexpr int prepare_threads = 128;

constexpr int reduce_threads = 256;
constexpr int reduce_blocks_per_sm =
    4;  // 64 registers a thread, as above; sm_75 would take more of two float64 streams
constexpr int reduce_chunk = 8192;
constexpr int join_threads = 512;  // of the single block that joins the chunks' totals

// Blocks of a grid whose blocks take several turns: a few waves on the largest GPU, so that a last wave that is not
// full costs little. No grid depends on the device, for the order of sums must not.
constexpr int max_blocks = 2048;

// One 16-byte load per thread is in flight: 24 KB with 6 blocks per SM, for which 40 registers per thread are enough.
// Without the second number ptxas aims at 8 blocks, 32 registers, and spills on sm_100. sm_75 has room for 4.
constexpr int dropout_threads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int dropout_blocks_per_sm = 4;
#else
constexpr int dropout_blocks_per_sm = 6;
#endif

// Rows of norms: 16-byte words that a thread loads at once and keeps in registers between statistics and result: as
// many as fit the 64 registers that each thread of a block of 1024 has. Elements, where rows are not aligned. Blocks
// are of row_threads where a row needs no more.
template <int element_bytes>
constexpr int row_rounds = element_bytes == 4 ? 4 : 2;
constexpr int narrow_rounds = 4;
constexpr int row_threads = 256;
constexpr int long_row_threads = 1024;
constexpr int long_sum_threads = 512;   // with a residual, whose elements take more registers
constexpr int short_blocks_per_sm = 4;  // of rows that a warp has room for

// Backward keeps the gradients of the weights of its columns beside x and dy: up to 128 registers a thread. So many
// blocks, of several rows each, that their gradients are small beside the rows, and two an SM on most GPUs.
constexpr int long_gradient_threads = 512;
constexpr int gradient_blocks = 256;

// Blocks that add up columns, and rows of which a thread has loads in flight: with 8 columns of 16-bit elements a
// thread, 4 rows of them would take more than 128 registers.
constexpr int column_threads = 256;
template <int element_bytes>
constexpr int column_rounds = element_bytes == 2 ? 2 : 4;

// BatchNorm: elements of a block, at least, so that its statistics are small beside them, which with channels last are
// those of up to 128 channels; and blocks, about, that a large array is divided into.
constexpr int batch_part = 8192;
constexpr int batch_part_last = 16384;
constexpr int batch_columns_last = 128;
constexpr int batch_blocks = 2048;

// Blocks of 256 threads that registers must leave room for: 128 a thread. Without a number ptxas aims at as few as 32,
// and spills.
constexpr int roomy_blocks_per_sm = 2;

}  // namespace onepass::cuda::tuning
