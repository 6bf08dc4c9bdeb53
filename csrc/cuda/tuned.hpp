// The constants that only measurements can choose, as macros so that a build can try other values:
//   pip install . -C cmake.define.ONEPASS_TUNING="ONEPASS_STATE_STORE=1;ONEPASS_CHUNK_BYTES=65536"
// `make gpu` measures such builds beside the usual one; benchmarks/tune.py writes the best values here.
// No GPU has chosen yet.
#pragma once

// How the apply kernel stores parameters and states, and how the layers store their results: 0 as usual; 1 to be
// evicted from the caches first, which suits what nobody reads soon; 2 as usual, but by an instruction that orders
// nothing among threads.
#ifndef ONEPASS_STATE_STORE
#define ONEPASS_STATE_STORE 0
#endif
#ifndef ONEPASS_OUTPUT_STORE
#define ONEPASS_OUTPUT_STORE 0
#endif

// Bytes of a block's chunk in the apply kernel, about, counting each stream once. Finding the tensor takes the same
// time for any.
#ifndef ONEPASS_CHUNK_BYTES
#define ONEPASS_CHUNK_BYTES 131072
#endif

// Whether a step that took a norm starts with the gradients that the norm read last: they are still in the L2 cache.
#ifndef ONEPASS_REVERSE_AFTER_NORM
#define ONEPASS_REVERSE_AFTER_NORM 1
#endif
