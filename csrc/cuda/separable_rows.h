// Separable attention with rows of the form in threads (docs/cuda.md): how its tokens are packed and reach a warp, and
// how the work is divided among blocks.
#pragma once

#include <algorithm>
#include <limits>

#include "elements.h"
#include "launch.h"
#include "philox.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kColumns = 16;  // of a tile row: tokens side by side on the last axis, at one outer position
constexpr int kRowsPerThread = 2, kBlockRows = kRowsPerThread * 32;
constexpr int kMaxOuterAxes = 3;
constexpr int kPackedTileRows = 32;  // of a block of the pack kernel; extents are known for so many at a time
constexpr int kStages = 2;           // of a warp's tile rows in shared memory
constexpr int kHeader = 4;           // floats after a tile row's tokens; the bits of the first: which tokens are there
constexpr uint32_t kAllThere = (1u << kColumns) - 1;
constexpr float kLog2E = 1.44269504088896341f, kInfinity = std::numeric_limits<float>::infinity();

// The last grid axis is the columns, the others together are the outer positions.
struct Grid {
  int64_t form_batch;  // from one batch entry of the form to the next; 0 where all have the same
  int batch, rows, padded_rows, channels, columns, strips, outer, outer_axes, sizes[kMaxOuterAxes], outer_entries;

  __host__ __device__ int entries() const { return channels + outer_entries + columns; }
  __host__ __device__ int row_blocks() const { return padded_rows / kBlockRows; }
  __host__ __device__ int tile_floats() const { return (channels + 1) * kColumns + kHeader; }
  __host__ __device__ int64_t tile_rows() const { return static_cast<int64_t>(strips) * outer; }
  __host__ __device__ int64_t extent_blocks() const { return (tile_rows() + kPackedTileRows - 1) / kPackedTileRows; }
};

inline Grid grid_of(const SeparableCall& call) {
  Grid grid{};
  const TensorView &form = call.form, &x = call.x;
  grid.form_batch = form.size(0) == 1 ? 0 : form.size(1) * form.size(2);
  grid.batch = static_cast<int>(x.size(0));
  grid.rows = static_cast<int>(form.size(2));
  grid.padded_rows = static_cast<int>(ceil_div(grid.rows, kBlockRows) * kBlockRows);
  grid.channels = static_cast<int>(x.size(-1));
  grid.columns = static_cast<int>(x.size(-2));
  grid.strips = static_cast<int>(ceil_div(grid.columns, kColumns));
  grid.outer_axes = x.dims - 3;
  grid.outer = 1;
  for (int axis = 0; axis < kMaxOuterAxes; ++axis) {
    grid.sizes[axis] = axis < grid.outer_axes ? static_cast<int>(x.size(1 + axis)) : 1;
    grid.outer *= grid.sizes[axis];
    if (axis < grid.outer_axes) grid.outer_entries += grid.sizes[axis];
  }
  return grid;
}

// --- tokens ---

// Where an outer position stands on each outer axis.
struct OuterIndex {
  int at[kMaxOuterAxes];

  __device__ OuterIndex(const Grid& grid, int position) {
    at[2] = position % grid.sizes[2];
    at[1] = position / grid.sizes[2] % grid.sizes[1];
    at[0] = position / grid.sizes[2] / grid.sizes[1];
  }

  __device__ void next(const Grid& grid) {
    if (++at[2] < grid.sizes[2]) return;
    at[2] = 0;
    if (++at[1] < grid.sizes[1]) return;
    at[1] = 0;
    ++at[0];
  }
};

// An array over the tokens; undefined: no data.
struct TokenView {
  const void* data;
  int64_t batch, outer[kMaxOuterAxes], column, channel;

  __device__ int64_t offset(int64_t entry, const OuterIndex& index, int at_column) const {
    int64_t result = entry * batch + at_column * column;
    for (int axis = 0; axis < kMaxOuterAxes; ++axis) result += index.at[axis] * outer[axis];
    return result;
  }
};

inline TokenView token_view(const Grid& grid, const TensorView& tensor) {
  TokenView result{};
  if (!tensor.defined()) return result;
  result.data = tensor.data;
  result.batch = tensor.stride(0);
  for (int axis = 0; axis < grid.outer_axes; ++axis) result.outer[axis] = tensor.stride(1 + axis);
  result.column = tensor.stride(1 + grid.outer_axes);
  if (tensor.dims > 2 + grid.outer_axes) result.channel = tensor.stride(-1);
  return result;
}

// The smallest and the largest of all lanes' values.
__device__ inline float2 warp_extent(float low, float high) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFF, low, lanes));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFF, high, lanes));
  }
  return make_float2(low, high);
}

constexpr int kPackThreads = 128, kPackAtOnce = kPackThreads / kColumns, kPackOwn = kPackedTileRows / kPackAtOnce;

// Tile rows of r x_1, ..., r x_c, r and which tokens are there, strip after strip, the outer positions within a strip;
// and extents [B, extent blocks, 2, c + 1], the smallest and the largest of each quantity. A masked token is all zeros;
// one beyond the last column has r = 1, which multiplies table entries of -inf. Not `weighted`: x in place of r x.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    separable_pack_kernel(Grid grid, TokenView x, TokenView r, TokenView mask, bool weighted, float* tiles,
                          float* extents) {
  constexpr int warps = kPackThreads / 32;
  float* found = shared_memory<float>();  // [warps, 2, c + 1]
  const int64_t entry = blockIdx.x / grid.extent_blocks(), block = blockIdx.x % grid.extent_blocks();
  const int own_column = static_cast<int>(threadIdx.x) % kColumns, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, quantities = grid.channels + 1;
  tiles += entry * grid.tile_rows() * grid.tile_floats();
  extents += (entry * grid.extent_blocks() + block) * 2 * quantities;

  const T* source[kPackOwn];
  float* target[kPackOwn];
  float factor[kPackOwn];
  bool keep[kPackOwn];
  for (int i = 0; i < kPackOwn; ++i) {
    const int64_t tile_row = block * kPackedTileRows + i * kPackAtOnce + threadIdx.x / kColumns;
    const bool exists = tile_row < grid.tile_rows();
    const OuterIndex index(grid, static_cast<int>(tile_row % grid.outer));
    const int column = static_cast<int>(tile_row / grid.outer) * kColumns + own_column;
    const bool inside = exists && column < grid.columns;
    keep[i] = inside;
    if (inside && mask.data) keep[i] = static_cast<const uint8_t*>(mask.data)[mask.offset(entry, index, column)] != 0;
    factor[i] = keep[i] || !inside ? 1.0f : 0.0f;
    if (keep[i] && r.data) factor[i] = static_cast<const float*>(r.data)[r.offset(entry, index, column)];
    source[i] = static_cast<const T*>(x.data) + (keep[i] ? x.offset(entry, index, column) : 0);
    target[i] = exists ? tiles + tile_row * grid.tile_floats() + own_column : nullptr;
    const uint32_t there = __ballot_sync(0xFFFFFFFF, keep[i] || !inside) >> (lane & kColumns) & kAllThere;
    if (exists && own_column < kHeader) target[i][quantities * kColumns] = __uint_as_float(own_column == 0 ? there : 0);
  }
  for (int c = 0; c < quantities; ++c) {
    float low = kInfinity, high = -kInfinity;
    for (int i = 0; i < kPackOwn; ++i) {
      float value = factor[i];
      if (c < grid.channels)
        value = keep[i] ? to_float(source[i][c * x.channel]) * (weighted ? factor[i] : 1.0f) : 0.0f;
      if (target[i]) target[i][c * kColumns] = value;
      if (keep[i]) low = fminf(low, value), high = fmaxf(high, value);
    }
    const float2 of_warp = warp_extent(low, high);
    if (lane == 0) {
      found[(warp * 2 + 0) * quantities + c] = of_warp.x;
      found[(warp * 2 + 1) * quantities + c] = of_warp.y;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * quantities; i += kPackThreads) {
    float value = found[i];
    for (int other = 1; other < warps; ++other) {
      const float theirs = found[other * 2 * quantities + i];
      value = i < quantities ? fminf(value, theirs) : fmaxf(value, theirs);
    }
    extents[i] = value;
  }
}

inline Status pack(const SeparableCall& call, const Grid& grid, float* tiles, float* extents, Stream stream,
                   bool weighted = true) {
  const TokenView x = token_view(grid, call.x), r = token_view(grid, call.r), mask = token_view(grid, call.mask);
  const size_t shared = sizeof(float) * kPackThreads / 32 * 2 * (grid.channels + 1);
  return with_data(call.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(separable_pack_kernel<T>, grid.batch * grid.extent_blocks(), kPackThreads, shared, stream, grid, x, r,
                  mask, weighted, tiles, extents);
  });
}

// --- the division of the work ---

// Each block has kBlockRows rows, one of `groups` groups of strips and one of `parts` parts of the outer positions,
// which its warps share. `chunk`: the tile rows of a stage.
struct Split {
  int groups, group_size, parts, part_size, warps, chunk;

  __host__ __device__ int slots() const { return groups * parts; }
  // Whose marginals of the outer axes a warp adds to: with one such axis, parts have no entry in common.
  __host__ __device__ int outer_slots(const Grid& grid) const { return grid.outer_axes > 1 ? slots() * warps : groups; }
};

// What blocks leave: states [B, slots, c + 3, padded rows], outer_sums [B, outer slots, outer entries, padded rows] and
// column_sums [B, parts, columns, padded rows]; floats.
struct PartialSizes {
  int64_t states, outer_sums, column_sums;

  PartialSizes(const Grid& grid, const Split& split) {
    const int64_t of_entry = static_cast<int64_t>(grid.batch) * grid.padded_rows;
    states = of_entry * split.slots() * (grid.channels + 3);
    outer_sums = of_entry * split.outer_slots(grid) * grid.outer_entries;
    column_sums = of_entry * split.parts * grid.columns;
  }
  int64_t sum() const { return states + outer_sums + column_sums; }
};

// Merging takes 128 bytes of a block's memory for each slot, and some GPUs have 99 KB.
constexpr int kMostSlots = 768, kStageBytes = 2048;

// The division with the least predicted time, in tile rows that a multiprocessor's warps take one after the other:
// those of the multiprocessor with the most blocks, and as many as it could take while partial sums go to the L2 cache
// and back.
inline Split split_of(const Grid& grid, int multiprocessors) {
  constexpr double per_block = 3.0, per_strip = 1.5, partials_per_tile_row = 300.0, filling = 2.0;
  constexpr int most_warps = 32;  // that a multiprocessor may be given beyond one block
  Split best{}, split{};
  // The sums of many channels lie in shared memory, each warp's own.
  split.warps = std::min(grid.channels >= 120 ? 1 : grid.channels > 32 ? 2 : 4, grid.outer);
  const int64_t tile_bytes = static_cast<int64_t>(grid.tile_floats()) * sizeof(float);
  split.chunk = static_cast<int>(std::max<int64_t>(kStageBytes / tile_bytes, 1));
  const int64_t blocks = static_cast<int64_t>(grid.batch) * grid.row_blocks();
  double least = std::numeric_limits<double>::infinity();
  for (split.group_size = grid.strips; split.group_size > 0; --split.group_size) {
    split.groups = static_cast<int>(ceil_div(grid.strips, split.group_size));
    split.group_size = static_cast<int>(ceil_div(grid.strips, split.groups));
    for (int wanted = 1; wanted <= most_warps / split.warps; ++wanted) {
      const int64_t parts = std::min<int64_t>(wanted * multiprocessors / (blocks * split.groups), grid.outer);
      split.part_size = static_cast<int>(ceil_div(grid.outer, std::max<int64_t>(parts, 1)));
      split.parts = static_cast<int>(ceil_div(grid.outer, split.part_size));
      if (split.slots() > kMostSlots) continue;
      const double warps =
          static_cast<double>(ceil_div(blocks * split.slots(), multiprocessors) * split.warps) + filling;
      const double of_strip = per_strip + static_cast<double>(ceil_div(split.part_size, split.warps));
      const double partials = static_cast<double>(PartialSizes(grid, split).sum()) / multiprocessors;
      const double time = warps * (per_block + split.group_size * of_strip) + partials / partials_per_tile_row;
      if (time < least) least = time, best = split;
    }
  }
  return best;
}

// --- a warp's tile rows ---

// Where a warp's tile rows are: those of its strips and, of each, its outer positions.
struct TileRange {
  const float* tiles;  // [strips, outer positions, tile_floats]
  int tile_floats, outer, chunk, first_strip, last_strip, first, last;
};

// Brings them through shared memory: for strip after strip the outer positions, `chunk` at a time. The range, which it
// is told each time, costs no registers where the caller has it anyway.
class TilePipe {
 public:
  __device__ TilePipe(const TileRange& range, float* stages, uint64_t* barriers)
      : stages_(stages), barriers_(barriers), strip_(range.first_strip), position_(range.first) {
#if __CUDA_ARCH__ >= 900
    if (lane() == 0) {
      for (int stage = 0; stage < kStages; ++stage) barrier_init(barriers_ + stage, 1);
      barrier_init_fence();
    }
    __syncwarp();
#endif
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) fetch(range);
  }

  // The next chunk's first tile row, once it is there.
  __device__ const float* take(const TileRange& range) {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barriers_ + taken_ % kStages, taken_ / kStages % 2);
#else
    async_wait<kStages - 1>();
    __syncwarp();
#endif
    return stage(range, taken_++);
  }

  // The warp has done with the chunk that it took last.
  __device__ void release(const TileRange& range) {
    __syncwarp();
    fetch(range);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ float* stage(const TileRange& range, uint32_t number) const {
    return stages_ + number % kStages * (range.chunk * range.tile_floats);
  }

  __device__ void fetch(const TileRange& range) {
    if (strip_ < range.last_strip && range.first < range.last) {
      const int count = min(range.chunk, range.last - position_);
      const float* source = range.tiles + (static_cast<int64_t>(strip_) * range.outer + position_) * range.tile_floats;
      copy(stage(range, fetched_), source, count * range.tile_floats * static_cast<int>(sizeof(float)));
      position_ += count;
      if (position_ == range.last) position_ = range.first, ++strip_;
    }
#if __CUDA_ARCH__ < 900
    async_commit();
#endif
    ++fetched_;
  }

  __device__ void copy(float* target, const float* source, int bytes) const {
#if __CUDA_ARCH__ >= 900
    if (lane() == 0) {
      barrier_expect(barriers_ + fetched_ % kStages, static_cast<uint32_t>(bytes));
      bulk_copy(target, source, static_cast<uint32_t>(bytes), barriers_ + fetched_ % kStages);
    }
#else
    for (int at = lane(); at < bytes / 16; at += 32) async_copy(target + 4 * at, source + 4 * at);
#endif
  }

  float* const stages_;
  uint64_t* const barriers_;
  int strip_, position_;
  uint32_t fetched_ = 0, taken_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace pk
