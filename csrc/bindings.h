// How tensors and options arrive from Python in both modules; see backends/native.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "ops.h"

namespace pk {
namespace {

namespace py = pybind11;

// (address, dtype code, sizes, strides) or None.
inline TensorView view(const py::handle& described) {
  TensorView result;
  if (described.is_none()) return result;
  const auto fields = py::cast<py::tuple>(described);
  const auto sizes = py::cast<py::tuple>(fields[2]), strides = py::cast<py::tuple>(fields[3]);
  if (sizes.size() > kMaxDims) throw std::invalid_argument("a tensor has more dimensions than native ops take");
  result.data = reinterpret_cast<void*>(py::cast<uintptr_t>(fields[0]));
  result.dtype = static_cast<DType>(py::cast<int>(fields[1]));
  result.dims = static_cast<int>(sizes.size());
  for (int i = 0; i < result.dims; ++i) {
    result.sizes[i] = py::cast<int64_t>(sizes[static_cast<size_t>(i)]);
    result.strides[i] = py::cast<int64_t>(strides[static_cast<size_t>(i)]);
  }
  return result;
}

inline TensorList views(const py::handle& described) {
  TensorList result;
  for (const auto& item : py::cast<py::sequence>(described)) result.push_back(view(item));
  return result;
}

// (p, seed, offset).
inline Dropout dropout_of(const py::tuple& dropout) {
  return {py::cast<double>(dropout[0]), py::cast<uint64_t>(dropout[1]), py::cast<uint32_t>(dropout[2])};
}

inline SeparableInputs separable_inputs(const py::tuple& inputs, const py::tuple& dropout) {
  return {view(inputs[0]), views(inputs[1]), view(inputs[2]), view(inputs[3]), view(inputs[4]), dropout_of(dropout)};
}

inline SeparableOutputs separable_outputs(const py::tuple& outputs) {
  return {view(outputs[0]), views(outputs[1]), view(outputs[2]), view(outputs[3])};
}

inline SeparableGradients separable_gradients(const py::tuple& gradients) {
  return {view(gradients[0]), views(gradients[1]), view(gradients[2]), view(gradients[3])};
}

inline LatentInputs latent_inputs(const py::tuple& inputs, double scale, const py::tuple& dropout) {
  return {view(inputs[0]), view(inputs[1]), view(inputs[2]), scale, dropout_of(dropout)};
}

// (form, v, bias, x, r).
inline SeparableQueryInputs separable_query_inputs(const py::tuple& inputs, const std::vector<int64_t>& grid,
                                                   const py::tuple& dropout) {
  return {view(inputs[0]),    view(inputs[1]), view(inputs[2]), view(inputs[3]), view(inputs[4]), grid,
          dropout_of(dropout)};
}

}  // namespace
}  // namespace pk
