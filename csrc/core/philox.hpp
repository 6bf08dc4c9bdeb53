// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words from a key and a
// counter, without a state. A dropout mask depends only on (seed, element index), so it is the same on every device and
// for any number of threads, and backward can recompute it.
#pragma once
#include "core/value.hpp"

namespace onepass {

struct Philox {
  static constexpr int rounds = 10, words = 4;
  static constexpr std::uint32_t multiplier0 = 0xD2511F53, multiplier1 = 0xCD9E8D57;
  static constexpr std::uint32_t key_step0 = 0x9E3779B9, key_step1 = 0xBB67AE85;

  std::uint32_t word[words];

  // The words of elements 4 q to 4 q + 3.
  ONEPASS_HD Philox(std::uint64_t seed, std::uint64_t q)
      : word{static_cast<std::uint32_t>(q), static_cast<std::uint32_t>(q >> 32), 0, 0} {
    std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < rounds; ++round) {
      const std::uint64_t product0 = static_cast<std::uint64_t>(multiplier0) * word[0];
      const std::uint64_t product1 = static_cast<std::uint64_t>(multiplier1) * word[2];
      word[0] = static_cast<std::uint32_t>(product1 >> 32) ^ word[1] ^ key0;
      word[1] = static_cast<std::uint32_t>(product1);
      word[2] = static_cast<std::uint32_t>(product0 >> 32) ^ word[3] ^ key1;
      word[3] = static_cast<std::uint32_t>(product0);
      key0 += key_step0;
      key1 += key_step1;
    }
  }
};

}  // namespace onepass
