// What a thread that owns rows of the form does with tokens (docs/cuda.md): linear forms, sums of weighted tokens, the
// marginals of axes, and how a warp goes through the tile rows of a strip.
#pragma once

#include "separable_merge.h"

namespace pk {
namespace cuda {
namespace {

template <class T>
using PerRow = T[kRowsPerThread];
using Strip = float[kRowsPerThread][kColumns];

// A number that all lanes have, in a form that the compiler knows it of: then it takes no register of each.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFF, value, 0); }

// What a thread does: the rows `row` and row + 32 at some strips and outer positions.
struct Share {
  int batch, slot, group, part;              // of the block; slots are the pairs of a group and a part
  int first_strip, last_strip, first, last;  // of the warp: the group's strips, its own of the part's outer positions
  int lane, warp, row;

  __device__ explicit Share(const RowsTask& task) {
    const Grid& grid = task.grid;
    const Split& split = task.split;
    lane = static_cast<int>(threadIdx.x) % 32;
    warp = uniform(static_cast<int>(threadIdx.x) / 32);
    const int row_blocks = grid.row_blocks(), unit = uniform(static_cast<int>(blockIdx.x) / row_blocks);
    batch = uniform(unit / split.slots());
    slot = unit - batch * split.slots();
    group = uniform(slot / split.parts);
    part = slot - group * split.parts;
    first_strip = group * split.group_size;
    last_strip = min(first_strip + split.group_size, grid.strips);
    const int from = part * split.part_size, count = min(split.part_size, grid.outer - from);
    first = uniform(from + count * warp / split.warps);
    last = uniform(from + count * (warp + 1) / split.warps);
    row = (static_cast<int>(blockIdx.x) - unit * row_blocks) * kBlockRows + lane;
  }

  __device__ TileRange tiles(const RowsTask& task) const {
    const Grid& grid = task.grid;
    return {task.tiles + int64_t{batch} * grid.tile_rows() * grid.tile_floats(),
            grid.tile_floats(),
            grid.outer,
            task.split.chunk,
            first_strip,
            last_strip,
            first,
            last};
  }
  __device__ int64_t slot_of_all(const RowsTask& task) const { return int64_t{batch} * task.split.slots() + slot; }
  __device__ int64_t outer_slot(const RowsTask& task) const {
    if (task.grid.outer_axes > 1) return slot_of_all(task) * task.split.warps + warp;
    return int64_t{batch} * task.split.groups + group;
  }
};

// --- forms and their sums ---

// An array [entries, rows] at this thread's rows, the second `next` elements after the first. Rows that do not exist
// read as the last one that does, and leave sums in padded arrays that nobody reads.
template <class T>
struct RowArray {
  T* own;
  int64_t stride;
  int next;

  __device__ RowArray(T* array, int rows, int row)
      : own(array + min(row, rows - 1)), stride(rows), next(min(row + 32, rows - 1) - min(row, rows - 1)) {}
  __device__ T& at(int k, int64_t offset) const { return own[offset + (k ? next : 0)]; }
  __device__ T& operator()(int k, int64_t entry) const { return at(k, entry * stride); }
  // From this entry on.
  __device__ RowArray from(int64_t entry) const {
    RowArray result = *this;
    result.own += entry * stride;
    return result;
  }
};

// The same of an array [entries, padded rows].
template <class T>
struct PaddedArray {
  T* own;
  int64_t stride;

  __device__ PaddedArray(T* array, int padded_rows, int row) : own(array + row), stride(padded_rows) {}
  __device__ T& at(int k, int64_t offset) const { return own[offset + 32 * k]; }
  __device__ T& operator()(int k, int64_t entry) const { return at(k, entry * stride); }
};

// The block's states.
__device__ __forceinline__ PaddedArray<float> states_of(const RowsTask& task, const Share& share) {
  const int64_t entries = share.slot_of_all(task) * (task.grid.channels + 3);
  return {task.states + entries * task.grid.padded_rows, task.grid.padded_rows, share.row};
}

// A form's data channels times a factor, in registers where they are few; 0: many.
template <int C>
struct Channels {
  float value[kRowsPerThread][C];

  __device__ Channels(const RowArray<const float>& form, const PerRow<float>& factor, int) {
    for (int k = 0; k < kRowsPerThread; ++k)
      for (int c = 0; c < C; ++c) value[k][c] = form(k, c) * factor[k];
  }
  __device__ static constexpr int count() { return C; }
  __device__ float operator()(int k, int c) const { return value[k][c]; }
};

template <>
struct Channels<0> {
  RowArray<const float> form;
  PerRow<float> factor;
  int channels;

  __device__ Channels(const RowArray<const float>& form, const PerRow<float>& factor, int channels)
      : form(form), channels(channels) {
    for (int k = 0; k < kRowsPerThread; ++k) this->factor[k] = factor[k];
  }
  __device__ int count() const { return channels; }
  __device__ float operator()(int k, int c) const { return form(k, c) * factor[k]; }
};

// How many tokens' weights a thread has at a time.
template <int C>
constexpr int kTokens = C ? 4 : kColumns;

// A thread's sums of its rows in shared memory, each kBlockRows elements from the next: acc and, forward, those of the
// weights before and after dropout.
struct RowSums {
  float* own;

  __device__ RowSums(float* own, int count) : own(own) {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < kRowsPerThread; ++k) own[i * kBlockRows + 32 * k] = 0.0f;
  }
  __device__ void add(int k, int i, float value) const { own[i * kBlockRows + 32 * k] += value; }
};

// Weighted sums of the data channels. Few are in registers until a chunk of tile rows ends: short sums lose less to
// rounding. Many go to shared memory at once.
template <int C>
struct ChannelSums {
  float value[kRowsPerThread][C] = {};

  __device__ void add(int k, int c, const float (&weights)[kTokens<C>], const float (&x)[kTokens<C>], const RowSums&) {
#pragma unroll
    for (int t = 0; t < kTokens<C>; ++t) value[k][c] += weights[t] * x[t];
  }
  __device__ void end_chunk(const RowSums& sums) {
    for (int k = 0; k < kRowsPerThread; ++k)
      for (int c = 0; c < C; ++c) sums.add(k, c, value[k][c]);
  }
};

template <>
struct ChannelSums<0> {
  __device__ void add(int k, int c, const float (&weights)[kColumns], const float (&x)[kColumns], const RowSums& sums) {
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < kColumns; ++t) sum += weights[t] * x[t];
    sums.add(k, c, sum);
  }
  __device__ void end_chunk(const RowSums&) {}
};

// One quantity of some tokens side by side.
template <int count>
__device__ __forceinline__ void load_tokens(float (&values)[count], const float* quantity) {
#pragma unroll
  for (int t = 0; t < count; t += 4) {
    const float4 four = *reinterpret_cast<const float4*>(quantity + t);
    values[t] = four.x, values[t + 1] = four.y, values[t + 2] = four.z, values[t + 3] = four.w;
  }
}

// r (channels . x + table + outer) + constant, for tokens from `begin` on, whose table entries are from `first` on, and
// this thread's rows.
template <int C, int columns>
__device__ __forceinline__ void linear_form(float (&value)[kRowsPerThread][kTokens<C>], const float* tile, int begin,
                                            const Channels<C>& channels, const float (&table)[kRowsPerThread][columns],
                                            int first, const PerRow<float>& outer, const PerRow<float>& constant) {
  float r[kTokens<C>], x[kTokens<C>];
  load_tokens(r, tile + channels.count() * kColumns + begin);
  const auto of_position = [&](int k, int t) { return r[t] * outer[k] + (r[t] * table[k][first + t] + constant[k]); };
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
    for (int t = 0; t < kTokens<C>; ++t) value[k][t] = C ? of_position(k, t) : 0.0f;
  for (int c = 0; c < channels.count(); ++c) {
    load_tokens(x, tile + c * kColumns + begin);
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      const float channel = channels(k, c);
#pragma unroll
      for (int t = 0; t < kTokens<C>; ++t) value[k][t] += channel * x[t];
    }
  }
  if constexpr (C == 0) {  // a long sum of channels loses less to rounding apart from what may be large
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
      for (int t = 0; t < kTokens<C>; ++t) value[k][t] += of_position(k, t);
  }
}

// Adds the tokens' r x, r times weights to the sums of the form. (The products with r written out would be shared by
// the compiler, which takes three instructions instead of two.)
template <int C>
__device__ __forceinline__ void add_weighted(const float (&weights)[kRowsPerThread][kTokens<C>], const float* tile,
                                             int begin, int channels, ChannelSums<C>& acc, const RowSums& sums,
                                             Strip& marginal, PerRow<float>& outer) {
  float r[kTokens<C>], x[kTokens<C>];
  load_tokens(r, tile + channels * kColumns + begin);
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
    for (int t = 0; t < kTokens<C>; ++t) {
      marginal[k][begin + t] = __fmaf_rn(weights[k][t], r[t], marginal[k][begin + t]);
      outer[k] = __fmaf_rn(weights[k][t], r[t], outer[k]);
    }
  for (int c = 0; c < channels; ++c) {
    load_tokens(x, tile + c * kColumns + begin);
    for (int k = 0; k < kRowsPerThread; ++k) acc.add(k, c, weights[k], x, sums);
  }
}

// Some entries of the last axis's table times a factor; `beyond` past its end.
template <int columns>
__device__ __forceinline__ void load_columns(float (&table)[kRowsPerThread][columns], const RowArray<const float>& form,
                                             const Grid& grid, int first, const PerRow<float>& factor, float beyond) {
  RowArray<const float> entry = form.from(grid.channels + grid.outer_entries + first);
#pragma unroll
  for (int j = 0; j < columns; ++j, entry = entry.from(1))
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) table[k][j] = first + j < grid.columns ? entry(k, 0) * factor[k] : beyond;
}

// Where the entries of an outer position stand in the tables of the outer axes, as it moves on: as offsets in arrays of
// rows and of padded rows. `one`: there is at most one such axis.
template <bool one>
struct OuterEntries {
  const Grid& grid;
  OuterIndex index;

  __device__ OuterEntries(const Grid& grid, int position) : grid(grid), index(grid, position) {}
  __device__ void next() { index.next(grid); }

  // call(offset, padded offset) for each outer axis.
  template <class Call>
  __device__ __forceinline__ void each(const Call& call) const {
    const auto with = [&](int64_t entry) { call(entry * grid.rows, entry * grid.padded_rows); };
    if (grid.outer_axes > 0) with(index.at[0]);
    if (grid.outer_axes > 1) with(grid.sizes[0] + index.at[1]);
    if (grid.outer_axes > 2) with(grid.sizes[0] + grid.sizes[1] + index.at[2]);
  }
};

template <>
struct OuterEntries<true> {
  const Grid& grid;
  int64_t offset, padded_offset;

  __device__ OuterEntries(const Grid& grid, int position)
      : grid(grid), offset(int64_t{position} * grid.rows), padded_offset(int64_t{position} * grid.padded_rows) {}
  __device__ void next() { offset += grid.rows, padded_offset += grid.padded_rows; }

  template <class Call>
  __device__ __forceinline__ void each(const Call& call) const {
    if (grid.outer_axes > 0) call(offset, padded_offset);
  }
};

// The sum of outer tables [outer entries, rows] at a position's entries, times a factor.
template <class Entries>
__device__ __forceinline__ void outer_sum(PerRow<float>& sum, const RowArray<const float>& tables,
                                          const Entries& entries, const PerRow<float>& factor) {
  for (int k = 0; k < kRowsPerThread; ++k) sum[k] = 0.0f;
  entries.each([&](int64_t offset, int64_t) {
    for (int k = 0; k < kRowsPerThread; ++k) sum[k] += tables.at(k, offset);
  });
  for (int k = 0; k < kRowsPerThread; ++k) sum[k] *= factor[k];
}

template <class Entries>
__device__ __forceinline__ void add_outer(const PaddedArray<float>& sums, const Entries& entries,
                                          const PerRow<float>& value) {
  entries.each([&](int64_t, int64_t offset) {
    for (int k = 0; k < kRowsPerThread; ++k) sums.at(k, offset) += value[k];
  });
}

// A warp's own marginals of the outer axes start at zero: of one such axis the entries of its positions, else all.
__device__ inline void clear_outer(const PaddedArray<float>& sums, const Grid& grid, int first, int last) {
  if (grid.outer_axes == 0) return;
  const bool one = grid.outer_axes == 1;
#pragma unroll 1
  for (int entry = one ? first : 0; entry < (one ? last : grid.outer_entries); ++entry)
    for (int k = 0; k < kRowsPerThread; ++k) sums(k, entry) = 0.0f;
}

// --- a block's memory and what its warps do together ---

struct BlockMemory {
  float* exchange;  // [warps, kColumns, kBlockRows]
  float* sums;      // [warps, channels + 2, kBlockRows], RowSums
  float* stages;    // [warps, kStages, chunk, tile_floats]
  uint64_t* barriers;

  __device__ BlockMemory(const Grid& grid, const Split& split, float* begin)
      : exchange(begin),
        sums(exchange + split.warps * kColumns * kBlockRows),
        stages(sums + split.warps * (grid.channels + 2) * kBlockRows),
        barriers(reinterpret_cast<uint64_t*>(stages + split.warps * kStages * split.chunk * grid.tile_floats())) {}

  __device__ float* stages_of(const Grid& grid, const Split& split, int warp) const {
    return stages + warp * kStages * split.chunk * grid.tile_floats();
  }
  static size_t bytes(const Grid& grid, const Split& split) {
    const int floats = (kColumns + grid.channels + 2) * kBlockRows + kStages * split.chunk * grid.tile_floats();
    return static_cast<size_t>(split.warps) * (sizeof(float) * floats + sizeof(uint64_t) * kStages);
  }
};

// The largest of each of a row's values over the block's warps.
template <int count>
__device__ void largest_of_warps(float (&values)[count][kRowsPerThread], const Share& share, int warps,
                                 float* exchange) {
  __syncthreads();
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < kRowsPerThread; ++k)
      exchange[(share.warp * count + i) * kBlockRows + 32 * k + share.lane] = values[i][k];
  __syncthreads();
#pragma unroll 1
  for (int warp = 0; warp < warps; ++warp)
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < kRowsPerThread; ++k)
        values[i][k] = fmaxf(values[i][k], exchange[(warp * count + i) * kBlockRows + 32 * k + share.lane]);
}

// The sums over the block's warps of what they have put into shared memory [warps, stored, kBlockRows], the first
// `count` of these, to [count, padded rows].
__device__ inline void leave(const float* shared, int stored, int count, const Share& share, int warps,
                             const PaddedArray<float>& target) {
  __syncthreads();
#pragma unroll 1
  for (int i = share.warp; i < count; i += warps)
    for (int k = 0; k < kRowsPerThread; ++k) {
      float sum = 0.0f;
      for (int warp = 0; warp < warps; ++warp) sum += shared[(warp * stored + i) * kBlockRows + 32 * k + share.lane];
      target(k, i) = sum;
    }
  __syncthreads();
}

// A strip's marginal to column_sums.
__device__ __forceinline__ void leave_strip(const Strip& marginal, const RowsTask& task, const Share& share, int strip,
                                            float* exchange) {
  const Grid& grid = task.grid;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k)
      exchange[(share.warp * kColumns + j) * kBlockRows + 32 * k + share.lane] = marginal[k][j];
  const int64_t column = (int64_t{share.batch} * task.split.parts + share.part) * grid.columns + strip * kColumns;
  leave(exchange, kColumns, min(kColumns, grid.columns - strip * kColumns), share, task.split.warps,
        PaddedArray<float>(task.column_sums + column * grid.padded_rows, grid.padded_rows, share.row));
}

// --- what is rare: masked tokens, dropout ---

__device__ __forceinline__ uint32_t tokens_there(const float* tile, int channels) {
  return __float_as_uint(tile[(channels + 1) * kColumns]);
}

// Of a row's tokens in a tile row, from this one on, those that dropout keeps.
__device__ inline uint32_t tokens_kept(const DropoutRule& rule, uint32_t batch, uint32_t row, int64_t token) {
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i <= kColumns / 4; ++i) {
    const float4 keep = keep_scales(rule, batch, row, static_cast<uint32_t>((token >> 2) + i));
    const uint32_t four = (keep.x != 0.0f) | (keep.y != 0.0f) << 1 | (keep.z != 0.0f) << 2 | (keep.w != 0.0f) << 3;
    bits |= four << 4 * i;
  }
  return bits >> (token & 3);
}

__device__ inline void tokens_kept(PerRow<uint32_t>& kept, const RowsTask& task, const Share& share, int strip,
                                   int position) {
  const int64_t token = static_cast<int64_t>(position) * task.grid.columns + strip * kColumns;
  for (int k = 0; k < kRowsPerThread; ++k)
    kept[k] = task.drops ? tokens_kept(task.rule, static_cast<uint32_t>(share.batch),
                                       static_cast<uint32_t>(share.row + 32 * k), token)
                         : kAllThere;
}

__device__ __forceinline__ float where(uint32_t bits, int bit, float value) { return bits >> bit & 1 ? value : 0.0f; }

// A tile row's tokens there and, of each row, those that dropout keeps.
struct Present {
  uint32_t there;
  PerRow<uint32_t> kept;
};

// Runs the warp's tile rows of a strip: step(tile, present); chunk_ends() follows each chunk of the pipe. `careful`:
// some tokens may not be there or dropped.
template <bool careful, class Entries, class Step, class ChunkEnds>
__device__ __forceinline__ void stream_strip(const RowsTask& task, const Share& share, int strip, TilePipe& pipe,
                                             Entries& entries, const Step& step, const ChunkEnds& chunk_ends) {
  const Grid& grid = task.grid;
  for (int position = share.first; position < share.last;) {
    const float* tile = pipe.take(share.tiles(task));
    const int end = min(position + task.split.chunk, share.last);
#pragma unroll 1
    for (; position < end; ++position, entries.next(), tile += grid.tile_floats()) {
      Present present;
      if (careful) {
        present.there = tokens_there(tile, grid.channels);
        if (present.there == 0) continue;
        tokens_kept(present.kept, task, share, strip, position);
      }
      step(tile, present);
    }
    chunk_ends();
    pipe.release(share.tiles(task));
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pk
