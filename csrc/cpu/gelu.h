// GELU and its slope on vectors, exact (erf) and by tanh; part of the epilogues in linear.cpp. Included only by kernel
// files, as simd.h is.
#pragma once

#include <cmath>

#include "../ops.h"
#include "simd.h"

namespace pk {
namespace {

// log2 of the normal distribution's lower tail, log2(Phi(-a)) + 1 = a * polynomial(a) on [0, 8]: absolute error of
// a * Phi(-a) 5e-10 before rounding. Fitted in that measure; exact at 0.
inline constexpr float kLogTail[] = {-1.15110421f,    -0.459222525f,    -0.0524277017f,  0.00691053411f,
                                     4.65961712e-05f, -0.000312071905f, 8.92854587e-05f, -1.38397490e-05f,
                                     1.19568460e-06f, -4.47999078e-08f};
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInverseSqrtTwoPi = 0.39894228040143267794;
constexpr double kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;

// Phi(x) = (1 + erf(x / sqrt(2))) / 2. For double, which is there to check gradients, by the C library.
template <class T>
inline Vec<T> normal_distribution(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    const Vec<T> magnitude = x < T(0) ? -x : x;
    const Vec<T> a = smaller<T>(broadcast<T>(8), magnitude);
    constexpr int degree = sizeof(kLogTail) / sizeof(float) - 1;
    Vec<T> p = a * kLogTail[degree] + kLogTail[degree - 1];
    PK_UNROLL
    for (int k = degree - 2; k >= 0; --k) p = p * a + kLogTail[k];
    Vec<T> tail = p * a - T(1);
    exp2_in_range<T, 1>(&tail);
    tail = magnitude > T(8) ? Vec<T>{} : tail;
    return x > T(0) ? T(1) - tail : tail;
  } else {
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) x[lane] = T(0.5) * std::erfc(-x[lane] * T(kSqrtHalf));
    return x;
  }
}

template <class T>
inline Vec<T> normal_density(Vec<T> x) {
  return exp2_any<T>(x * x * T(-0.5 * kLog2E)) * T(kInverseSqrtTwoPi);
}

// (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) for u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class T>
inline Vec<T> tanh_distribution(Vec<T> x) {
  const Vec<T> exponent = (x + x * x * x * T(kCubic)) * T(-2 * kSqrtTwoOverPi * kLog2E);
  const Vec<T> ratio = exp2_any<T>(smaller<T>(broadcast<T>(-Simd<T>::min_exponent), exponent));
  return exponent > -Simd<T>::min_exponent ? Vec<T>{} : T(1) / (T(1) + ratio);
}

template <class T, Activation A>
inline Vec<T> activation(Vec<T> x) {
  if constexpr (A == Activation::gelu) return x * normal_distribution<T>(x);
  if constexpr (A == Activation::gelu_tanh) return x * tanh_distribution<T>(x);
  return x;
}

template <class T>
struct Activated {
  Vec<T> value, slope;
};

template <class T, Activation A>
inline Activated<T> activation_and_slope(Vec<T> x) {
  if constexpr (A == Activation::gelu) {
    const Vec<T> below = normal_distribution<T>(x);
    return {x * below, below + x * normal_density<T>(x)};
  } else if constexpr (A == Activation::gelu_tanh) {
    const Vec<T> below = tanh_distribution<T>(x);
    // Far from 0 the second term is 0; x is kept from overflowing in it.
    const Vec<T> near = at_least<T>(broadcast<T>(-32), smaller<T>(broadcast<T>(32), x));
    const Vec<T> slope_of_u = T(kSqrtTwoOverPi) + near * near * T(3 * kCubic * kSqrtTwoOverPi);
    return {x * below, below + near * below * (T(1) - below) * T(2) * slope_of_u};
  } else {
    return {x, broadcast<T>(1)};
  }
}

}  // namespace
}  // namespace pk
