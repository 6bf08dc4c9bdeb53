// Element types of the CUDA kernels and their 16-byte loads and stores.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"
#include "cuda/platform.cuh"
#include "cuda/tuning.hpp"

namespace onepass::cuda {

__device__ inline float decode(float x) { return x; }
__device__ inline double decode(double x) { return x; }
__device__ inline float decode(__half x) { return __half2float(x); }
__device__ inline float decode(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void encode(float& to, float x) { to = x; }
__device__ inline void encode(double& to, double x) { to = x; }
__device__ inline void encode(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void encode(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// f(Tag<T>{}) for the type T of a dtype: the only list of the engine's types.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(Tag<float>{});
    case DType::float64: return f(Tag<double>{});
    case DType::bfloat16: return f(Tag<__nv_bfloat16>{});
    default: return f(Tag<__half>{});
  }
}

// One element of a type known at run time.
__device__ inline double number_at(DType dtype, const void* p, std::int64_t i) {
  switch (dtype) {
    case DType::float32: return decode(static_cast<const float*>(p)[i]);
    case DType::float64: return decode(static_cast<const double*>(p)[i]);
    case DType::bfloat16: return decode(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return decode(static_cast<const __half*>(p)[i]);
  }
}
__device__ inline void set_number_at(DType dtype, void* p, std::int64_t i, double x) {
  switch (dtype) {
    case DType::float32: return encode(static_cast<float*>(p)[i], float(x));
    case DType::float64: return encode(static_cast<double*>(p)[i], x);
    case DType::bfloat16: return encode(static_cast<__nv_bfloat16*>(p)[i], float(x));
    default: return encode(static_cast<__half*>(p)[i], float(x));
  }
}

// The two as rows/channel.hpp expects them.
struct Numbers {
  static __device__ double get(DType dtype, const void* p, std::int64_t i) { return number_at(dtype, p, i); }
  static __device__ void set(DType dtype, void* p, std::int64_t i, double x) { set_number_at(dtype, p, i, x); }
};

// The most elements of T that one access moves: 16 bytes.
template <class T>
constexpr int width = 16 / sizeof(T);

// The words that memory is accessed by: 16, 8 or 4 bytes, or one element.
template <int bytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};

// n elements in registers, moved by as few accesses as there can be: one of up to 16 bytes, two for 8 float32 beside 8
// elements of 16 bits. Addresses must be multiples of the access.
template <class T, int n>
struct alignas(16) Elements {
  static constexpr int access = sizeof(T) * n < 16 ? sizeof(T) * n : 16, words = sizeof(T) * n / access;
  using Word = std::conditional_t<n == 1, T, typename WordOf<access>::type>;

  T at[n];

  // Zeros unless `exists`.
  static __device__ Elements load(const T* p, bool exists = true) {
    return from_words(exists, [&](int i) { return as_wide<Word>(p)[i]; });
  }
  // Of memory that no running kernel writes and that many threads read: weights, statistics. The machine model of the
  // gate tells these loads from those that stream.
  static __device__ Elements load_cached(const T* p, bool exists = true) {
    return from_words(exists, [&](int i) { return __ldg(as_wide<Word>(p) + i); });
  }
  // By accesses of m elements, where an address is a multiple of no more.
  template <int m>
  static __device__ Elements load_by(const T* p) {
    if constexpr (m == n) {
      return load(p);
    } else {
      Elements e;
      ONEPASS_UNROLL
      for (int i = 0; i < n; i += m) {
        const auto part = Elements<T, m>::load(p + i);
        ONEPASS_UNROLL
        for (int j = 0; j < m; ++j) e.at[i + j] = part.at[j];
      }
      return e;
    }
  }
  // Not by an assignment, which the compiler may split into narrower stores.
  template <tuning::Store how>
  __device__ void store(T* p) const {
    if constexpr (n == 1) {
      *p = at[0];
    } else {
      ONEPASS_UNROLL
      for (int i = 0; i < words; ++i) {
        Word* const to = as_wide<Word>(p) + i;
        const Word word = reinterpret_cast<const Word*>(this)[i];
        if constexpr (how == tuning::Store::write_back) __stwb(to, word);
        if constexpr (how == tuning::Store::streaming) __stcs(to, word);
        if constexpr (how == tuning::Store::plain) store_plain(to, word);
      }
    }
  }

 private:
  // Chosen word by word, because for whole Elements the compiler would choose element by element.
  template <class Load>
  static __device__ Elements from_words(bool exists, const Load& load) {
    Elements e;
    if constexpr (n == 1) {
      T x{};
      if (exists) x = load(0);
      load_here(x);
      e.at[0] = x;
    } else {
      ONEPASS_UNROLL
      for (int i = 0; i < words; ++i) {
        Word word{};
        if (exists) word = load(i);
        load_here(word);
        reinterpret_cast<Word*>(&e)[i] = word;
      }
    }
    return e;
  }
};

// The loader of rows::Stats::kept().
struct Cached {
  template <class F>
  __device__ F operator()(const F* p) const {
    return __ldg(p);
  }
};

// Null counts as aligned.
ONEPASS_HD bool is_aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Finds the widest accesses that a size and all addresses allow.
template <class T>
class CommonWidth {
 public:
  explicit CommonWidth(std::int64_t size) : bits_(16 | std::uintptr_t(size) * sizeof(T)) {}

  void add(const void* p) { bits_ |= reinterpret_cast<std::uintptr_t>(p); }
  // Of an array with elements of another size, which is accessed by as many elements.
  void add(const void* p, std::int64_t element_bytes) {
    bits_ |= reinterpret_cast<std::uintptr_t>(p) % 16 * sizeof(T) / std::uintptr_t(element_bytes);
  }
  // f(std::integral_constant<int, w>) for w elements of T.
  template <class F>
  auto with(const F& f) const {
    return with_at_most<width<T>>(std::int64_t(bits_ & (~bits_ + 1)) / std::int64_t(sizeof(T)), f);
  }

 private:
  template <int w, class F>
  static auto with_at_most(std::int64_t elements, const F& f) {
    if constexpr (w > 1) {
      if (elements < w) return with_at_most<w / 2>(elements, f);
    }
    return f(std::integral_constant<int, w>{});
  }

  std::uintptr_t bits_;  // the lowest one set is the number of bytes
};

// The part of a tensor that a block works on.
struct Chunk {
  int tensor;          // its index
  std::int64_t begin;  // first element
  int size;
};

// Index of the tensor that a chunk belongs to: the last one whose first chunk is not after it. All threads of the block
// take the same branches, and the table is in the constant bank.
__device__ inline int find_tensor(const std::uint32_t* first_chunk, int n_tensors, std::uint32_t chunk) {
  int low = 0, high = n_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The block's chunk. Table: a parameter block that lists tensors.
template <class Table>
__device__ Chunk chunk_of(const Table& table, unsigned number, int chunk_size) {
  Chunk chunk;
  chunk.tensor = find_tensor(table.first_chunk, table.n_tensors, number);
  chunk.begin = std::int64_t(number - table.first_chunk[chunk.tensor]) * chunk_size;
  const std::int64_t left = table.size[chunk.tensor] - chunk.begin;
  chunk.size = left < chunk_size ? int(left) : chunk_size;
  return chunk;
}

}  // namespace onepass::cuda
