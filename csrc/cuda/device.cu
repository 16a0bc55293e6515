// Whether a GPU runs this module's kernels, and what it has.
#include "launch.h"

namespace pk {
namespace cuda {
namespace {

__global__ void nothing() {}

}  // namespace

Status probe(int64_t& shared_memory) {
  shared_memory = static_cast<int64_t>(most_shared());
  cudaFuncAttributes attributes;
  return status_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(nothing)));
}

}  // namespace cuda
}  // namespace pk
