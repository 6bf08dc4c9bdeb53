// How states are kept in memory. Rules compute in float32 in any case: a format is a load and a store of the engine.
//
// The 8-bit formats are linear in the square root r of a gradient's magnitude. Groups of consecutive elements, in the
// order of memory, share a scale s, the largest r of the group:
//   signed8    r = sqrt(|x|)     q = sign(x) * round(127 * r / s)    int8     for moments of the gradient
//   unsigned8  r = sqrt(sqrt(x)) q = round(255 * r / s)              uint8    for states like squares of the gradient
// Both keep gradients down to about 1e-5 of the largest one in a group. A positive square has at least code 1: as zero
// it would turn a first moment that is still there into a huge step. An infinity or a NaN makes its whole group NaN:
// never a wrong finite number.
#pragma once
#include "core/types.hpp"
#include "core/value.hpp"

namespace onepass {

enum class StateFormat : std::uint8_t { full, bfloat16, signed8, unsigned8 };

constexpr bool is_8bit(StateFormat format) {
  return format == StateFormat::signed8 || format == StateFormat::unsigned8;
}

// Elements per scale; the last group of a tensor may be shorter.
constexpr std::int64_t scale_group = 64;
ONEPASS_HD constexpr std::int64_t scale_groups(std::int64_t size) { return (size + scale_group - 1) / scale_group; }

// The formats of a tensor's states, and the scales of the 8-bit ones.
struct StateStorage {
  StateFormat format[max_states];
  float* scale[max_states];
};

namespace storage {

ONEPASS_HD constexpr float levels(StateFormat format) { return format == StateFormat::signed8 ? 127.0f : 255.0f; }

// The power of a root that gives its value back must not overflow: the scale is at most slightly less than the root of
// the largest float.
ONEPASS_HD constexpr float largest_scale(StateFormat format) {
  return format == StateFormat::signed8 ? 0x1.ffffep63f : 0x1.ffffep31f;
}

// Adding it rounds a small number to the nearest integer, ties to even, and puts that integer into the lowest bits.
constexpr float round_to_integer = 0x1.8p23f;

template <class V>
ONEPASS_HD V magnitude(V x) {
  return select(x < 0, -x, x);
}
// The value of a code; unit is scale / levels.
template <StateFormat format, class V>
ONEPASS_HD V value_of(V code, float unit) {
  const V root = code * unit, square = root * magnitude(root);
  return format == StateFormat::signed8 ? square : square * square;
}
template <StateFormat format, class V>
ONEPASS_HD V root_of(V x) {
  if constexpr (format == StateFormat::signed8) return sqrt(magnitude(x));
  return sqrt(sqrt(select(x < 0, V{}, x)));
}
// The code of a value with this root, not yet rounded; inverse is levels / scale.
template <StateFormat format, class V>
ONEPASS_HD V code_of(V x, V root, float inverse) {
  const V code = root * inverse;
  if constexpr (format == StateFormat::signed8) return select(x < 0, -code, code);
  return select(code < 1, select(root > 0, V{} + 1, V{}), code);
}

}  // namespace storage
}  // namespace onepass
