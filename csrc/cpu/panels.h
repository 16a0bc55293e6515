// Strided rows of any floating type, packed for gemm_tiles.h: converted, scaled, in panels of constant width.
#pragma once

#include <utility>

#include "gemm_tiles.h"

namespace pk {
namespace {

// A matrix within a tensor: rows of channels, in elements of X.
template <class X>
struct Matrix {
  X* data;
  int64_t row_step, channel_step;

  X* row(int64_t index) const { return data + index * row_step; }
};

// (rows, channels) of one batch entry and head of a (batch, heads, rows, channels) tensor.
template <class X>
inline Matrix<X> matrix_of(const TensorView& view, int64_t batch_index, int64_t head) {
  return {view.as<X>() + batch_index * view.stride(0) + head * view.stride(1), view.stride(2), view.stride(3)};
}

template <class Target, class Source>
inline Target convert_lanes(Source source) {
  return __builtin_convertvector(source, Target);
}

inline Vec<float> widen(const BFloat16* source) {
  typedef uint16_t Half __attribute__((vector_size(PK_VECTOR_BYTES / 2), may_alias, aligned(2)));
  typedef uint32_t Word __attribute__((vector_size(PK_VECTOR_BYTES)));
  const Half bits = *reinterpret_cast<const Half*>(source);
  return (Vec<float>)(convert_lanes<Word>(bits) << 16);
}

// A half's exponent and mantissa, moved to their places in a float, are the value times 2^-112, subnormals included.
inline Vec<float> widen(const Float16* source) {
  typedef uint16_t Half __attribute__((vector_size(PK_VECTOR_BYTES / 2), may_alias, aligned(2)));
  typedef uint32_t Word __attribute__((vector_size(PK_VECTOR_BYTES)));
  const Word bits = convert_lanes<Word>(*reinterpret_cast<const Half*>(source));
  const Word magnitude = bits & 0x7fff;
  const Word value = (Word)((Vec<float>)(magnitude << 13) * 5.192296858534828e33f);
  const Word not_finite = (Word)(magnitude >= 0x7c00) & 0x7f800000;
  return (Vec<float>)(value | not_finite | ((bits & 0x8000) << 16));
}

// `count` channels from the given one on, zeros after them.
template <class T, class X>
inline Vec<T> load_channels(const X* source, int64_t channel_step, int64_t count) {
  if (channel_step == 1 && count >= Simd<T>::lanes) {
    if constexpr (sizeof(X) == 2) {
      return widen(source);
    } else {
      return load_unaligned(source);
    }
  }
  T values[Simd<T>::lanes] = {};
  for (int lane = 0; lane < Simd<T>::lanes && lane < count; ++lane) {
    values[lane] = convert<T>(source[lane * channel_step]);
  }
  return load_unaligned(values);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PK_SHUFFLE_VECTOR
#endif
#endif

template <class T, int... Lane>
inline Vec<T> shuffle(Vec<T> first, Vec<T> second) {
#if defined(PK_SHUFFLE_VECTOR)
  return __builtin_shufflevector(first, second, Lane...);
#else
  return __builtin_shuffle(first, second, typename Simd<T>::Int{Lane...});
#endif
}

// Exchanges the off-diagonal Step x Step squares of rows i and i + Step, all lanes at once.
template <class T, int Step, int... Lane>
inline void exchange(Vec<T>* rows, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = Simd<T>::lanes;
  PK_UNROLL_TILE
  for (int i = 0; i < lanes; ++i) {
    if (i & Step) continue;
    const Vec<T> upper = rows[i], lower = rows[i | Step];
    rows[i] = shuffle<T, (Lane & Step ? lanes + Lane - Step : Lane)...>(upper, lower);
    rows[i | Step] = shuffle<T, (Lane & Step ? lanes + Lane : Lane + Step)...>(upper, lower);
  }
}

template <class T>
inline void transpose(Vec<T>* rows) {
  constexpr auto lane = std::make_integer_sequence<int, Simd<T>::lanes>{};
  exchange<T, 1>(rows, lane);
  if constexpr (Simd<T>::lanes > 2) exchange<T, 2>(rows, lane);
  if constexpr (Simd<T>::lanes > 4) exchange<T, 4>(rows, lane);
  if constexpr (Simd<T>::lanes > 8) exchange<T, 8>(rows, lane);
}

// Rows of a packed projection are far apart, too far for the processor to foresee: asks for the one at `row` ahead of
// use. Always inlined: to gcc, a function that only prefetches has no effect, and calls of it are dropped.
template <class X>
__attribute__((always_inline)) inline void prefetch_row(const Matrix<X>& source, int64_t row, int64_t rows,
                                                        int64_t channels) {
  if (row >= rows || source.channel_step != 1) return;
  const char* first = reinterpret_cast<const char*>(source.row(row));
  for (int64_t byte = 0; byte < channels * static_cast<int64_t>(sizeof(X)); byte += 64)
    __builtin_prefetch(first + byte, 0, 2);
}
constexpr int kRowsAhead = 32;

// One lanes x lanes square of pack_transposed; the first `rows` rows and `channels` channels of it are there.
template <class T, class X>
inline void pack_square(X* source, const Matrix<X>& matrix, int64_t rows, int64_t channels, T factor, int64_t width,
                        T* target) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> square[lanes];
  if (rows >= lanes && channels >= lanes && matrix.channel_step == 1) {
    PK_UNROLL_TILE
    for (int k = 0; k < lanes; ++k) square[k] = load_channels<T>(source + k * matrix.row_step, 1, lanes) * factor;
  } else {
    for (int k = 0; k < lanes; ++k) {
      square[k] = Vec<T>{};
      if (k < rows) {
        square[k] = load_channels<T>(source + k * matrix.row_step, matrix.channel_step, channels) * factor;
      }
    }
  }
  transpose<T>(square);
  if (channels >= lanes) {
    PK_UNROLL_TILE
    for (int k = 0; k < lanes; ++k) store<T>(target + k * width, square[k]);
  } else {
    for (int k = 0; k < channels; ++k) store<T>(target + k * width, square[k]);
  }
}

// target[c * width + i] = factor * source[i][c] for i < rows; zeros for rows <= i < filled, a multiple of the lanes.
template <class T, class X>
void pack_transposed(const Matrix<X>& source, int64_t rows, int64_t channels, T factor, int64_t filled, int64_t width,
                     T* target) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < filled; i += lanes) {
    for (int k = 0; k < lanes; ++k) prefetch_row(source, i + kRowsAhead + k, rows, channels);
    for (int64_t c = 0; c < channels; c += lanes) {
      X* first = source.row(i) + c * source.channel_step;
      pack_square(first, source, rows - i, channels - c, factor, width, target + c * width + i);
    }
  }
}

// Panel after panel, panel_step elements apart: target[i * width + c] = source[i][c], zeros beyond the last channel.
template <class T, class X>
void pack_panels(const Matrix<X>& source, int64_t rows, int64_t channels, int64_t width, int64_t panel_step,
                 T* target) {
  for (int64_t i = 0; i < rows; ++i) {
    prefetch_row(source, i + kRowsAhead, rows, channels);
    for (int64_t c = 0; c < channels; c += width) {
      T* panel = target + (c / width) * panel_step + i * width;
      for (int64_t k = 0; k < width; k += Simd<T>::lanes) {
        const int64_t count = channels - c - k;
        const X* first = source.row(i) + (c + k) * source.channel_step;
        store<T>(panel + k, count > 0 ? load_channels<T>(first, source.channel_step, count) : Vec<T>{});
      }
    }
  }
}

template <class T, class X>
inline void write_row(const T* source, T factor, int64_t channels, X* target) {
  for (int64_t c = 0; c < channels; ++c) target[c] = convert_back<X>(source[c] * factor);
}

}  // namespace
}  // namespace pk
