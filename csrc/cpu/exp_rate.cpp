// The rate of the bare vector exponential on data in L1: the limit that separable attention is measured against.
#include <chrono>

#include "../ops.h"
#include "simd.h"

namespace pk {
namespace PK_LEVEL {

double exp_rate(double seconds) {
  constexpr int vectors = 8192 / PK_VECTOR_BYTES;  // 8 KB read and 8 KB written
  Vec<float> source[vectors], target[vectors];
  for (int i = 0; i < vectors; ++i) source[i] = broadcast(-static_cast<float>(i % 16));
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  int64_t done = 0;
  double elapsed = 0;
  do {
    for (int round = 0; round < 64; ++round) {
      for (int i = 0; i < vectors; i += 4) {
        PK_UNROLL
        for (int k = 0; k < 4; ++k) target[i + k] = source[i + k];
        exp2_in_range<float, 4>(target + i);
      }
      asm volatile("" : : "r"(target) : "memory");  // every round counts
      done += vectors;
    }
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return static_cast<double>(done) * Simd<float>::lanes / elapsed;
}

}  // namespace PK_LEVEL
}  // namespace pk
