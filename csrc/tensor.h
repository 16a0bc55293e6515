// TensorView: the only form in which a tensor reaches native code. Torch-free, so that one binary serves every torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace pk {

enum class DType : int { float32, float64, bfloat16, float16, uint8, boolean };

// Bit patterns of the 16-bit formats; arithmetic on them happens after conversion to float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  bool defined() const { return dims > 0; }
  int64_t size(int dim) const { return sizes[dim < 0 ? dim + dims : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + dims : dim]; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

using TensorList = std::vector<TensorView>;

static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::float64:
      return 8;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace pk
