// csrc/cuda/primitives.h for the host: every instruction by its definition.
#pragma once

#include <array>
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

inline const unsigned char* shared_pointer(uint32_t address) {
  const auto& block = emulation::state().block;
  if (address >= block.shared_bytes) emulation::fail("an address is beyond the block's shared memory");
  return block.shared + address;
}

inline void async_copy(void* shared, const void* global) {
  emulation::must_be_aligned(shared, 16, "a copy's target");
  emulation::must_be_aligned(global, 16, "a copy's source");
  emulation::issue(emulation::state().now->uncommitted, {shared, global, 16});
}

inline void async_copy_or_zeros(void* shared, const void* global, bool exists) {
  alignas(16) static const unsigned char zeros[16] = {};
  async_copy(shared, exists ? global : zeros);
}

inline void async_copy_word(void* shared, const void* global) {
  emulation::must_be_aligned(shared, 4, "a copy's target");
  emulation::must_be_aligned(global, 4, "a copy's source");
  emulation::issue(emulation::state().now->uncommitted, {shared, global, 4});
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
    emulation::state().now->products.copies_fenced = false;
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
  emulation::issue(emulated_barrier(barrier).copies, {shared, global, bytes});
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
inline void load_matrices(uint32_t (&d)[4], uint32_t row) { load_matrices(d, shared_pointer(row)); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) { emulated::load_matrices(d, row, true); }
inline void load_matrices_transposed(uint32_t (&d)[4], uint32_t row) {
  load_matrices_transposed(d, shared_pointer(row));
}

// --- matrix products of a warpgroup ---

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PK_WARPGROUP_PRODUCTS

inline uint64_t swizzled_matrix(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows << 32 | kEightRows << 16 | (address & 0x3FFFF) >> 4;
}

inline void async_proxy_fence() { emulation::state().now->products.copies_fenced = true; }
inline void warpgroup_fence() { emulation::state().now->products.fenced = true; }
inline void pin(float (&)[4]) {}
inline void pin(uint32_t (&)[4]) {}

inline void warpgroup_commit() {
  auto& products = emulation::state().now->products;
  for (auto& product : products.uncommitted) products.committed.push_back(std::move(product));
  products.uncommitted.clear();
}

inline void warpgroup_wait() {
  auto& products = emulation::state().now->products;
  if (!products.uncommitted.empty()) emulation::fail("products are waited for that were not committed");
  for (const auto& product : products.committed) product();
  for (const auto& [place, sums] : products.sums) std::copy(sums.begin(), sums.end(), place);
  products.committed.clear();
  products.sums.clear();
  products.fenced = false;
}

namespace emulated {

// A matrix descriptor as the hardware reads it (PTX, "Matrix Descriptor Format").
struct Matrix {
  uint32_t start, leading, stride;

  explicit Matrix(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) emulation::fail("a matrix is not in the 128-byte swizzle");
    if (bits >> 49 & 7) emulation::fail("a matrix begins within the swizzle's pattern");
  }

  // b[k][n]: rows n of 128 bytes in groups of 8, `stride` apart, or rows k of 64 columns, `leading` apart.
  uint16_t at(int k, int n, bool rows) const {
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    uint32_t address = start;
    if (rows)
      address += u(n / 64) * leading + u(k / 8) * stride + u(k % 8 * 128 + n % 64 * 2);
    else
      address += u(n / 8) * stride + u(n % 8 * 128 + k * 2);
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, shared_pointer(address), sizeof bits);
    return bits;
  }
};

struct WarpgroupOperand {
  uint32_t a[4];
  uint64_t b;
  bool accumulate;
};

template <class Number>
void warpgroup_product(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, bool rows,
                       Number number) {
  auto& fiber = *emulation::state().now;
  if (!fiber.products.fenced) emulation::fail("a product before warpgroup_fence");
  if (!fiber.products.copies_fenced) emulation::fail("a product of what async_proxy_fence has not made visible");
  const int warpgroup = fiber.index / 128, thread = fiber.index % 128;
  WarpgroupOperand mine{{a[0], a[1], a[2], a[3]}, b, accumulate};
  const auto all = emulation::meet(emulation::kWarpgroupMeeting, static_cast<uint64_t>(warpgroup), 128, thread, mine);
  if (all[0].b != b || all[0].accumulate != accumulate) emulation::fail("a warpgroup's threads differ in a product");
  float* place = &d[0][0];
  auto& sums = fiber.products.sums[place];
  if (sums.empty()) sums.assign(place, place + 32);
  std::fill(place, place + 32, NAN);  // until the wait
  // Of the operand a this thread's two rows, from the four lanes that share them.
  std::array<std::array<float, 16>, 2> left;
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 2; ++row) {
      const uint32_t pair = all[static_cast<size_t>(thread / 4 * 4 + k % 8 / 2)].a[k / 8 * 2 + row];
      left[static_cast<size_t>(row)][static_cast<size_t>(k)] = number(static_cast<uint16_t>(pair >> k % 2 * 16));
    }
  }
  fiber.products.uncommitted.push_back([&sums, left, b, accumulate, rows, thread, number] {
    const Matrix matrix(b);
    for (int column = 0; column < 16; ++column) {
      float* of_column = &sums[static_cast<size_t>(column / 2 * 4 + column % 2)];
      double sum[2] = {accumulate ? of_column[0] : 0.0, accumulate ? of_column[2] : 0.0};
      for (int k = 0; k < 16; ++k) {
        const double right = number(matrix.at(k, column / 2 * 8 + thread % 4 * 2 + column % 2, rows));
        for (int row = 0; row < 2; ++row) sum[row] += right * left[static_cast<size_t>(row)][static_cast<size_t>(k)];
      }
      for (int row = 0; row < 2; ++row) of_column[2 * row] = static_cast<float>(sum[row]);
    }
  });
}

}  // namespace emulated

template <bool rows>
void warpgroup_product_bfloat16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulated::warpgroup_product(d, a, b, accumulate, rows, bfloat16_to_float_bits);
}

template <bool rows>
void warpgroup_product_half(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulated::warpgroup_product(d, a, b, accumulate, rows, half_to_float);
}

#endif

}  // namespace cuda
}  // namespace pk
