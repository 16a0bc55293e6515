// How the ops of csrc/cuda start their kernels; nothing here exits, prints or waits.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "../ops.h"

namespace pk {
namespace cuda {
namespace {

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error has been reported: the next call starts afresh
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes

// Bytes that a block of the current GPU may have.
inline size_t most_shared() {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(most);
}

// blocks x threads of a kernel, each block with so many bytes of shared memory. No blocks, no launch.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Stream stream,
              const Arguments&... arguments) {
  if (blocks == 0) return {};
  if (blocks > std::numeric_limits<int>::max()) return {cudaErrorInvalidValue, "more blocks than a launch may have"};
  if (shared > kSharedWithoutAsking) {
    const size_t most = most_shared();
    if (shared > most) return {cudaErrorInvalidValue, "more shared memory than a block of this GPU may have"};
    // All that there is, lest calls of other sizes at the same time take it back.
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = shared;
  configuration.stream = static_cast<cudaStream_t>(stream);
  return status_of(cudaLaunchKernelEx(&configuration, kernel, static_cast<Parameters>(arguments)...));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace cuda
}  // namespace pk
