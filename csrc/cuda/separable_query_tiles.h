// Tiles of a softmax attention in a warp's registers and a block's shared memory: how they come there, and their
// products.
//
// A warp has rows 8 j + group of its tile (j from 0 to 2 tiles - 1, group = lane / 4), and a lane of the 16 numbers
// that a product contracts over four that follow each other, 4 quarter to 4 quarter + 3 (quarter = lane % 4): one load
// of a table, one call of Philox. The tensor cores count them otherwise, so streamed rows stand in their order in
// memory.
#pragma once

#include "elements.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kStep = 16;    // what a product contracts over at once
constexpr int kStream = 32;  // rows of a streamed tile
constexpr int kChunk = 64;   // channels of a streamed tile where a product contracts over them
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Rows of 16-byte vectors, one more than their width, lie in other banks each.
template <class T>
constexpr int pitch_of(int width) {
  return width + 16 / static_cast<int>(sizeof(T));
}

// Which of the rows that follow each other stands at a place of a streamed tile, and where row i stands.
__device__ __forceinline__ int row_at(int place) { return (place & 17) | (place & 6) << 1 | (place & 8) >> 2; }
__device__ __forceinline__ int place_of(int row) { return (row & 17) | (row & 2) << 2 | (row & 12) >> 1; }

// A number for the tile, copied on the side, or zero.
template <class T>
__device__ __forceinline__ void stage_number(T* to, const T* from, bool exists) {
  if (!exists) {
    *to = T{};
  } else if constexpr (sizeof(T) == 4) {
    async_copy_word(to, from);
  } else {
    *to = *from;
  }
}

// Fills rows of a tile from source(row), an address or nullptr for zeros; so are the words from `valid` on. Whole
// vectors are copied where addresses allow it. A thread keeps to one vector of all its rows.
template <int width, class T, class Source>
__device__ __forceinline__ void stage(T* tile, int pitch, int rows, int valid, bool aligned, const Source& source) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T)), per_row = width / vector;
  static_assert(32 % per_row == 0, "a block's threads are whole rows");
  const int first = static_cast<int>(threadIdx.x % per_row) * vector;
  const bool whole = aligned && first + vector <= valid;
  for (int row = static_cast<int>(threadIdx.x / per_row); row < rows; row += static_cast<int>(blockDim.x / per_row)) {
    const T* from = source(row);
    T* to = tile + row * pitch + first;
    if (whole && from != nullptr) {
      async_copy(to, from + first);
    } else {
      for (int i = 0; i < vector; ++i) stage_number(to + i, from + first + i, from != nullptr && first + i < valid);
    }
  }
}

// compute(i) for all steps while the next one's tiles, stage(i + 1), are on their way.
template <class Stage, class Compute>
__device__ __forceinline__ void pipeline(int steps, const Stage& stage_step, const Compute& compute) {
  if (steps > 0) stage_step(0);
  async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) stage_step(step + 1);
    async_commit();
    async_wait<1>();
    __syncthreads();
    compute(step);
    __syncthreads();
  }
  async_wait<0>();
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) { return pack_bfloat16(low, high); }
__device__ __forceinline__ uint32_t pack(float low, float high, Float16) { return pack_half(low, high); }
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  mma_bfloat16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  mma_half(d, a, b);
}

// sum over a streamed dimension of p[row] times rows of values, in the tensor cores: p is rounded to the values' dtype.
template <class T, int tiles, int channels>
struct WeightedSum {
  static constexpr int kRows = 2 * tiles, kScratch = 0;  // rows of a lane; floats per warp in shared memory
  float sums[tiles][channels / 8][4] = {};

  // values: kStep rows of a streamed tile.
  __device__ __forceinline__ void add(const float (&p)[kRows][4], const T* values, float*) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t a[tiles][4];
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[t][i] = pack(p[2 * t + i % 2][i / 2 * 2], p[2 * t + i % 2][i / 2 * 2 + 1], T{});
    }
    const T* rows = values + lane % 16 * pitch_of<T>(channels) + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < channels / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, rows + 16 * n);
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        multiply(sums[t][2 * n], a[t], left, T{});
        multiply(sums[t][2 * n + 1], a[t], right, T{});
      }
    }
  }

  __device__ __forceinline__ void scale(int row, float by) {
#pragma unroll
    for (int n = 0; n < channels / 8; ++n) {
      sums[row / 2][n][row % 2 * 2] *= by;
      sums[row / 2][n][row % 2 * 2 + 1] *= by;
    }
  }

  // store(channel, sum, sum of the next channel) for all of this lane's channels of a row.
  template <class Store>
  __device__ __forceinline__ void read(int row, const Store& store) const {
    const int quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int n = 0; n < channels / 8; ++n)
      store(8 * n + 2 * quarter, sums[row / 2][n][row % 2 * 2], sums[row / 2][n][row % 2 * 2 + 1]);
  }
};

// The same in float32: lanes of a quad exchange their weights through shared memory, and share the channels.
template <int tiles, int channels>
struct WeightedSum<float, tiles, channels> {
  static constexpr int kRows = 2 * tiles, kScratch = kStep * 8 * kRows;
  float sums[kRows][channels / 16][4] = {};

  __device__ __forceinline__ void add(const float (&p)[kRows][4], const float* values, float* scratch) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, quarter = lane % 4;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = scratch + (place_of(4 * quarter + i) * 8 + group) * kRows;
#pragma unroll
      for (int j = 0; j < kRows; ++j) to[j] = p[j][i];
    }
    __syncwarp();
#pragma unroll 4
    for (int at = 0; at < kStep; ++at) {
      const float* weights = scratch + (at * 8 + group) * kRows;
#pragma unroll
      for (int n = 0; n < channels / 16; ++n) {
        const float4 value =
            *reinterpret_cast<const float4*>(values + at * pitch_of<float>(channels) + 16 * n + 4 * quarter);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          sums[j][n][0] += weights[j] * value.x;
          sums[j][n][1] += weights[j] * value.y;
          sums[j][n][2] += weights[j] * value.z;
          sums[j][n][3] += weights[j] * value.w;
        }
      }
    }
  }

  __device__ __forceinline__ void scale(int row, float by) {
#pragma unroll
    for (int n = 0; n < channels / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[row][n][i] *= by;
    }
  }

  template <class Store>
  __device__ __forceinline__ void read(int row, const Store& store) const {
    const int quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int n = 0; n < channels / 16; ++n) {
      store(16 * n + 4 * quarter, sums[row][n][0], sums[row][n][1]);
      store(16 * n + 4 * quarter + 2, sums[row][n][2], sums[row][n][3]);
    }
  }
};

// Dot products of a warp's rows with the kStream rows of a streamed tile, a chunk of channels at a time.
template <class T, int tiles>
struct DotProducts {
  float sums[tiles][kStream / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : sums)
      for (auto& product : tile)
        for (float& sum : product) sum = 0.0f;
  }

  // rows: the warp's, at the chunk's channels.
  __device__ __forceinline__ void add(const T* rows, int pitch, const T* streamed) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* left = rows + lane % 16 * pitch + lane / 16 * 8;
    const T* right = streamed + (lane % 8 + lane / 16 * 8) * pitch_of<T>(kChunk) + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t a[tiles][4];
#pragma unroll
      for (int t = 0; t < tiles; ++t) load_matrices(a[t], left + 16 * t * pitch + 16 * k);
#pragma unroll
      for (int n = 0; n < kStream / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, right + 16 * n * pitch_of<T>(kChunk) + 16 * k);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
          multiply(sums[t][2 * n], a[t], first, T{});
          multiply(sums[t][2 * n + 1], a[t], second, T{});
        }
      }
    }
  }

  // With rows 16 step + 4 quarter to + 3 of the streamed ones.
  __device__ __forceinline__ void read(int step, float (&d)[2 * tiles][4]) const {
#pragma unroll
    for (int j = 0; j < 2 * tiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[j][i] = sums[j / 2][2 * step + i / 2][j % 2 * 2 + i % 2];
    }
  }
};

template <int tiles>
struct DotProducts<float, tiles> {
  float sums[2 * tiles][kStream / 4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : sums)
      for (float& sum : row) sum = 0.0f;
  }

  __device__ __forceinline__ void add(const float* rows, int pitch, const float* streamed) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, quarter = lane % 4;
#pragma unroll 1
    for (int channel = 0; channel < kChunk; channel += 4) {
      float4 left[2 * tiles];
#pragma unroll
      for (int j = 0; j < 2 * tiles; ++j)
        left[j] = *reinterpret_cast<const float4*>(rows + (8 * j + group) * pitch + channel);
#pragma unroll
      for (int n = 0; n < kStream / 4; ++n) {
        const float4 right = *reinterpret_cast<const float4*>(
            streamed + (n / 4 * kStep + place_of(4 * quarter + n % 4)) * pitch_of<float>(kChunk) + channel);
#pragma unroll
        for (int j = 0; j < 2 * tiles; ++j)
          sums[j][n] += left[j].x * right.x + left[j].y * right.y + left[j].z * right.z + left[j].w * right.w;
      }
    }
  }

  __device__ __forceinline__ void read(int step, float (&d)[2 * tiles][4]) const {
#pragma unroll
    for (int j = 0; j < 2 * tiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[j][i] = sums[j][4 * step + i];
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace pk
