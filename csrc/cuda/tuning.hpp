// Every launch constant of the CUDA engines, with its reason.
#pragma once

namespace onepass::cuda::tuning {

// Threads of a block, and blocks of an SM that registers must leave room for: 64 registers a thread, and 128 with three
// states or for float64, whose divisions and roots need more. Without the second number ptxas aims at 48 on sm_90 and
// spills. 1024 threads with 4 loads of 16 bytes in flight each saturate the memory; so do 512 with more of them.
constexpr int apply_threads = 256;
constexpr int apply_blocks_per_sm(int param_bytes, int n_state) { return param_bytes == 8 || n_state > 2 ? 2 : 4; }

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

}  // namespace onepass::cuda::tuning
