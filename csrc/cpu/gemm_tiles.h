// Matrix products of blocks that lie in cache: the register tile of the level, and the loops that put tiles together.
// The left operand is read element by element (broadcast), the right one from panels as wide as a tile (panels.h).
#pragma once

#include "simd.h"

namespace pk {
namespace {

#define PK_UNROLL_TILE _Pragma("GCC unroll 16")

// Two vectors wide, and as high as registers for the sums allow: 16 registers on SSE and AVX2, 32 on AVX-512. What a
// multiple of this height leaves over is done in tiles of 4, whose 8 sums still fill two multiply-add pipelines.
constexpr int kTileVectors = 2;
constexpr int kTileRows = PK_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kLowTileRows = 4;
template <class T>
constexpr int tile_width = kTileVectors * Simd<T>::lanes;

template <class T, int Rows>
struct TileSums {
  Vec<T> at[Rows][kTileVectors];
};

inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// sums[i] = sum over k < depth of left[i * RowStep + k * DepthStep] * right[k * tile_width .. + tile_width]
template <class T, int Rows, int RowStep, int DepthStep>
__attribute__((always_inline)) inline TileSums<T, Rows> multiply_tile(const T* left, const T* right, int64_t depth) {
  TileSums<T, Rows> sums;
  PK_UNROLL_TILE
  for (int i = 0; i < Rows; ++i) sums.at[i][0] = sums.at[i][1] = Vec<T>{};
  // Unrolled, lest leaving a loop of the same few rounds be mispredicted time and again.
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> first = load(right), second = load(right + Simd<T>::lanes);
    PK_UNROLL_TILE
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> factor = broadcast(left[i * RowStep]);
      sums.at[i][0] += factor * first;
      sums.at[i][1] += factor * second;
    }
    left += DepthStep;
    right += tile_width<T>;
  }
  return sums;
}

// The product of a block, tile by tile: finish(i, c, sums) gets the tile of rows i.. and columns c... Rows are rounded
// up to a multiple of 4: the left operand and what finish writes to must bear that, with whatever it contains. Panels
// of the right operand are panel_step elements apart.
template <class T, int RowStep, int DepthStep, class Finish>
__attribute__((always_inline)) inline void multiply_block(const T* left, int64_t rows, const T* right,
                                                          int64_t panel_step, int64_t depth, int64_t columns,
                                                          const Finish& finish) {
  const int64_t even_rows = rounded_up(rows, kLowTileRows);
  int64_t high_rows = even_rows;
  while (high_rows % kTileRows != 0) high_rows -= kLowTileRows;
  for (int64_t c = 0; c < columns; c += tile_width<T>, right += panel_step) {
    for (int64_t i = 0; i < high_rows; i += kTileRows) {
      finish(i, c, multiply_tile<T, kTileRows, RowStep, DepthStep>(left + i * RowStep, right, depth));
    }
    for (int64_t i = high_rows; i < even_rows; i += kLowTileRows) {
      finish(i, c, multiply_tile<T, kLowTileRows, RowStep, DepthStep>(left + i * RowStep, right, depth));
    }
  }
}

// finish for multiply_block: adds the product to rows of row_step elements.
template <class T>
struct AddTo {
  T* target;
  int64_t row_step;

  template <int Rows>
  __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
    PK_UNROLL_TILE
    for (int r = 0; r < Rows; ++r) {
      T* row = target + (i + r) * row_step + c;
      store<T>(row, load(row) + sums.at[r][0]);
      store<T>(row + Simd<T>::lanes, load(row + Simd<T>::lanes) + sums.at[r][1]);
    }
  }
};

}  // namespace
}  // namespace pk
