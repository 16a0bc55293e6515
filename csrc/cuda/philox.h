// Attention dropout by Philox 4x32-10 (Salmon et al. 2011), bit for bit as csrc/cpu/philox.h: word (token mod 4) of
// counter (token / 4, row, batch, offset) under the seed; a weight is dropped where its word is below p * 2^32.
#pragma once

#include "../ops.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

struct DropoutRule {
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;  // p < 1, so that it fits
  float kept;          // 1 / (1 - p)

  explicit DropoutRule(const Dropout& dropout)
      : seed(dropout.seed),
        offset(dropout.offset),
        threshold(static_cast<uint32_t>(dropout.p * 4294967296.0)),
        kept(static_cast<float>(1.0 / (1.0 - dropout.p))) {}
};

// What the weights of four tokens, 4 quad to 4 quad + 3, of a row are multiplied with.
__device__ inline float4 keep_scales(const DropoutRule& rule, uint32_t batch, uint32_t row, uint32_t quad) {
  uint32_t words[4] = {quad, row, batch, rule.offset};
  uint32_t key_0 = static_cast<uint32_t>(rule.seed), key_1 = static_cast<uint32_t>(rule.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_0 = __umulhi(0xD2511F53u, words[0]), low_0 = 0xD2511F53u * words[0];
    const uint32_t high_1 = __umulhi(0xCD9E8D57u, words[2]), low_1 = 0xCD9E8D57u * words[2];
    words[0] = high_1 ^ words[1] ^ key_0;
    words[1] = low_1;
    words[2] = high_0 ^ words[3] ^ key_1;
    words[3] = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  const auto scale = [&](uint32_t word) { return word < rule.threshold ? 0.0f : rule.kept; };
  return make_float4(scale(words[0]), scale(words[1]), scale(words[2]), scale(words[3]));
}

__device__ inline float keep_scale(const DropoutRule& rule, uint32_t batch, uint32_t row, int64_t token) {
  const float4 scales = keep_scales(rule, batch, row, static_cast<uint32_t>(token >> 2));
  const int word = static_cast<int>(token & 3);
  return word == 0 ? scales.x : word == 1 ? scales.y : word == 2 ? scales.z : scales.w;
}

}  // namespace
}  // namespace cuda
}  // namespace pk
