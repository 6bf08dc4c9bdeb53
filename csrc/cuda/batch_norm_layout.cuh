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

// The parts that a channel's elements (channels last: the rows) are divided into: at most so many, whatever the
// accesses.
inline std::int64_t max_batch_parts(const BatchShape& s) {
  const std::int64_t all = s.batch * s.space;
  const std::int64_t columns = !s.channels_last                          ? 1
                               : s.channels < tuning::batch_columns_last ? s.channels
                                                                         : tuning::batch_columns_last;
  const std::int64_t min_size = (s.channels_last ? tuning::batch_part_last : tuning::batch_part) / columns;
  const std::int64_t size = all * (s.channels / columns) / tuning::batch_blocks;
  return (all + min_size - 1) / (size < min_size ? min_size : size);
}

// The accesses of a thread, one after the other: w adjacent elements, which belong to `own` channels. Of the elements
// from `offset` on, only those whose bits are in the mask are meant.
//   channels first, [batch, channels, space]: the block walks along one channel, from sample to sample. Where space is
//   no multiple of w, accesses are `masked`: aligned in the whole array, so the first and the last one of a sample may
//   also cover elements of the neighbouring channels;
//   channels last, [rows, channels]: `columns` adjacent threads, with w channels each, walk down the rows.
struct Place {
  std::int64_t offset;
  unsigned mask;
};

template <bool masked>
struct ChannelsFirst {
  static constexpr bool last = false, is_masked = masked;
  template <int w>
  static constexpr int own = 1;

  std::int64_t channel, space, stride, words, begin, end;  // stride: from sample to sample; words: accesses per sample
  std::int64_t at, base, base_step;                        // base: the channel's first element in the sample
  std::int64_t word, word_step;                            // in the sample

  // Accesses that cover a channel of any sample.
  template <int w>
  ONEPASS_HD static std::int64_t words_of(std::int64_t space) {
    if constexpr (!masked) return space / w;
    std::int64_t common = w;
    while (space % common != 0) common /= 2;
    return (space + w - common + w - 1) / w;
  }

  template <int w>
  __device__ void start(const BatchShape& s, std::int64_t part, int /*columns*/) {
    channel = blockIdx.x;
    space = s.space;
    stride = s.channels * space;
    words = words_of<w>(space);
    begin = std::int64_t(blockIdx.y) * part;
    end = s.batch * words - begin < part ? s.batch * words : begin + part;
    at = begin + threadIdx.x;
    word = at % words;
    word_step = tuning::column_threads % words;
    base = at / words * stride + channel * space;
    base_step = tuning::column_threads / words * stride;
  }
  __device__ bool has() const { return at < end; }
  template <int w>
  __device__ Place next() {
    Place place{base + word * w, at < end ? (1u << w) - 1 : 0};
    if constexpr (masked) {
      const unsigned skipped = unsigned(base) % w;  // elements of the channel before
      place.offset -= skipped;
      const std::int64_t after = base + space - place.offset;
      if (word == 0) place.mask &= ~((1u << skipped) - 1);
      if (after < w) place.mask &= after > 0 ? (1u << after) - 1 : 0;
    }
    at += tuning::column_threads;
    word += word_step;
    base += base_step;
    if (word >= words) {
      word -= words;
      base += stride;
    }
    return place;
  }
  __device__ bool has_channel(const BatchShape&) const { return true; }

  // Elements of the channel in the part's first n accesses of each thread, or in all of it.
  template <int w>
  __device__ std::int64_t elements(int n) const {
    const std::int64_t last = begin + std::int64_t(n) * tuning::column_threads;
    return elements_before<w>(last < end ? last : end) - elements_before<w>(begin);
  }
  template <int w>
  __device__ std::int64_t elements() const {
    return elements_before<w>(end) - elements_before<w>(begin);
  }

 private:
  template <int w>
  __device__ std::int64_t elements_before(std::int64_t access) const {
    const std::int64_t sample = access / words, skipped = masked ? (sample * stride + channel * space) % w : 0;
    const std::int64_t here = access % words * w - skipped;
    return sample * space + (here < 0 ? 0 : here < space ? here : space);
  }
};

struct ChannelsLast {
  static constexpr bool last = true, is_masked = false;
  template <int w>
  static constexpr int own = w;

  std::int64_t channel, row, step, offset, offset_step, begin, end;

  template <int w>
  __device__ void start(const BatchShape& s, std::int64_t part, int columns) {
    const std::int64_t rows = s.batch * s.space;
    channel = (std::int64_t(blockIdx.x) * columns + (threadIdx.x & (columns - 1))) * w;
    begin = std::int64_t(blockIdx.y) * part;
    end = rows - begin < part ? rows : begin + part;
    row = begin + threadIdx.x / columns;
    step = tuning::column_threads / columns;
    offset = row * s.channels + channel;
    offset_step = step * s.channels;
    if (channel >= s.channels) row = end;
  }
  __device__ bool has() const { return row < end; }
  template <int w>
  __device__ Place next() {
    const Place place{offset, row < end ? (1u << w) - 1 : 0};
    row += step;
    offset += offset_step;
    return place;
  }
  __device__ bool has_channel(const BatchShape& s) const { return channel < s.channels; }
  template <int w>
  __device__ std::int64_t elements(int n) const {
    const std::int64_t most = n * step;
    return end - begin < most ? end - begin : most;
  }
  template <int w>
  __device__ std::int64_t elements() const {
    return end - begin;
  }
};

// A thread's next accesses, to `arrays` arrays at once.
template <class Layout, int w, int arrays>
struct Accesses {
  static constexpr int rounds = Layout::last        ? tuning::column_rounds<w>
                                : Layout::is_masked ? tuning::masked_rounds
                                                    : tuning::channel_rounds<w> / arrays;
  static constexpr unsigned all = (1u << w) - 1;
  static constexpr bool always_whole = !Layout::is_masked;

  Place place[rounds];

  __device__ explicit Accesses(Layout& walk) { next(walk); }
  __device__ void next(Layout& walk) {
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) place[r] = walk.template next<w>();
  }
  __device__ bool is_meant(int round, int element) const {
    return always_whole ? place[round].mask != 0 : place[round].mask >> element & 1;
  }

  // From an array of `size` elements; null: zeros.
  template <class T>
  __device__ void load(const void* p, std::int64_t size, Elements<T, w> (&x)[rounds]) const {
    const T* const from = static_cast<const T*>(p);
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      const bool inside = always_whole || place[r].offset + w <= size;
      x[r] = Elements<T, w>::load(from + place[r].offset, p != nullptr && place[r].mask != 0 && inside);
    }
    if constexpr (!always_whole) {
      ONEPASS_UNROLL
      for (int r = 0; r < rounds; ++r)
        if (p != nullptr && place[r].mask != 0 && place[r].offset + w > size)  // the array's last, incomplete word
          ONEPASS_UNROLL
      for (int e = 0; e < w; ++e)
        if (is_meant(r, e)) x[r].at[e] = from[place[r].offset + e];
    }
  }
  template <class T>
  __device__ void store(void* p, const Elements<T, w> (&x)[rounds]) const {
    T* const to = static_cast<T*>(p);
    ONEPASS_UNROLL
    for (int r = 0; r < rounds; ++r) {
      if (p == nullptr || place[r].mask == 0) continue;
      if (always_whole || place[r].mask == all)
        x[r].template store<tuning::output_store>(to + place[r].offset);
      else
        ONEPASS_UNROLL
      for (int e = 0; e < w; ++e)
        if (is_meant(r, e)) to[place[r].offset + e] = x[r].at[e];
    }
  }
};

// The grid of a launch.
template <class Layout, int w>
struct BatchGrid {
  std::int64_t part;  // accesses along the channel per block; channels last: rows
  int columns;        // adjacent threads with different channels
  dim3 blocks;

  explicit BatchGrid(const BatchShape& s) : columns(Layout::last ? team_of(s.channels, w, 32) : 1) {
    std::int64_t all = s.batch * s.space;
    if constexpr (!Layout::last) all = s.batch * Layout::template words_of<w>(s.space);
    const std::int64_t most = max_batch_parts(s), strip = Layout::last ? std::int64_t(columns) * w : 1;
    part = (all + most - 1) / most;
    blocks = dim3(unsigned((s.channels + strip - 1) / strip), unsigned((all + part - 1) / part));
  }
};

// f(layout, std::integral_constant<int, w>) for w adjacent elements per access: 16 or 8 bytes or one element. With
// channels first, rows that are no multiple of 8 bytes take 16, whose masks cost less than narrow accesses, unless rows
// are short.
template <class T, class F>
void with_layout(const BatchShape& s, std::initializer_list<const void*> arrays, const F& f) {
  const std::int64_t inner = s.channels_last ? s.channels : s.space;
  const bool masked = !s.channels_last && inner * std::int64_t(sizeof(T)) % 8 != 0 && inner >= 4 * width<T>;
  CommonWidth<T> common(masked ? width<T> : inner);
  for (const void* p : arrays) common.add(p);
  common.with([&](auto elements) {
    constexpr int w = elements * sizeof(T) >= 8 ? int(elements) : 1;
    constexpr std::integral_constant<int, w> constant{};
    if (s.channels_last) return f(ChannelsLast{}, constant);
    if constexpr (w == width<T> && w > 1 && sizeof(T) < 8) {
      if (masked) return f(ChannelsFirst<true>{}, constant);
    }
    f(ChannelsFirst<false>{}, constant);
  });
}

}  // namespace onepass::cuda
