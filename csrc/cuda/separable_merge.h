// What separable attention's kernels with rows of the form share besides tokens (docs/cuda.md): their arguments and
// memory, and how the partial sums that their blocks leave become results.
#pragma once

#include "separable_rows.h"

namespace pk {
namespace cuda {
namespace {

// A row's sums are of 2^(score - reference). No score of a block exceeds its reference by more than this.
constexpr float kLazyMargin = 60.0f;

// The arguments of the kernels whose threads own rows. Backward: upstream [B, entries, rows] is d_sums.
struct RowsTask {
  Grid grid;
  Split split;
  const float *form, *upstream, *statistics, *tiles, *extents;
  float *states, *outer_sums, *column_sums;
  DropoutRule rule;
  bool drops;
};

// The memory of a call: packed tokens, their extents, partial sums.
struct Workspace {
  int64_t tiles, extents, partials;

  Workspace(const Grid& grid, const Split& split)
      : tiles(grid.batch * grid.tile_rows() * grid.tile_floats()),
        extents(ceil_div(grid.batch * grid.extent_blocks() * 2 * (grid.channels + 1), 4) * 4),
        partials(PartialSizes(grid, split).sum()) {}
};

inline RowsTask task_of(const SeparableCall& call, const Grid& grid, const Split& split, const TensorView& workspace) {
  const Workspace sizes(grid, split);
  const PartialSizes partials(grid, split);
  float* const tiles = workspace.as<float>();
  float* const states = tiles + sizes.tiles + sizes.extents;
  return {grid,
          split,
          call.form.as<const float>(),
          nullptr,
          nullptr,
          tiles,
          tiles + sizes.tiles,
          states,
          states + partials.states,
          states + partials.states + partials.outer_sums,
          DropoutRule(call.dropout),
          call.dropout.p > 0.0};
}

// The smallest and the largest of one packed quantity over some blocks of tile rows, which the lanes share.
__device__ inline float2 extent(const float* extents, int quantities, int64_t first, int64_t last) {
  float low = kInfinity, high = -kInfinity;
#pragma unroll 1
  for (int64_t block = first + threadIdx.x % 32; block < last; block += 32) {
    low = fminf(low, extents[2 * quantities * block]);
    high = fmaxf(high, extents[2 * quantities * block + quantities]);
  }
  return warp_extent(low, high);
}

// --- merging ---

constexpr int kMergeRows = 32, kMergeLanes = 8, kMergeEntries = 4 * kMergeLanes;

// The sum or the largest of all lanes' values of a row.
template <class Combine>
__device__ __forceinline__ float over_lanes(float value, float* exchange, int row, int lane, const Combine& combine) {
  __syncthreads();
  exchange[lane * kMergeRows + row] = value;
  __syncthreads();
  value = exchange[row];
  for (int other = 1; other < kMergeLanes; ++other) value = combine(value, exchange[other * kMergeRows + row]);
  return value;
}

// Adds the blocks' partial sums of kMergeEntries entries of kMergeRows rows: forward's (with lse) as states merge,
// divided by the sum of the weights; backward's as they are, over the batch where all its entries have the same form.
__global__ void __launch_bounds__(kMergeRows* kMergeLanes)
    separable_merge_kernel(RowsTask task, float* result, double* lse, float* total, int batches) {
  const Grid& grid = task.grid;
  const Split& split = task.split;
  float* const exchange = shared_memory<float>();              // [kMergeLanes, kMergeRows]
  float* const factors = exchange + kMergeLanes * kMergeRows;  // [slots, kMergeRows], forward
  const int row_blocks = grid.padded_rows / kMergeRows,
            entry_blocks = (grid.entries() + kMergeEntries - 1) / kMergeEntries;
  const int own_row = static_cast<int>(threadIdx.x) % kMergeRows, lane = static_cast<int>(threadIdx.x) / kMergeRows;
  const int row = static_cast<int>(blockIdx.x) % row_blocks * kMergeRows + own_row;
  const int entry_block = static_cast<int>(blockIdx.x) / row_blocks % entry_blocks;
  const int64_t batch = blockIdx.x / row_blocks / entry_blocks, padded = grid.padded_rows;
  const int slots = split.slots(), of_state = grid.channels + 3;
  const auto add = [](float a, float b) { return a + b; };

  float scale = 1.0f;
  if (lse) {
    const float* state = task.states + (batch * slots * of_state + grid.channels) * padded + row;
    float reference = -kInfinity, weight = 0.0f, kept = 0.0f;
    for (int slot = lane; slot < slots; slot += kMergeLanes)
      reference = fmaxf(reference, state[(static_cast<int64_t>(slot) * of_state + 2) * padded]);
    reference = over_lanes(reference, exchange, own_row, lane, [](float a, float b) { return fmaxf(a, b); });
    if (reference == -kInfinity) reference = 0.0f;
    for (int slot = lane; slot < slots; slot += kMergeLanes) {
      const float* own = state + static_cast<int64_t>(slot) * of_state * padded;
      const float factor = exp2_approx(own[2 * padded] - reference);
      factors[slot * kMergeRows + own_row] = factor;
      weight += factor * own[0];
      kept += factor * own[task.drops ? padded : 0];
    }
    weight = over_lanes(weight, exchange, own_row, lane, add);
    kept = over_lanes(kept, exchange, own_row, lane, add);
    const bool empty = weight == 0.0f;
    const float keep = task.drops ? task.rule.kept : 1.0f;
    scale = empty ? 0.0f : keep / weight;
    if (entry_block == 0 && lane == 0 && row < grid.rows) {
      constexpr double ln2 = 0.69314718055994530942;
      lse[batch * grid.rows + row] =
          empty ? -static_cast<double>(kInfinity) : ln2 * reference + log(static_cast<double>(weight));
      total[batch * grid.rows + row] = empty ? 0.0f : keep * (kept / weight);  // 1 without dropout, exactly
    }
  }

  for (int own = lane; own < kMergeEntries; own += kMergeLanes) {
    const int entry = entry_block * kMergeEntries + own;
    if (entry >= grid.entries()) return;
    // Which slots hold a part of the entry: `count` of them from `first` on, `step` apart; and where the parts are.
    const int outer_entry = entry - grid.channels, column = outer_entry - grid.outer_entries;
    const float* partials = task.states + entry * padded;
    int count = slots, first = 0, step = 1, size = of_state;
    if (column >= 0) {
      partials = task.column_sums + column * padded;
      count = split.parts, first = column / (kColumns * split.group_size) * split.parts, size = grid.columns;
    } else if (outer_entry >= 0) {
      partials = task.outer_sums + outer_entry * padded;
      count = split.outer_slots(grid), size = grid.outer_entries;
      if (grid.outer_axes == 1) first = outer_entry / split.part_size, step = split.parts;
    }
    const int warps = outer_entry >= 0 && column < 0 && grid.outer_axes > 1 ? split.warps : 1;
    float sum = 0.0f;
    for (int64_t b = batch; b < batch + batches; ++b) {
      const float* of_batch = partials + b * count * size * padded + row;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const float partial = of_batch[static_cast<int64_t>(i) * size * padded];
        sum += lse ? partial * factors[(first + i / warps * step) * kMergeRows + own_row] : partial;
      }
    }
    if (row < grid.rows) result[(batch * grid.entries() + entry) * grid.rows + row] = lse ? sum * scale : sum;
  }
}

inline Status merge(const RowsTask& task, float* result, double* lse, float* total, int batches, Stream stream) {
  const Grid& grid = task.grid;
  const int64_t blocks = int64_t{grid.padded_rows / kMergeRows} * ceil_div(grid.entries(), kMergeEntries);
  const size_t shared = sizeof(float) * kMergeRows * (kMergeLanes + (lse ? task.split.slots() : 0));
  return launch(separable_merge_kernel, blocks * (grid.batch / batches), kMergeRows * kMergeLanes, shared, stream, task,
                result, lse, total, batches);
}

}  // namespace
}  // namespace cuda
}  // namespace pk
