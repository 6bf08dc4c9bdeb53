// Conversions of whole states, for checkpoints. Compiled like the rules, without fused multiply-adds, because a step
// has to give the same codes.
#include "cpu/storage.hpp"

#include "core/engine.hpp"
#include "cpu/partition.hpp"
#include "cpu/threads.hpp"

namespace onepass::cpu::ONEPASS_ISA {

constexpr std::int64_t bytes_per_element = 6;

void convert_state(const ConvertState& call) {
  const auto body = [](void* context, int thread, int n_threads) {
    const ConvertState& c = *static_cast<const ConvertState*>(context);
    std::int64_t begin, end;
    part_of(c.size, scale_group, thread, n_threads, begin, end);
    alignas(64) float tile[scale_group];
    for (std::int64_t i = begin; i < end; i += scale_group) {
      const std::int64_t count = end - i < scale_group ? end - i : scale_group;
      if (c.encode) {
        std::memcpy(tile, c.values + i, static_cast<std::size_t>(count) * sizeof(float));
        encode_state(c.format, tile, i, count, c.state, c.scale);
      } else {
        decode_state(c.format, c.state, c.scale, i, count, tile);
        std::memcpy(c.values + i, tile, static_cast<std::size_t>(count) * sizeof(float));
      }
    }
  };
  ConvertState copy = call;
  run_parallel(threads_for(call.size * bytes_per_element, call.where.max_threads), body, &copy);
}

}  // namespace onepass::cpu::ONEPASS_ISA
