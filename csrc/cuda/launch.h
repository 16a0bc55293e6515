// How the ops of csrc/cuda start their kernels; nothing here exits, prints or waits.
#pragma once

#include <cuda_runtime.h>

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

// blocks x threads of a kernel, each block with so many bytes of shared memory. No blocks, no launch.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Stream stream,
              const Arguments&... arguments) {
  if (blocks == 0) return {};
  if (shared > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
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
