// Runs the CPU engine's baseline on made-up data, without Python and torch, and prints what comes out, for run.py to
// compare between processors:
//
//   exact NAME HASH            every bit has to be the same: update rules, dropout
//   close NAME VALUE...        rounding may differ: norms and totals are sums, and may use fused multiply-adds
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "core/engine.hpp"
#include "core/rule.hpp"
#include "onepass_rules.hpp"

namespace onepass {

namespace cpu::baseline {
extern const Engine engine;
#define ONEPASS_DECLARE_TABLE(rule) extern const ApplyFunction* const rule##_table;
ONEPASS_RULES(ONEPASS_DECLARE_TABLE)
#undef ONEPASS_DECLARE_TABLE
}  // namespace cpu::baseline

namespace {

using cpu::baseline::engine;
constexpr StreamRef one_thread{1, 0, nullptr};
constexpr const char* dtype_names[] = {"float32", "float64", "bfloat16", "float16"};
const char* name_of(DType dtype) { return dtype_names[static_cast<int>(dtype)]; }

// Numbers in (0, 1) from the top bits of a 64-bit congruential generator: the same everywhere.
struct Random {
  std::uint64_t state;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (static_cast<double>(state >> 40) + 0.5) * 0x1p-24;
  }
};

// An array of any dtype.
struct Array {
  DType dtype;
  std::vector<unsigned char> bytes;

  Array(DType dtype, std::int64_t size) : dtype(dtype), bytes(static_cast<std::size_t>(size * size_of(dtype))) {}

  // Values between -1 and 1, a few of them zero.
  static Array drawn(DType dtype, std::int64_t size, Random& random) {
    Array out(dtype, size);
    for (std::int64_t i = 0; i < size; ++i) {
      const double magnitude = random.next(), sign = random.next();
      out.set(i, sign > 0.95 ? 0 : sign < 0.475 ? -magnitude : magnitude);
    }
    return out;
  }

  // Values between `least` and least + 1.
  static Array from(double least, DType dtype, std::int64_t size, Random& random) {
    Array out(dtype, size);
    for (std::int64_t i = 0; i < size; ++i) out.set(i, least + random.next());
    return out;
  }

  void set(std::int64_t i, double value) {
    unsigned char* const at = bytes.data() + i * size_of(dtype);
    const float single = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == DType::float64) return void(std::memcpy(at, &value, 8));
    if (dtype == DType::float32) return void(std::memcpy(at, &single, 4));
    // Truncated; as float16 what is below 2^-14 becomes zero.
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t half = bits >> 16;
    if (dtype == DType::float16)
      half = ((bits >> 16) & 0x8000u) | (magnitude < 0x38800000u ? 0 : (magnitude - (112u << 23)) >> 13);
    const auto short_bits = static_cast<std::uint16_t>(half);
    std::memcpy(at, &short_bits, 2);
  }

  double at(std::int64_t i) const {
    const unsigned char* const from = bytes.data() + i * size_of(dtype);
    double value;
    float single;
    if (dtype == DType::float64) return std::memcpy(&value, from, 8), value;
    if (dtype == DType::float32) return std::memcpy(&single, from, 4), single;
    std::uint16_t half;
    std::memcpy(&half, from, 2);
    std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    if (dtype == DType::float16) {  // by scaling: right for subnormals, and everything here is finite
      bits = (static_cast<std::uint32_t>(half & 0x8000u) << 16) | (static_cast<std::uint32_t>(half & 0x7fffu) << 13);
      std::memcpy(&single, &bits, 4);
      return static_cast<double>(single) * 0x1p112;
    }
    std::memcpy(&single, &bits, 4);
    return single;
  }

  std::int64_t size() const { return static_cast<std::int64_t>(bytes.size()) / size_of(dtype); }
  void* data() { return bytes.data(); }
};

struct Hash {  // FNV-1a
  std::uint64_t value = 14695981039346656037u;
  int not_finite = 0;
  void add(const std::vector<unsigned char>& bytes) {
    for (const unsigned char byte : bytes) value = (value ^ byte) * 1099511628211u;
  }
  void add(const Array& array) {
    add(array.bytes);
    for (std::int64_t i = 0; i < array.size(); ++i) not_finite += !(array.at(i) - array.at(i) == 0);
  }
};

void print_exact(const std::string& name, const Hash& hash) {
  // A hash of infinities would prove little.
  std::printf("%s %s %016" PRIx64 "\n", hash.not_finite == 0 ? "exact" : "not-finite", name.c_str(), hash.value);
}

void print_close(const std::string& name, std::initializer_list<const Array*> arrays) {
  std::printf("close %s", name.c_str());
  for (const Array* array : arrays)
    for (std::int64_t i = 0; i < array->size(); ++i) std::printf(" %.17g", array->at(i));
  std::printf("\n");
}

// ---- rules

// Five steps on tensors of several sizes, so that packs and tails are in it, for several sets of hyper-parameters.
template <class Rule>
void report_rule(const std::string& name, ApplyFunction apply) {
  constexpr int n_hyper = sizeof(typename Rule::Hyper) / sizeof(double);
  for (const DType dtype : all_dtypes) {
    Random random{42};
    Hash hash;
    for (int set = 0; set < 8; ++set) {
      Scalar hyper[n_hyper]{};
      typename Rule::Hyper values;
      // Each is zero in some sets, which switches a term off; eps never is, because a division by zero compares
      // nothing.
      std::istringstream names(Rule::hyper_names);
      for (Scalar& h : hyper) {
        std::string hyper_name;
        names >> hyper_name;
        h.value = random.next() < 0.25 && hyper_name != "eps," ? 0 : random.next();
      }
      hyper[0].value = 0.01 + 0.1 * random.next();
      for (int i = 0; i < n_hyper; ++i) std::memcpy(reinterpret_cast<double*>(&values) + i, &hyper[i].value, 8);
      std::vector<Array> arrays;
      std::vector<Item> items;
      for (const std::int64_t size : {1, 2, 3, 5, 7, 8, 31, 64, 250}) {
        Item item{};
        item.size = size;
        arrays.push_back(Array::drawn(dtype, size, random));
        item.param = arrays.back().data();
        arrays.push_back(Array::drawn(dtype, size, random));
        item.grad = arrays.back().data();
        for (int s = 0; s < Rule::n_state; ++s) {
          // The first state is the largest, as a mean of squares is not below the square of a mean.
          arrays.push_back(Array::from(s == 0 ? 1 : 0, compute_dtype(dtype), size, random));
          item.state[s] = arrays.back().data();
        }
        items.push_back(item);
      }
      CarriedNumbers stored{1, 1};
      std::vector<unsigned char> workspace(static_cast<std::size_t>(apply_workspace(1)));
      for (int t = 1; t <= 5; ++t) {
        CarriedNumbers now = stored;
        Carried<Rule>::template carry<float>(values, t, now, stored);
        const StepKey key{static_cast<double>(t), now, nullptr, {}, false};
        const GradScaling scaling{t % 2 == 0, false, 0, true, 0.5};
        apply({dtype,
               items.data(),
               static_cast<std::int64_t>(items.size()),
               &key,
               1,
               hyper,
               scaling,
               2.0,
               0.7,
               {},
               workspace.data(),
               one_thread});
      }
      for (const Array& array : arrays) hash.add(array);
    }
    print_exact(name + " " + name_of(dtype), hash);
  }
}

template <class... Rules>
void report_rules(const std::string& name, const ApplyFunction* table, Variants<Rules...>) {
  int variant = 0;
  (..., (report_rule<Rules>(name + "-" + std::to_string(variant), table[variant]), ++variant));
}

// ---- layers and totals

void report_dropout(DType dtype) {
  const std::int64_t size = 1003, seed = 12345;
  Random random{7};
  Array x = Array::drawn(dtype, size, random), y(dtype, size);
  std::vector<unsigned char> mask(static_cast<std::size_t>((size + 7) / 8));
  engine.dropout({dtype, size, x.data(), y.data(), mask.data(), false, {&seed, 1288490189u, 1 / 0.7}}, one_thread);
  Hash hash;
  hash.add(y);
  hash.add(mask);
  print_exact(std::string("dropout ") + name_of(dtype), hash);
}

void report_row_norm(DType dtype, bool rms, std::int64_t n) {
  const std::int64_t rows = 9;
  const DType wide = compute_dtype(dtype);
  Random random{3};
  Array x = Array::drawn(dtype, rows * n, random), weight = Array::drawn(wide, n, random),
        bias = Array::drawn(wide, n, random), dy = Array::drawn(dtype, rows * n, random), y(dtype, rows * n),
        stats(wide, 3 * rows), dx(dtype, rows * n), dweight(wide, n), dbias(wide, n);
  RowNorm call{};
  call.dtype = dtype, call.weight_dtype = wide, call.rms = rms, call.rows = rows, call.size = n, call.eps = 1e-5;
  call.x = x.data(), call.weight = weight.data(), call.bias = bias.data(), call.y = y.data();
  call.stats = stats.data();
  std::vector<unsigned char> workspace(static_cast<std::size_t>(engine.row_norm_workspace(call)));
  call.workspace = workspace.data();
  engine.row_norm(call, one_thread);

  RowNormBackward back{};
  back.dtype = dtype, back.weight_dtype = wide, back.rms = rms, back.rows = rows, back.size = n, back.eps = 1e-5;
  back.dy = dy.data(), back.x = x.data(), back.weight = weight.data(), back.stats = stats.data(), back.dx = dx.data();
  back.dweight = dweight.data(), back.dbias = dbias.data();
  std::vector<unsigned char> more(static_cast<std::size_t>(engine.row_norm_backward_workspace(back)));
  back.workspace = more.data();
  engine.row_norm_backward(back, one_thread);
  print_close((rms ? "rms_norm-" : "layer_norm-") + std::to_string(n) + " " + name_of(dtype),
              {&y, &dx, &dweight, &dbias});
}

void report_batch_norm(DType dtype, bool channels_last) {
  const BatchShape shape{4, 6, 35, channels_last};
  const std::int64_t size = shape.batch * shape.channels * shape.space, n = shape.channels;
  const DType wide = compute_dtype(dtype);
  Random random{5};
  Array x = Array::drawn(dtype, size, random), weight = Array::drawn(wide, n, random),
        bias = Array::drawn(wide, n, random), dy = Array::drawn(dtype, size, random), y(dtype, size),
        stats(wide, 3 * n), mean(wide, n), var(wide, n), sums(wide, 2 * n), dx(dtype, size), dweight(wide, n),
        dbias(wide, n);
  std::vector<unsigned char> workspace(static_cast<std::size_t>(engine.batch_norm_workspace(shape)));
  BatchNorm call{};
  call.dtype = dtype, call.weight_dtype = wide, call.shape = shape, call.phase = Phase::all, call.eps = 1e-5;
  call.x = x.data(), call.weight = weight.data(), call.bias = bias.data(), call.y = y.data();
  call.stats = stats.data(), call.running_dtype = wide, call.running_mean = mean.data(), call.running_var = var.data();
  call.momentum = 0.1, call.workspace = workspace.data();
  engine.batch_norm(call, one_thread);

  BatchNormBackward back{};
  back.dtype = dtype, back.weight_dtype = wide, back.shape = shape, back.phase = Phase::all, back.training = true;
  back.dy = dy.data(), back.x = x.data(), back.weight = weight.data(), back.stats = stats.data();
  back.sums = sums.data(), back.count = static_cast<double>(shape.batch * shape.space), back.dx = dx.data();
  back.dweight = dweight.data(), back.dbias = dbias.data(), back.workspace = workspace.data();
  engine.batch_norm_backward(back, one_thread);
  print_close(std::string(channels_last ? "batch_norm_channels_last " : "batch_norm ") + name_of(dtype),
              {&y, &mean, &var, &dx, &dweight, &dbias});
}

void report_total(DType dtype, Total total) {
  const std::int64_t size = 5003;
  Random random{11};
  Array x = Array::drawn(dtype, size, random), sum(DType::float64, 1);
  const void* const data[] = {x.data()};
  std::vector<double> partials(static_cast<std::size_t>(engine.reduce_partials(size)));
  engine.reduce({{total, 3}, dtype, data, data, &size, 1, partials.data(), one_thread});
  engine.join(total, partials.data(), static_cast<std::int64_t>(partials.size()), static_cast<double*>(sum.data()),
              one_thread);
  print_close("total-" + std::to_string(static_cast<int>(total)) + " " + name_of(dtype), {&sum});
}

}  // namespace
}  // namespace onepass

int main() {
  using namespace onepass;
#define ONEPASS_REPORT(rule) report_rules(#rule, cpu::baseline::rule##_table, rules::rule{});
  ONEPASS_RULES(ONEPASS_REPORT)
  for (const DType dtype : all_dtypes) {
    report_dropout(dtype);
    for (const bool rms : {false, true})
      for (const std::int64_t n : {5, 64, 129}) report_row_norm(dtype, rms, n);
    for (const bool channels_last : {false, true}) report_batch_norm(dtype, channels_last);
    for (const Total total : {Total::squares, Total::magnitudes, Total::powers, Total::largest, Total::smallest})
      report_total(dtype, total);
  }
}
