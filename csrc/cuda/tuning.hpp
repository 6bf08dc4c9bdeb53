// Every launch constant of the CUDA engines, with its reason.
#pragma once

namespace onepass::cuda::tuning {

// Threads of a block. 256 of up to 64 registers keep an SM full on every architecture from sm_75 on.
constexpr int apply_threads = 256;

// Elements of a block's chunk: 8 rounds of 16-byte loads of float32. Long enough that finding the tensor is free, short
// enough that a list of a few million elements still fills a large GPU. A multiple of every pack width.
constexpr int apply_chunk = 8192;

// The parameter block of a launch: what CUDA 12.1 and later give on sm_70 and later.
constexpr int parameter_bytes = 32764;

// Steps that the host prepares and a launch carries; lists with more distinct ones are split.
constexpr int max_steps = 16;

constexpr int prepare_threads = 128;

constexpr int sum_threads = 256;
constexpr int sum_chunk = 8192;
constexpr int total_threads = 512;  // of the single block that joins the chunks' sums

}  // namespace onepass::cuda::tuning
