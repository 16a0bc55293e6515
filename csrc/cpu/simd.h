// Vectors of the level being compiled, and exp2 on them. Included only by kernel files, which the build compiles once
// per level with PK_LEVEL (the namespace) and PK_VECTOR_BYTES; everything here has internal linkage, so that no code
// compiled for a newer processor can be linked into an older level.
#pragma once

#include <cstdint>
#include <cstring>

#include "../tensor.h"

#define PK_UNROLL _Pragma("GCC unroll 8")

namespace pk {
namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(PK_VECTOR_BYTES), may_alias));
  typedef int32_t Int __attribute__((vector_size(PK_VECTOR_BYTES), may_alias));
  static constexpr int lanes = PK_VECTOR_BYTES / 4;
  static constexpr int mantissa_bits = 23;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  static constexpr float min_exponent = -126.0f;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(PK_VECTOR_BYTES), may_alias));
  typedef int64_t Int __attribute__((vector_size(PK_VECTOR_BYTES), may_alias));
  static constexpr int lanes = PK_VECTOR_BYTES / 8;
  static constexpr int mantissa_bits = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double min_exponent = -1022.0;
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline Vec<T> load(const T* source) {
  return *reinterpret_cast<const Vec<T>*>(source);
}
template <class T>
inline void store(T* target, Vec<T> value) {
  *reinterpret_cast<Vec<T>*>(target) = value;
}
template <class T>
inline Vec<T> load_unaligned(const T* source) {
  Vec<T> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
template <class T>
inline void store_unaligned(T* target, Vec<T> value) {
  std::memcpy(target, &value, sizeof(value));
}
// value - 0 is value for every value, so this compiles to one broadcast; value + 0 would not (-0).
template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}
// The second operand where either is NaN, as the machine instruction: NaN stays where it stands in `value`.
template <class T>
inline Vec<T> at_least(Vec<T> floor, Vec<T> value) {
  return floor > value ? floor : value;
}
template <class T>
inline Vec<T> larger(Vec<T> left, Vec<T> right) {
  return left > right ? left : right;
}
template <class T>
inline Vec<T> smaller(Vec<T> left, Vec<T> right) {
  return left < right ? left : right;
}
// Stops the compiler from contracting a product into a later addition: multiplications and additions run on
// different ports, and the balance decides the speed of the accumulation loop.
template <class T>
inline Vec<T> product(Vec<T> left, Vec<T> right) {
  Vec<T> value = left * right;
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}
template <class Int>
inline bool any(Int lanes) {
  uint64_t words[sizeof(Int) / 8];
  std::memcpy(words, &lanes, sizeof(Int));
  uint64_t found = 0;
  for (uint64_t word : words) found |= word;
  return found != 0;
}

// Near-minimax polynomials of 2^f on [-1/2, 1/2]: relative error 9.1e-8 for float, 3.3e-18 for double; exactly 1 at 0.
inline constexpr float kExp2Float[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647238f};
inline constexpr double kExp2Double[] = {
    1.0,
    0.6931471805599453254,
    0.24022650695910131437,
    0.055504108664820139351,
    0.009618129107594091662,
    0.00133335581467603754,
    0.00015403530457106815767,
    0.00001525273350663254331,
    1.3215435300399274052e-6,
    1.0178194151780158533e-7,
    7.073778124838665557e-9,
    4.4355502551216858547e-10,
};

template <class T>
inline Vec<T> exp2_polynomial(Vec<T> f) {
  if constexpr (sizeof(T) == 4) {
    Vec<T> p = f * kExp2Float[5] + kExp2Float[4];
    p = p * f + kExp2Float[3];
    p = p * f + kExp2Float[2];
    p = p * f + kExp2Float[1];
    return p * f + kExp2Float[0];
  } else {
    constexpr int degree = sizeof(kExp2Double) / sizeof(double) - 1;
    Vec<T> p = f * kExp2Double[degree] + kExp2Double[degree - 1];
    for (int k = degree - 2; k >= 0; --k) p = p * f + kExp2Double[k];
    return p;
  }
}

// 2^x for x in [min_exponent, max exponent); NaN gives NaN. Four vectors in step keep all ports busy.
template <class T, int N>
inline void exp2_in_range(Vec<T>* values) {
  using S = Simd<T>;
  Vec<T> f[N], n[N];
  PK_UNROLL
  for (int k = 0; k < N; ++k) n[k] = values[k] + S::round_magic;
  PK_UNROLL
  for (int k = 0; k < N; ++k) f[k] = values[k] - (n[k] - S::round_magic);
  PK_UNROLL
  for (int k = 0; k < N; ++k) {
    values[k] = (Vec<T>)((typename S::Int)exp2_polynomial<T>(f[k]) + ((typename S::Int)n[k] << S::mantissa_bits));
  }
}

// 2^x for any x below the largest exponent: 0 under min_exponent - 1, NaN for NaN.
template <class T>
inline Vec<T> exp2_any(Vec<T> x) {
  using S = Simd<T>;
  x = at_least<T>(broadcast<T>(S::min_exponent - T(1)), x);
  Vec<T> n = x + S::round_magic;
  const Vec<T> f = x - (n - S::round_magic);
  const Vec<T> result = (Vec<T>)((typename S::Int)exp2_polynomial<T>(f) + ((typename S::Int)n << S::mantissa_bits));
  const Vec<T> flushed = x < S::min_exponent ? Vec<T>{} : result;
  return x == x ? flushed : x;
}

// 2^x for any x below the largest exponent: 0 from min_exponent - 1 down, NaN for NaN. Shorter than exp2_any: the power
// of two is made by a shift, where exponent 0 stands for zero, and multiplied, which keeps every NaN.
template <class T>
inline Vec<T> exp2_flushed(Vec<T> x) {
  using S = Simd<T>;
  constexpr T magic = S::round_magic - (S::min_exponent - 1);
  x = at_least<T>(broadcast<T>(S::min_exponent - T(1)), x);
  const Vec<T> n = x + magic;
  const Vec<T> f = x - (n - magic);
  return exp2_polynomial<T>(f) * (Vec<T>)((typename S::Int)n << S::mantissa_bits);
}

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Exact for every half, subnormals, infinities and NaN included.
inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t exponent = bits & 0x0f800000;
  bits += 112u << 23;
  if (exponent == 0x0f800000) bits += 112u << 23;  // infinity, NaN
  float result;
  if (exponent == 0) {  // zero, subnormal: renormalised by the subtraction
    bits += 1u << 23;
    std::memcpy(&result, &bits, 4);
    result -= 6.103515625e-05f;
    std::memcpy(&bits, &result, 4);
  }
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <class T, class X>
inline T convert(X value) {
  if constexpr (sizeof(X) == 2) {
    return static_cast<T>(to_float(value));
  } else {
    return static_cast<T>(value);
  }
}

// Round to nearest even, NaN kept.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  bits += 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline Float16 to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond the largest half
  if (bits < 0x38800000) {                                                // subnormal: the addition rounds to even
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13))};
}

template <class Y, class T>
inline Y convert_back(T value) {
  if constexpr (sizeof(Y) == 2) {
    if constexpr (__is_same(Y, BFloat16)) {
      return to_bfloat16(static_cast<float>(value));
    } else {
      return to_float16(static_cast<float>(value));
    }
  } else {
    return static_cast<Y>(value);
  }
}

// Calls f(Type{}) for the dtype's C++ type.
template <class F>
inline void with_floating_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Float16{});
    default:
      return f(float{});
  }
}
template <class F>
inline void with_data_type(DType dtype, const F& f) {
  if (dtype == DType::uint8) return f(uint8_t{});
  with_floating_type(dtype, f);
}

}  // namespace
}  // namespace pk
