// Philox 4x32-10 (Salmon et al. 2011): attention dropout decided by counters, the same in forward, backward and every
// backend.
//
// Word (token mod 4) of counter (token / 4, row, batch, offset) under key (seed low, seed high) belongs to (batch, row,
// token); the weight is dropped where the word is below p * 2^32.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace pk {
namespace {

inline void philox(uint32_t* counter, uint64_t seed) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product_1 = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t word_0 = static_cast<uint32_t>(product_1 >> 32) ^ counter[1] ^ key_0;
    const uint32_t word_2 = static_cast<uint32_t>(product_0 >> 32) ^ counter[3] ^ key_1;
    counter[1] = static_cast<uint32_t>(product_1);
    counter[3] = static_cast<uint32_t>(product_0);
    counter[0] = word_0;
    counter[2] = word_2;
    key_0 += 0x9E3779B9;
    key_1 += 0xBB67AE85;
  }
}

// Scales of `width` rows from first_row on, token after token: 0 or 1 / (1 - p). Four tokens share one counter.
template <class T, int width>
class DropoutScales {
 public:
  DropoutScales(const Dropout& dropout, int64_t batch_index, int64_t first_row)
      : dropout_(dropout),
        threshold_(static_cast<uint64_t>(dropout.p * 4294967296.0)),
        kept_(static_cast<T>(1.0 / (1.0 - dropout.p))),
        batch_index_(static_cast<uint32_t>(batch_index)),
        first_row_(static_cast<uint32_t>(first_row)) {}

  void of_token(int64_t token, T* keep) {
    if (token >> 2 != quad_) {
      quad_ = token >> 2;
      for (uint32_t i = 0; i < width; ++i) {
        uint32_t* words = words_[i];
        words[0] = static_cast<uint32_t>(quad_), words[1] = first_row_ + i, words[2] = batch_index_,
        words[3] = dropout_.offset;
        philox(words, dropout_.seed);
      }
    }
    for (int i = 0; i < width; ++i) keep[i] = words_[i][token & 3] < threshold_ ? T(0) : kept_;
  }

 private:
  const Dropout& dropout_;
  uint64_t threshold_;
  T kept_;
  uint32_t batch_index_, first_row_;
  int64_t quad_ = -1;
  uint32_t words_[width][4];
};

// Scales of one row for tokens [first_token, first_token + count), first_token a multiple of 4; keep has room for a
// multiple of 4.
template <class T>
inline void dropout_row(const Dropout& dropout, int64_t batch_index, int64_t row, int64_t first_token, int64_t count,
                        T* keep) {
  const uint64_t threshold = static_cast<uint64_t>(dropout.p * 4294967296.0);
  const T kept = static_cast<T>(1.0 / (1.0 - dropout.p));
  for (int64_t token = 0; token < count; token += 4) {
    uint32_t words[4] = {static_cast<uint32_t>((first_token + token) >> 2), static_cast<uint32_t>(row),
                         static_cast<uint32_t>(batch_index), dropout.offset};
    philox(words, dropout.seed);
    for (int i = 0; i < 4; ++i) keep[token + i] = words[i] < threshold ? T(0) : kept;
  }
}

// The same for tokens that are listed in ascending order.
template <class T>
inline void dropout_tokens(const Dropout& dropout, int64_t batch_index, int64_t row, const int64_t* tokens,
                           int64_t count, T* keep) {
  DropoutScales<T, 1> scales(dropout, batch_index, row);
  for (int64_t i = 0; i < count; ++i) scales.of_token(tokens[i], keep + i);
}

}  // namespace
}  // namespace pk
