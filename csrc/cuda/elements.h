// Numbers in memory as kernels compute with them: loaded as float, rounded to nearest when stored.
#pragma once

#include "../tensor.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float(float x) {
  return {float_to_bfloat16(x)};
}
template <>
__device__ __forceinline__ Float16 from_float(float x) {
  return {float_to_half(x)};
}

template <class T>
struct Type {
  using type = T;
};

// call(Type<T>{}) with the floating type of this dtype, float64 excluded.
template <class Call>
auto with_floating(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::bfloat16:
      return call(Type<BFloat16>{});
    case DType::float16:
      return call(Type<Float16>{});
    default:
      return call(Type<float>{});
  }
}

// The same, or with bytes: raw pixels.
template <class Call>
auto with_data(DType dtype, const Call& call) {
  return dtype == DType::uint8 ? call(Type<uint8_t>{}) : with_floating(dtype, call);
}

}  // namespace
}  // namespace cuda
}  // namespace pk
