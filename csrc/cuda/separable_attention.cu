// separable_attention on a GPU, forward and the gradients of its rows (docs/separable_attention.md, docs/cuda.md): a
// row in a thread, tokens streaming past all rows. Nothing crosses lanes, and a strip's table and marginal stay in
// registers while the outer positions pass. Blocks leave partial sums, which a kernel adds in an order that follows
// from shapes.
#include "separable_merge.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kMostThreads = 128;

// Blocks that a multiprocessor holds: three where 168 registers suffice for a thread, else two.
template <int C, bool one_outer, bool careful>
constexpr int kForwardBlocks = C > 0 && one_outer && !careful ? 3 : 2;
template <int C, bool careful>
constexpr int kBackwardBlocks = C > 0 && C < 4 && !careful ? 3 : 2;

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

// --- forward ---

// Each row's largest score over some strips and outer positions, or `largest`.
template <int C, bool one_outer>
__device__ void largest_scores(PerRow<float>& largest, const RowsTask& task, const RowArray<const float>& form,
                               const Channels<C>& a, const float* tiles, int first_strip, int last_strip, int first,
                               int last) {
  const Grid& grid = task.grid;
  const PerRow<float> log2e = {kLog2E, kLog2E}, nothing = {0.0f, 0.0f};
  const RowArray<const float> outer_tables = form.from(grid.channels);
#pragma unroll 1
  for (int column = first_strip * kColumns; column < last_strip * kColumns; column += kTokens<C>) {
    float table[kRowsPerThread][kTokens<C>];
    load_columns(table, form, grid, column, log2e, -kInfinity);
    OuterEntries<one_outer> entries(grid, first);
    const int begin = column % kColumns;
    const float* tile = tiles + (static_cast<int64_t>(column / kColumns) * grid.outer + first) * grid.tile_floats();
#pragma unroll 1
    for (int position = first; position < last; ++position, entries.next(), tile += grid.tile_floats()) {
      const uint32_t there = tokens_there(tile, grid.channels) >> begin;
      PerRow<float> outer;
      outer_sum(outer, outer_tables, entries, log2e);
      float score[kRowsPerThread][kTokens<C>];
      linear_form(score, tile, begin, a, table, 0, outer, nothing);
#pragma unroll
      for (int t = 0; t < kTokens<C>; ++t)
#pragma unroll
        for (int k = 0; k < kRowsPerThread; ++k)
          if (there >> t & 1) largest[k] = fmaxf(largest[k], score[k][t]);
    }
  }
}

// Each row's reference for the block's tokens: a score that it has, and where others may lie far above it by interval
// arithmetic, the largest.
template <int C, bool one_outer>
__device__ void choose_reference(PerRow<float>& reference, const RowsTask& task, const Share& share,
                                 const RowArray<const float>& form, const Channels<C>& a, float* exchange) {
  const Grid& grid = task.grid;
  const int warps = task.split.warps, quantities = grid.channels + 1;
  const float* tiles = task.tiles + int64_t{share.batch} * grid.tile_rows() * grid.tile_floats();
  const float* extents = task.extents + int64_t{share.batch} * grid.extent_blocks() * 2 * quantities;

  // The largest score of the warps' first tile rows; and of the tables, outer and column, the largest and minus the
  // smallest entry.
  float found[5][kRowsPerThread];
  for (float (&values)[kRowsPerThread] : found)
    for (float& value : values) value = -kInfinity;
  const bool works = share.first < share.last;
  largest_scores<C, one_outer>(found[0], task, form, a, tiles, share.first_strip, share.first_strip + works,
                               share.first, share.first + 1);
  const RowArray<const float> outer_tables = form.from(grid.channels);
  OuterEntries<one_outer> entries(grid, share.first);
#pragma unroll 1
  for (int position = share.first; position < share.last; ++position, entries.next()) {
    PerRow<float> value;
    outer_sum(value, outer_tables, entries, {1.0f, 1.0f});
    for (int k = 0; k < kRowsPerThread; ++k)
      found[1][k] = fmaxf(found[1][k], value[k]), found[2][k] = fmaxf(found[2][k], -value[k]);
  }
  const int last_column = min(share.last_strip * kColumns, grid.columns);
#pragma unroll 1
  for (int column = share.first_strip * kColumns + share.warp; column < last_column; column += warps)
    for (int k = 0; k < kRowsPerThread; ++k) {
      const float value = form(k, grid.channels + grid.outer_entries + column);
      found[3][k] = fmaxf(found[3][k], value), found[4][k] = fmaxf(found[4][k], -value);
    }
  largest_of_warps(found, share, warps, exchange);

  const int from = share.part * task.split.part_size, to = min(from + task.split.part_size, grid.outer);
  const int64_t first_block = (static_cast<int64_t>(share.first_strip) * grid.outer + from) / kPackedTileRows;
  const int64_t last_block = ((share.last_strip - int64_t{1}) * grid.outer + to - 1) / kPackedTileRows + 1;
  const float2 r = extent(extents + grid.channels, quantities, first_block, last_block);
  PerRow<float> bound;
  for (int k = 0; k < kRowsPerThread; ++k) {
    const float high = (found[1][k] + found[3][k]) * kLog2E, low = -(found[2][k] + found[4][k]) * kLog2E;
    bound[k] = fmaxf(fmaxf(low * r.x, low * r.y), fmaxf(high * r.x, high * r.y));
  }
#pragma unroll 1
  for (int c = 0; c < grid.channels; ++c) {
    const float2 x = extent(extents + c, quantities, first_block, last_block);
    for (int k = 0; k < kRowsPerThread; ++k) {
      const float channel = form(k, c) * kLog2E;
      bound[k] += fmaxf(channel * x.x, channel * x.y);
    }
  }
  bool within = true;
  for (int k = 0; k < kRowsPerThread; ++k) {
    reference[k] = found[0][k];
    within = within && bound[k] <= reference[k] + kLazyMargin;
  }
  if (__syncthreads_or(!within)) {
    float largest[1][kRowsPerThread] = {reference[0], reference[1]};
    largest_scores<C, one_outer>(largest[0], task, form, a, tiles, share.first_strip, share.last_strip, share.first,
                                 share.last);
    largest_of_warps(largest, share, warps, exchange);
    for (int k = 0; k < kRowsPerThread; ++k) reference[k] = largest[0][k];
  }
}

// The weights of a tile row and their sums. present is looked at where that is `careful`.
template <int C, bool careful>
__device__ __forceinline__ void attend(const float* tile, const Present& present, const Channels<C>& a,
                                       const Strip& table, const PerRow<float>& outer, const PerRow<float>& constant,
                                       const RowSums& sums, ChannelSums<C>& acc, PerRow<float>& total, Strip& marginal,
                                       PerRow<float>& outer_weight) {
  PerRow<float> kept_total = {};
#pragma unroll
  for (int begin = 0; begin < kColumns; begin += kTokens<C>) {
    float p[kRowsPerThread][kTokens<C>];
    linear_form(p, tile, begin, a, table, begin, outer, constant);
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
      for (int t = 0; t < kTokens<C>; ++t) {
        p[k][t] = exp2_approx(p[k][t]);
        if (careful) p[k][t] = where(present.there, begin + t, p[k][t]);
        total[k] += p[k][t];
        if (careful) kept_total[k] += p[k][t] = where(present.kept[k], begin + t, p[k][t]);
      }
    add_weighted<C>(p, tile, begin, a.count(), acc, sums, marginal, outer_weight);
  }
  if (careful)
    for (int k = 0; k < kRowsPerThread; ++k) sums.add(k, a.count() + 1, kept_total[k]);
}

// Sums of 2^(score - reference). A block's states: acc, the sum of the weights, the same after dropout, reference.
template <int C, bool one_outer, bool careful>
__global__ void __launch_bounds__(kMostThreads, kForwardBlocks<C, one_outer, careful>)
    separable_attention_fwd_kernel(RowsTask task) {
  const Grid& grid = task.grid;
  const Split& split = task.split;
  const Share share(task);
  const BlockMemory memory(grid, split, shared_memory<float>());
  const PerRow<float> log2e = {kLog2E, kLog2E};
  const RowArray<const float> form(task.form + share.batch * grid.form_batch, grid.rows, share.row);
  const PaddedArray<float> outer_sums(task.outer_sums + share.outer_slot(task) * grid.outer_entries * grid.padded_rows,
                                      grid.padded_rows, share.row);
  const Channels<C> a(form, log2e, grid.channels);
  PerRow<float> constant;
  {
    const PaddedArray<float> states = states_of(task, share);
    PerRow<float> reference;
    choose_reference<C, one_outer>(reference, task, share, form, a, memory.exchange);
    for (int k = 0; k < kRowsPerThread; ++k) {
      if (share.warp == 0) states(k, grid.channels + 2) = reference[k];
      // A row that has only scores of -inf: its weights are 2^-inf = 0, not 2^(-inf + inf).
      constant[k] = reference[k] == -kInfinity ? 0.0f : -reference[k];
    }
  }
  clear_outer(outer_sums, grid, share.first, share.last);
  const int stored = grid.channels + 2;
  const RowSums sums(memory.sums + share.warp * stored * kBlockRows + share.lane, stored);

  const RowArray<const float> outer_tables = form.from(grid.channels);
  TilePipe pipe(share.tiles(task), memory.stages_of(grid, split, share.warp), memory.barriers + share.warp * kStages);
  for (int strip = share.first_strip; strip < share.last_strip; ++strip) {
    Strip table, marginal = {};
    load_columns(table, form, grid, strip * kColumns, log2e, -kInfinity);
    OuterEntries<one_outer> entries(grid, share.first);
    ChannelSums<C> acc;
    PerRow<float> total = {};
    const auto step = [&](const float* tile, const Present& present) {
      PerRow<float> outer, outer_weight = {};
      outer_sum(outer, outer_tables, entries, log2e);
      attend<C, careful>(tile, present, a, table, outer, constant, sums, acc, total, marginal, outer_weight);
      add_outer(outer_sums, entries, outer_weight);
    };
    stream_strip<careful>(task, share, strip, pipe, entries, step, [&] {
      acc.end_chunk(sums);
      acc = {};
      for (int k = 0; k < kRowsPerThread; ++k) sums.add(k, grid.channels, total[k]), total[k] = 0.0f;
    });
    leave_strip(marginal, task, share, strip, memory.exchange);
  }
  leave(memory.sums, stored, stored, share, split.warps, states_of(task, share));
}

// --- backward ---

constexpr int kPrepareLanes = 16;

// Of each row, [B, 4, padded rows]: the weights are recomputed as 2^(score - reference), reference being log2(e) lse in
// float32; what rounding took away is a factor near 1 of the upstream gradients; factor * delta; factor * d_total.
__global__ void __launch_bounds__(32 * kPrepareLanes)
    separable_attention_bwd_prepare_kernel(const float* sums, const double* lse, const float* total,
                                           const float* d_sums, TensorView d_lse, TensorView d_total, bool drops,
                                           int rows, int entries, int padded_rows, float* statistics) {
  double* shared = shared_memory<double>();  // [kPrepareLanes, 32]
  const int lane = static_cast<int>(threadIdx.x) % 32, share = static_cast<int>(threadIdx.x) / 32;
  const int blocks = padded_rows / 32, row = static_cast<int>(blockIdx.x) % blocks * 32 + lane;
  const int64_t batch = blockIdx.x / blocks, read_row = min(row, rows - 1);
  double delta = 0.0;
#pragma unroll 4
  for (int entry = share; entry < entries; entry += kPrepareLanes) {
    const int64_t at = (batch * entries + entry) * rows + read_row;
    delta += static_cast<double>(d_sums[at]) * static_cast<double>(sums[at]);
  }
  shared[share * 32 + lane] = delta;
  __syncthreads();
  if (share > 0) return;
  for (int other = 1; other < kPrepareLanes; ++other) delta += shared[other * 32 + lane];

  constexpr double log2e = 1.4426950408889634074;
  const int64_t at = batch * rows + read_row;
  const double of_total =
      drops ? static_cast<const float*>(d_total.data)[batch * d_total.strides[0] + read_row * d_total.strides[1]] : 0.0;
  delta += of_total * static_cast<double>(total[at]);
  delta -= static_cast<const double*>(d_lse.data)[batch * d_lse.strides[0] + read_row * d_lse.strides[1]];
  const bool empty = lse[at] == -static_cast<double>(kInfinity);
  const double exact = empty ? 0.0 : lse[at] * log2e;
  const float reference = static_cast<float>(exact);
  const float factor = empty ? 0.0f : exp2_approx(static_cast<float>(reference - exact));
  float* const own = statistics + batch * 4 * padded_rows + row;
  own[0] = reference;
  own[padded_rows] = factor;
  own[2 * padded_rows] = empty ? 0.0f : static_cast<float>(factor * delta);
  own[3 * padded_rows] = empty ? 0.0f : static_cast<float>(factor * of_total);
}

// ds = r dS of a tile row and its sums. present is looked at where that is `careful`.
template <int C, bool careful>
__device__ __forceinline__ void attend_backward(const float* tile, const Present& present, const Channels<C>& a,
                                                const Channels<C>& d_acc, const Strip& table, const Strip& d_marginal,
                                                const PerRow<float>& outer, const PerRow<float>& d_outer,
                                                const PerRow<float>& minus_reference, const PerRow<float>& minus_delta,
                                                const PerRow<float>& d_total, const RowSums& sums, ChannelSums<C>& d_a,
                                                Strip& d_table, PerRow<float>& d_outer_score) {
#pragma unroll
  for (int begin = 0; begin < kColumns; begin += kTokens<C>) {
    float ds[kRowsPerThread][kTokens<C>], u[kRowsPerThread][kTokens<C>];
    linear_form(ds, tile, begin, a, table, begin, outer, minus_reference);
    linear_form(u, tile, begin, d_acc, d_marginal, begin, d_outer, careful ? d_total : minus_delta);
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
      for (int t = 0; t < kTokens<C>; ++t) {
        if (careful) u[k][t] = where(present.kept[k], begin + t, u[k][t]) + minus_delta[k];
        ds[k][t] = exp2_approx(ds[k][t]) * u[k][t];
        if (careful) ds[k][t] = where(present.there, begin + t, ds[k][t]);
      }
    add_weighted<C>(ds, tile, begin, a.count(), d_a, sums, d_table, d_outer_score);
  }
}

// Sums of ds, the gradients of the form, as forward's kernel leaves its sums.
template <int C, bool one_outer, bool careful>
__global__ void __launch_bounds__(kMostThreads, kBackwardBlocks<C, careful>)
    separable_attention_bwd_rows_kernel(RowsTask task) {
  const Grid& grid = task.grid;
  const Split& split = task.split;
  const Share share(task);
  const BlockMemory memory(grid, split, shared_memory<float>());
  const PerRow<float> log2e = {kLog2E, kLog2E};
  const RowArray<const float> form(task.form + share.batch * grid.form_batch, grid.rows, share.row);
  const RowArray<const float> upstream(task.upstream + int64_t{share.batch} * grid.entries() * grid.rows, grid.rows,
                                       share.row);
  const PaddedArray<const float> statistics(task.statistics + int64_t{share.batch} * 4 * grid.padded_rows,
                                            grid.padded_rows, share.row);
  const PaddedArray<float> outer_sums(task.outer_sums + share.outer_slot(task) * grid.outer_entries * grid.padded_rows,
                                      grid.padded_rows, share.row);
  PerRow<float> minus_reference, factor, minus_delta, d_total;
  for (int k = 0; k < kRowsPerThread; ++k) {
    const float keep = task.drops ? task.rule.kept : 1.0f;
    minus_reference[k] = -statistics(k, 0);
    factor[k] = statistics(k, 1) * keep;
    minus_delta[k] = -statistics(k, 2);
    d_total[k] = statistics(k, 3) * keep;
  }
  const Channels<C> a(form, log2e, grid.channels), d_acc(upstream, factor, grid.channels);
  clear_outer(outer_sums, grid, share.first, share.last);
  const int stored = grid.channels + 2;
  const RowSums sums(memory.sums + share.warp * stored * kBlockRows + share.lane, grid.channels);

  const RowArray<const float> outer_tables = form.from(grid.channels), outer_upstream = upstream.from(grid.channels);
  TilePipe pipe(share.tiles(task), memory.stages_of(grid, split, share.warp), memory.barriers + share.warp * kStages);
  for (int strip = share.first_strip; strip < share.last_strip; ++strip) {
    Strip table, d_marginal, d_table = {};
    load_columns(table, form, grid, strip * kColumns, log2e, -kInfinity);
    load_columns(d_marginal, upstream, grid, strip * kColumns, factor, 0.0f);
    OuterEntries<one_outer> entries(grid, share.first);
    ChannelSums<C> d_a;
    const auto step = [&](const float* tile, const Present& present) {
      PerRow<float> outer, d_outer, d_outer_score = {};
      outer_sum(outer, outer_tables, entries, log2e);
      outer_sum(d_outer, outer_upstream, entries, factor);
      attend_backward<C, careful>(tile, present, a, d_acc, table, d_marginal, outer, d_outer, minus_reference,
                                  minus_delta, d_total, sums, d_a, d_table, d_outer_score);
      add_outer(outer_sums, entries, d_outer_score);
    };
    stream_strip<careful>(task, share, strip, pipe, entries, step, [&] {
      d_a.end_chunk(sums);
      d_a = {};
    });
    leave_strip(d_table, task, share, strip, memory.exchange);
  }
  leave(memory.sums, stored, grid.channels, share, split.warps, states_of(task, share));
}

// --- launching ---

// Packs the tokens and runs a kernel whose threads own rows: select(number of few channels or 0, at most one outer
// axis, careful).
template <class Select>
Status run_rows(const SeparableCall& call, const RowsTask& task, Stream stream, const Select& select) {
  using Yes = std::true_type;
  using No = std::false_type;
  const Grid& grid = task.grid;
  const Status packed = pack(call, grid, const_cast<float*>(task.tiles), const_cast<float*>(task.extents), stream);
  if (packed.code != 0) return packed;
  const int64_t blocks = static_cast<int64_t>(grid.batch) * grid.row_blocks() * task.split.slots();
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks, task.split.warps * 32, BlockMemory::bytes(grid, task.split), stream, task);
  };
  const auto of_channels = [&](auto channels) {
    if (task.drops || call.mask.defined()) return run(select(channels, No{}, Yes{}));
    return grid.outer_axes > 1 ? run(select(channels, No{}, No{})) : run(select(channels, Yes{}, No{}));
  };
  switch (grid.channels) {
    case 1:
      return of_channels(std::integral_constant<int, 1>{});
    case 2:
      return of_channels(std::integral_constant<int, 2>{});
    case 3:
      return of_channels(std::integral_constant<int, 3>{});
    case 4:
      return of_channels(std::integral_constant<int, 4>{});
    default:  // many; without dropout they have kernels of their own
      return run(select(std::integral_constant<int, 0>{}, No{}, Yes{}));
  }
}

}  // namespace

int64_t separable_attention_workspace(const SeparableCall& call, int multiprocessors) {
  const Grid grid = grid_of(call);
  const Workspace sizes(grid, split_of(grid, multiprocessors));
  return sizes.tiles + sizes.extents + sizes.partials;
}

Status separable_attention_fwd(const SeparableCall& call, int multiprocessors, const TensorView& workspace,
                               const TensorView& sums, const TensorView& lse, const TensorView& total, Stream stream) {
  const Grid grid = grid_of(call);
  const RowsTask task = task_of(call, grid, split_of(grid, multiprocessors), workspace);
  const Status status = run_rows(call, task, stream, [](auto channels, auto one_outer, auto careful) {
    return separable_attention_fwd_kernel<channels.value, one_outer.value, careful.value>;
  });
  if (status.code != 0) return status;
  return merge(task, sums.as<float>(), lse.as<double>(), total.as<float>(), 1, stream);
}

Status separable_attention_bwd_prepare(const TensorView& sums, const TensorView& lse, const TensorView& total,
                                       const TensorView& d_sums, const TensorView& d_lse, const TensorView& d_total,
                                       bool dropout, const TensorView& statistics, Stream stream) {
  const int64_t padded_rows = statistics.size(2);
  return launch(separable_attention_bwd_prepare_kernel, sums.size(0) * padded_rows / 32, 32 * kPrepareLanes,
                sizeof(double) * 32 * kPrepareLanes, stream, sums.as<const float>(), lse.as<const double>(),
                total.as<const float>(), d_sums.as<const float>(), d_lse, d_total, dropout,
                static_cast<int>(sums.size(2)), static_cast<int>(sums.size(1)), static_cast<int>(padded_rows),
                statistics.as<float>());
}

Status separable_attention_bwd_rows(const SeparableCall& call, int multiprocessors, const TensorView& workspace,
                                    const TensorView& d_sums, const TensorView& statistics, const TensorView& d_form,
                                    Stream stream) {
  const Grid grid = grid_of(call);
  RowsTask task = task_of(call, grid, split_of(grid, multiprocessors), workspace);
  task.upstream = d_sums.as<const float>();
  task.statistics = statistics.as<const float>();
  const Status status = run_rows(call, task, stream, [](auto channels, auto one_outer, auto careful) {
    return separable_attention_bwd_rows_kernel<channels.value, one_outer.value, careful.value>;
  });
  if (status.code != 0) return status;
  const int batches = call.form.size(0) == 1 ? task.grid.batch : 1;
  return merge(task, d_form.as<float>(), nullptr, nullptr, batches, stream);
}

}  // namespace cuda
}  // namespace pk
