// How the kernels of BatchNorm traverse an array: a block processes a part of one channel or, with channels last, a
// part of several adjacent channels.
#pragma once
#include <initializer_list>

#include "core/layers.hpp"
#include "cuda/device.cuh"
#include "cuda/row_team.cuh"
#include "cuda/tuning.hpp"
#include "cuda/vector_io.cuh"

namespace onepass::cuda {

// How a thread accesses memory: 16 bytes at once if the addresses and the innermost dimension allow it.
struct Wide {
  template <class T>
  static constexpr int width = onepass::cuda::width<T>;
};
struct Narrow {
  template <class T>
  static constexpr int width = 1;
};

// The parts that a channel's elements (channels last: the rows) are divided into.
struct BatchParts {
  std::int64_t size, count;  // elements per part (the last one may have fewer); number of parts

  explicit BatchParts(const BatchShape& s) {
    const std::int64_t all = s.batch * s.space;
    const std::int64_t columns = !s.channels_last                          ? 1
                                 : s.channels < tuning::batch_columns_last ? s.channels
                                                                           : tuning::batch_columns_last;
    const std::int64_t min_size = (s.channels_last ? tuning::batch_part_last : tuning::batch_part) / columns;
    size = all * (s.channels / columns) / tuning::batch_blocks;
    size = ((size < min_size ? min_size : size) + 15) / 16 * 16;  // wide accesses do not cross the end of a part
    count = (all + size - 1) / size;
  }
};

// Iterates over the elements of one thread, w adjacent ones at a time; they belong to `own` channels.
//   channels first, [batch, channels, space]: the block walks along one channel, from sample to sample;
//   channels last, [rows, channels]: `columns` adjacent threads, with w channels each, walk down the rows.
struct ChannelsFirst {
  static constexpr bool last = false;
  template <int w>
  static constexpr int own = 1;

  std::int64_t channel, element, step, offset, offset_step, position, position_step, space, jump, begin, end;

  template <int w>
  __device__ void start(const BatchShape& s, const std::int64_t part, int /*columns*/) {
    channel = blockIdx.x;
    space = s.space;
    begin = std::int64_t(blockIdx.y) * part;
    end = s.batch * space - begin < part ? s.batch * space : begin + part;
    element = begin + std::int64_t(threadIdx.x) * w;
    step = tuning::column_threads * w;
    position = element % space;
    position_step = step % space;
    const std::int64_t sample = s.channels * space;
    offset = element / space * sample + channel * space + position;
    offset_step = step / space * sample + position_step;
    jump = sample - space;  // from the end of the channel in one sample to its beginning in the next
  }
  __device__ bool has() const { return element < end; }
  __device__ void next() {
    element += step;
    offset += offset_step;
    position += position_step;
    if (position >= space) {
      position -= space;
      offset += jump;
    }
  }
  __device__ bool has_channel(const BatchShape&) const { return true; }
  // Elements of one channel in the first n accesses of all the block's threads.
  __device__ std::int64_t first_of_block(int n) const {
    const std::int64_t most = n * step;
    return end - begin < most ? end - begin : most;
  }
};

struct ChannelsLast {
  static constexpr bool last = true;
  template <int w>
  static constexpr int own = w;

  std::int64_t channel, element, step, offset, offset_step, begin, end;

  template <int w>
  __device__ void start(const BatchShape& s, const std::int64_t part, int columns) {
    const std::int64_t rows = s.batch * s.space;
    channel = (std::int64_t(blockIdx.x) * columns + threadIdx.x % columns) * w;
    begin = std::int64_t(blockIdx.y) * part;
    end = rows - begin < part ? rows : begin + part;
    element = begin + threadIdx.x / columns;
    step = tuning::column_threads / columns;
    offset = element * s.channels + channel;
    offset_step = step * s.channels;
    if (channel >= s.channels) element = end;
  }
  __device__ bool has() const { return element < end; }
  __device__ void next() {
    element += step;
    offset += offset_step;
  }
  __device__ bool has_channel(const BatchShape& s) const { return channel < s.channels; }
  __device__ std::int64_t first_of_block(int n) const {
    const std::int64_t most = n * step;
    return end - begin < most ? end - begin : most;
  }
};

// The offsets of a thread's next accesses; -1 after the last one.
template <int rounds, class Layout>
__device__ void next_offsets(Layout& walk, std::int64_t (&offsets)[rounds]) {
  ONEPASS_UNROLL
  for (int r = 0; r < rounds; ++r) {
    offsets[r] = walk.has() ? walk.offset : -1;
    walk.next();
  }
}
template <int rounds, int w, class T>
__device__ void load_at(const std::int64_t (&offsets)[rounds], const void* p, Elements<T, w> (&x)[rounds]) {
  ONEPASS_UNROLL
  for (int r = 0; r < rounds; ++r) {
    x[r] = Elements<T, w>{};
    if (p != nullptr && offsets[r] >= 0) x[r] = Elements<T, w>::load(static_cast<const T*>(p) + offsets[r]);
  }
}
template <int rounds, int w, class T>
__device__ void store_at(const std::int64_t (&offsets)[rounds], void* p, const Elements<T, w> (&x)[rounds]) {
  ONEPASS_UNROLL
  for (int r = 0; r < rounds; ++r)
    if (p != nullptr && offsets[r] >= 0) x[r].store(static_cast<T*>(p) + offsets[r]);
}

// The grid of a launch.
struct BatchGrid {
  BatchParts parts;
  int columns;  // adjacent threads with different channels
  dim3 blocks;

  BatchGrid(const BatchShape& s, int w) : parts(s), columns(s.channels_last ? team_of(s.channels, w, 32) : 1) {
    const std::int64_t strip = s.channels_last ? std::int64_t(columns) * w : 1;
    blocks = dim3(unsigned((s.channels + strip - 1) / strip), unsigned(parts.count));
  }
};

// Whether all accesses may be wide.
template <class T>
bool is_wide(const BatchShape& s, std::initializer_list<const void*> arrays) {
  bool wide = (s.channels_last ? s.channels : s.space) % width<T> == 0;
  for (const void* p : arrays) wide = wide && is_aligned16(p);
  return wide;
}

// f(access, layout) with Wide or Narrow, and ChannelsFirst or ChannelsLast.
template <class T, class F>
void with_layout(bool wide, bool last, const F& f) {
  if (wide)
    last ? f(Wide{}, ChannelsLast{}) : f(Wide{}, ChannelsFirst{});
  else
    last ? f(Narrow{}, ChannelsLast{}) : f(Narrow{}, ChannelsFirst{});
}

}  // namespace onepass::cuda
