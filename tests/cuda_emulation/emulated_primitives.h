// csrc/cuda/primitives.h for the host: every instruction by its definition.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace pk {
namespace cuda {

// --- memory ---

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::state().block.shared);
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::state().block.shared);
}

inline void async_copy(void* shared, const void* global) {
  emulation::must_be_aligned(shared, 16, "a copy's target");
  emulation::must_be_aligned(global, 16, "a copy's source");
  emulation::state().now->uncommitted.push_back({shared, global, 16});
}

inline void async_commit() {
  auto& fiber = *emulation::state().now;
  fiber.groups.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

template <int pending>
void async_wait() {
  auto& groups = emulation::state().now->groups;
  while (groups.size() > pending) {
    for (const auto& copy : groups.front()) emulation::copy(copy);
    groups.erase(groups.begin());
  }
}

#if __CUDA_ARCH__ >= 900

inline emulation::Barrier& emulated_barrier(const void* barrier) {
  emulation::must_be_aligned(barrier, 8, "a barrier");
  auto& barriers = emulation::state().block.barriers;
  if (!barriers.count(barrier)) emulation::fail("a barrier is used before barrier_init");
  return barriers[barrier];
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  std::memset(barrier, 0, sizeof *barrier);
  auto& made = emulation::state().block.barriers[barrier];
  made = {};
  made.arrivals = made.missing = arrivals;
}

inline void barrier_init_fence() {}

inline void end_phase_if_over(emulation::Barrier& barrier) {
  if (barrier.missing > 0 || barrier.expected > 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
}

inline void barrier_arrive(uint64_t* barrier) {
  auto& emulated = emulated_barrier(barrier);
  if (emulated.missing == 0) emulation::fail("more threads arrive at a barrier than it was made for");
  --emulated.missing;
  end_phase_if_over(emulated);
}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulated_barrier(barrier).expected += bytes;
  barrier_arrive(barrier);
}

// Bytes arrive when all else that the phase waits for is there.
inline bool barrier_passed(uint64_t* barrier, uint32_t parity) {
  auto& emulated = emulated_barrier(barrier);
  if (emulated.phase % 2 != parity) return true;
  if (emulated.missing == 0) {
    for (const auto& copy : emulated.copies) {
      emulation::copy(copy);
      emulated.expected -= static_cast<int64_t>(copy.bytes);
    }
    emulated.copies.clear();
    end_phase_if_over(emulated);
  }
  return emulated.phase % 2 != parity;
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulation::wait_until([barrier, parity] { return barrier_passed(barrier, parity); });
}

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulation::must_be_aligned(shared, 16, "a bulk copy's target");
  emulation::must_be_aligned(global, 16, "a bulk copy's source");
  if (bytes % 16) emulation::fail("a bulk copy's size is not a multiple of 16");
  emulated_barrier(barrier).copies.push_back({shared, global, bytes});
}

#endif

// --- numbers ---

inline int anew(int value) { return value; }

inline float exp2_approx(float x) {
  const float result = std::exp2(x < -FLT_MAX ? -INFINITY : x);
  return result < FLT_MIN ? 0.0f : result;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

inline uint16_t float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline float bfloat16_to_float_bits(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pack_bfloat16(float low, float high) {
  return float_to_bfloat16(low) | uint32_t{float_to_bfloat16(high)} << 16;
}

inline uint32_t pack_half(float low, float high) { return float_to_half(low) | uint32_t{float_to_half(high)} << 16; }

inline uint32_t round_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xFFFFE000 : bits;
}

// --- matrix products of a warp ---

namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};

// d (16 x 8) += a (16 x 2 k) b: a lane's registers of a and b hold `per` numbers each, read by number(register, index).
template <int per, class Number>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number number) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const auto all = emulation::meet_lanes(0xFFFFFFFF, mine);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int half = 0; half < 2; ++half) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        const auto& of_a = all[static_cast<size_t>(row % 8 * 4 + quarter)];
        const auto& of_b = all[static_cast<size_t>(column * 4 + quarter)];
        for (int index = 0; index < per; ++index)
          sum += double{number(of_a.a[row / 8 + 2 * half], index)} * number(of_b.b[half], index);
      }
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
}

}  // namespace emulated

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<2>(d, a, b, [](uint32_t pair, int index) {
    return bfloat16_to_float_bits(static_cast<uint16_t>(pair >> 16 * index));
  });
}

inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<2>(d, a, b,
                   [](uint32_t pair, int index) { return half_to_float(static_cast<uint16_t>(pair >> 16 * index)); });
}

// The tensor cores ignore the low 13 bits.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<1>(d, a, b, [](uint32_t bits, int) { return __uint_as_float(bits & 0xFFFFE000); });
}

namespace emulated {

inline void load_matrices(uint32_t (&d)[4], const void* row, bool transposed) {
  emulation::must_be_aligned(row, 16, "a row of a matrix");
  const auto rows = emulation::meet_lanes(0xFFFFFFFF, static_cast<const uint16_t*>(row));
  const int lane = emulation::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int at_row = transposed ? lane % 4 * 2 + i : lane / 4, at_column = transposed ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = rows[static_cast<size_t>(matrix * 8 + at_row)][at_column];
    }
    d[matrix] = pair[0] | pair[1] << 16;
  }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&d)[4], const void* row) { emulated::load_matrices(d, row, false); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) { emulated::load_matrices(d, row, true); }

}  // namespace cuda
}  // namespace pk
