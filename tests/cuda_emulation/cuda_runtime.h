// In place of CUDA's header of this name, for a host compiler: the language and the part of the runtime's interface
// that csrc/cuda uses. Kernels compile as they stand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH__ EMULATED_ARCH
#if EMULATED_ARCH == 900
#define __CUDA_ARCH_FEAT_SM90_ALL
#endif

constexpr int warpSize = 32;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __int_as_float(int bits) {
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline int __float_as_int(float x) {
  int result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// --- threads that wait for each other ---

inline void __syncthreads() {
  auto& s = emulation::state();
  emulation::meet(emulation::kBlockMeeting, 0, s.block.threads, s.now->index, 0);
}
inline int __syncthreads_or(int predicate) {
  auto& s = emulation::state();
  const auto all = emulation::meet(emulation::kBlockMeeting, 1, s.block.threads, s.now->index, predicate);
  return std::any_of(all.begin(), all.end(), [](int one) { return one != 0; });
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { emulation::meet_lanes(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int base = emulation::lane() / width * width;
  return emulation::meet_lanes(mask, value)[static_cast<size_t>(base + lane % width)];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int self = emulation::lane(), other = self ^ lanes;
  const auto all = emulation::meet_lanes(mask, value);
  return all[static_cast<size_t>(other / width == self / width ? other : self)];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int self = emulation::lane(), other = self + static_cast<int>(lanes);
  const auto all = emulation::meet_lanes(mask, value);
  return all[static_cast<size_t>(other / width == self / width ? other : self)];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int self = emulation::lane(), other = self - static_cast<int>(lanes);
  const auto all = emulation::meet_lanes(mask, value);
  return all[static_cast<size_t>(other >= self / width * width ? other : self)];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = emulation::meet_lanes(mask, static_cast<int>(predicate != 0));
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= static_cast<unsigned>(all[i] && (mask >> i & 1)) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// --- the runtime's interface ---

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulation {
constexpr size_t kMostShared = (EMULATED_ARCH == 800 ? 163 : EMULATED_ARCH < 900 ? 99 : 227) << 10;
constexpr size_t kMostThreads = 1024;

inline std::string& last_error() {
  static std::string the_error;
  return the_error;
}
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::last_error().c_str(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) <= emulation::kMostShared) return cudaSuccess;
  emulation::last_error() = "more shared memory than a block may have";
  return cudaErrorInvalidValue;
}
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = EMULATED_ARCH / 100;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = EMULATED_ARCH / 10 % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulation::kMostShared);
      break;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = configuration->blockDim.x;
  if (threads == 0 || threads > emulation::kMostThreads || configuration->gridDim.x == 0) {
    emulation::last_error() = "a launch of no blocks, no threads or too many";
    return cudaErrorInvalidValue;
  }
  try {
    emulation::state().launched.insert(reinterpret_cast<const void*>(kernel));
    const std::tuple<Parameters...> kept(arguments...);
    emulation::run(configuration->gridDim.x, threads, configuration->dynamicSmemBytes,
                   [&] { std::apply(kernel, kept); });
  } catch (const std::exception& error) {
    emulation::last_error() = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
