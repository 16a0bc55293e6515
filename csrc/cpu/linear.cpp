// What follows a matrix product in linear and feed_forward, in one pass: bias, activation and residual; backward too.
#include <cstring>
#include <type_traits>

#include "../ops.h"
#include "aligned_buffer.h"
#include "gelu.h"
#include "parallel.h"
#include "simd.h"

namespace pk {
namespace {

constexpr int64_t kChunk = 512;  // elements converted at a time where a tensor is not of the type of the computation

// Elements of a row in the type of the computation: where they stand if they have it, else converted into the buffer.
template <class T>
const T* read(const TensorView& view, int64_t row, int64_t column, int64_t count, T* buffer) {
  const int64_t offset = row * view.stride(0) + column;
  if (element_size(view.dtype) == sizeof(T)) return view.as<const T>() + offset;
  with_floating_type(view.dtype, [&](auto type) {
    const auto* source = view.as<const decltype(type)>() + offset;
    for (int64_t j = 0; j < count; ++j) buffer[j] = convert<T>(source[j]);
  });
  return buffer;
}

// Where results are to be computed: in place, or in the buffer, from which `finish` converts them.
template <class T>
T* place(const TensorView& view, int64_t row, int64_t column, T* buffer) {
  return element_size(view.dtype) == sizeof(T) ? view.as<T>() + row * view.stride(0) + column : buffer;
}

template <class T>
void finish(const TensorView& view, int64_t row, int64_t column, int64_t count, const T* buffer) {
  if (element_size(view.dtype) == sizeof(T)) return;
  with_floating_type(view.dtype, [&](auto type) {
    auto* target = view.as<decltype(type)>() + row * view.stride(0) + column;
    for (int64_t j = 0; j < count; ++j) target[j] = convert_back<decltype(type)>(buffer[j]);
  });
}

// How a loop reaches its operands, at any alignment: whole vectors, and the rest of a row.
template <class T>
struct Whole {
  Vec<T> load(const T* source) const {
    Vec<T> value;
    std::memcpy(&value, source, sizeof(value));
    return value;
  }
  void store(T* target, Vec<T> value) const { std::memcpy(target, &value, sizeof(value)); }
};
template <class T>
struct Rest {
  int64_t count;
  Vec<T> load(const T* source) const {
    Vec<T> value{};
    std::memcpy(&value, source, static_cast<size_t>(count) * sizeof(T));
    return value;
  }
  void store(T* target, Vec<T> value) const { std::memcpy(target, &value, static_cast<size_t>(count) * sizeof(T)); }
};
template <class T, class Body>
inline void for_vectors(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + Simd<T>::lanes <= count; j += Simd<T>::lanes) body(j, Whole<T>{});
  if (j < count) body(j, Rest<T>{count - j});
}

// The product's two halves, or the product alone, of one stretch of a row; absent operands are null.
template <class T>
struct Operands {
  const T *value, *gate, *value_bias, *gate_bias;
};

template <class T, class Access>
inline Vec<T> biased(const Access& access, const T* source, const T* bias, int64_t j) {
  const Vec<T> value = access.load(source + j);
  return bias ? value + access.load(bias + j) : value;
}

template <class T, Activation A, bool gated>
void forward(const Operands<T>& in, const T* residual, T* out, int64_t count) {
  for_vectors<T>(count, [&](int64_t j, auto access) {
    Vec<T> value = biased(access, in.value, in.value_bias, j);
    if constexpr (gated) {
      value *= activation<T, A>(biased(access, in.gate, in.gate_bias, j));
    } else {
      value = activation<T, A>(value);
    }
    access.store(out + j, residual ? value + access.load(residual + j) : value);
  });
}

template <class T, class Access>
inline void put(const Access& access, Vec<T> gradient, T* target, T* sum, int64_t j) {
  access.store(target + j, gradient);
  if (sum) access.store(sum + j, access.load(sum + j) + gradient);
}

// d_value, d_gate: gradients of the product; value_sum, gate_sum: their sums over rows so far, or null.
template <class T, Activation A, bool gated>
void backward(const Operands<T>& in, const T* d_out, T* d_value, T* d_gate, T* value_sum, T* gate_sum, int64_t count) {
  for_vectors<T>(count, [&](int64_t j, auto access) {
    const Vec<T> upstream = access.load(d_out + j), value = biased(access, in.value, in.value_bias, j);
    if constexpr (gated) {
      const Activated<T> gate = activation_and_slope<T, A>(biased(access, in.gate, in.gate_bias, j));
      put<T>(access, upstream * gate.value, d_value, value_sum, j);
      put<T>(access, upstream * value * gate.slope, d_gate, gate_sum, j);
    } else {
      put<T>(access, upstream * activation_and_slope<T, A>(value).slope, d_value, value_sum, j);
    }
  });
}

template <class F>
void with_activation(const LinearEpilogue& epilogue, const F& f) {
  using A = Activation;
  const bool exact = epilogue.activation == A::gelu;
  if (epilogue.activation == A::none) return f(std::integral_constant<A, A::none>{}, std::false_type{});
  if (exact && epilogue.gated) return f(std::integral_constant<A, A::gelu>{}, std::true_type{});
  if (exact) return f(std::integral_constant<A, A::gelu>{}, std::false_type{});
  if (epilogue.gated) return f(std::integral_constant<A, A::gelu_tanh>{}, std::true_type{});
  f(std::integral_constant<A, A::gelu_tanh>{}, std::false_type{});
}

template <class T>
struct Pass {
  const LinearEpilogue& epilogue;
  const TensorView& product;
  int64_t rows, width, half;  // width of the result; half: first column of the gates, or 0

  Pass(const LinearEpilogue& what, const TensorView& view)
      : epilogue(what), product(view), rows(view.size(0)), width(view.size(1) / (what.gated ? 2 : 1)) {
    half = what.gated ? width : 0;
  }

  Operands<T> operands(int64_t row, int64_t column, int64_t count, T* value_buffer, T* gate_buffer) const {
    const T* bias = epilogue.bias.as<const T>();
    return {read<T>(product, row, column, count, value_buffer),
            half ? read<T>(product, row, half + column, count, gate_buffer) : nullptr, bias ? bias + column : nullptr,
            bias ? bias + half + column : nullptr};
  }

  void forward_rows(int64_t first, int64_t last, const TensorView& residual, const TensorView& out) const {
    alignas(64) T buffers[4][kChunk];
    with_activation(epilogue, [&](auto kind, auto gated) {
      for (int64_t row = first; row < last; ++row) {
        for (int64_t column = 0; column < width; column += kChunk) {
          const int64_t count = width - column < kChunk ? width - column : kChunk;
          const Operands<T> in = operands(row, column, count, buffers[0], buffers[1]);
          const T* add = residual.defined() ? read<T>(residual, row, column, count, buffers[2]) : nullptr;
          T* result = place<T>(out, row, column, buffers[3]);
          forward<T, decltype(kind)::value, decltype(gated)::value>(in, add, result, count);
          finish<T>(out, row, column, count, result);
        }
      }
    });
  }

  // sums: of the gradient over these rows, as wide as the product, or null.
  void backward_rows(int64_t first, int64_t last, const TensorView& d_out, const TensorView& d_product, T* sums) const {
    alignas(64) T buffers[5][kChunk];
    with_activation(epilogue, [&](auto kind, auto gated) {
      for (int64_t row = first; row < last; ++row) {
        for (int64_t column = 0; column < width; column += kChunk) {
          const int64_t count = width - column < kChunk ? width - column : kChunk;
          const Operands<T> in = operands(row, column, count, buffers[0], buffers[1]);
          const T* upstream = read<T>(d_out, row, column, count, buffers[2]);
          T* d_value = place<T>(d_product, row, column, buffers[3]);
          T* d_gate = half ? place<T>(d_product, row, half + column, buffers[4]) : nullptr;
          backward<T, decltype(kind)::value, decltype(gated)::value>(in, upstream, d_value, d_gate,
                                                                     sums ? sums + column : nullptr,
                                                                     sums ? sums + half + column : nullptr, count);
          finish<T>(d_product, row, column, count, d_value);
          if (half) finish<T>(d_product, row, half + column, count, d_gate);
        }
      }
    });
  }
};

inline int64_t ceil_divide(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T>
void run_forward(const Pass<T>& pass, const TensorView& residual, const TensorView& out) {
  const int64_t wanted = (int64_t{1} << 14) / (pass.product.size(1) + 1);
  const int64_t rows_per_task = wanted < 1 ? 1 : wanted;
  parallel_for(ceil_divide(pass.rows, rows_per_task), [&](int64_t task) {
    const int64_t first = task * rows_per_task, rest = pass.rows - first;
    pass.forward_rows(first, first + (rest < rows_per_task ? rest : rows_per_task), residual, out);
  });
}

// Rows are cut into blocks that depend on their number alone, each with its own column sums: the same result on any
// number of threads.
template <class T>
void run_backward(const Pass<T>& pass, const TensorView& d_out, const TensorView& d_product, const TensorView& d_bias) {
  const int64_t columns = pass.product.size(1);
  const int64_t even = ceil_divide(pass.rows, 64), rows_per_block = even < 8 ? 8 : even;
  const int64_t blocks = ceil_divide(pass.rows, rows_per_block);
  const AlignedBuffer<T> sums(d_bias.defined() ? blocks * columns : 0);
  parallel_for(blocks, [&](int64_t block) {
    const int64_t first = block * rows_per_block, rest = pass.rows - first;
    T* own = d_bias.defined() ? sums.get() + block * columns : nullptr;
    if (own) std::memset(own, 0, static_cast<size_t>(columns) * sizeof(T));
    pass.backward_rows(first, first + (rest < rows_per_block ? rest : rows_per_block), d_out, d_product, own);
  });
  if (!d_bias.defined()) return;
  T* total = d_bias.as<T>();
  for (int64_t column = 0; column < columns; ++column) total[column] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const T* own = sums.get() + block * columns;
    for (int64_t column = 0; column < columns; ++column) total[column] += own[column];
  }
}

}  // namespace

namespace PK_LEVEL {

void linear_epilogue_fwd(const LinearEpilogue& epilogue, const TensorView& product, const TensorView& residual,
                         const TensorView& out) {
  if (product.dtype == DType::float64) {
    run_forward(Pass<double>(epilogue, product), residual, out);
  } else {
    run_forward(Pass<float>(epilogue, product), residual, out);
  }
}

void linear_epilogue_bwd(const LinearEpilogue& epilogue, const TensorView& product, const TensorView& d_out,
                         const TensorView& d_product, const TensorView& d_bias) {
  if (product.dtype == DType::float64) {
    run_backward(Pass<double>(epilogue, product), d_out, d_product, d_bias);
  } else {
    run_backward(Pass<float>(epilogue, product), d_out, d_product, d_bias);
  }
}

}  // namespace PK_LEVEL
}  // namespace pk
