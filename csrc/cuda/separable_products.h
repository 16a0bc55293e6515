// What separable attention's kernels by matrix products share (docs/cuda.md): the division of the work among blocks,
// whose warps have rows of their own, and where a block leaves its sums.
#pragma once

#include "primitives.h"
#include "separable_merge.h"

namespace pk {
namespace cuda {
namespace {

// A block's share of the work: rows, strips of kColumns, outer positions.
struct Share {
  int batch, group, part, slot, first_row, first_strip, last_strip, first, last;

  __device__ Share(const RowsTask& task, int block_rows) {
    const Split& split = task.split;
    const int row_blocks = (task.grid.rows + block_rows - 1) / block_rows;
    const int unit = static_cast<int>(blockIdx.x) / row_blocks;
    first_row = (static_cast<int>(blockIdx.x) - unit * row_blocks) * block_rows;
    batch = unit / split.slots();
    slot = unit - batch * split.slots();
    group = slot / split.parts, part = slot - group * split.parts;
    first_strip = group * split.group_size, last_strip = min(first_strip + split.group_size, task.grid.strips);
    first = part * split.part_size, last = min(first + split.part_size, task.grid.outer);
  }

  __device__ const float* tile(const RowsTask& task, int strip, int position) const {
    const Grid& grid = task.grid;
    return task.tiles + (batch * grid.tile_rows() + int64_t{strip} * grid.outer + position) * grid.tile_floats();
  }
  __device__ float* state(const RowsTask& task, int quantity) const {
    const int64_t slot_of_all = int64_t{batch} * task.split.slots() + slot;
    return task.states + (slot_of_all * (task.grid.channels + 3) + quantity) * task.grid.padded_rows;
  }
  __device__ float* outer_sum(const RowsTask& task, int entry) const {
    const Split& split = task.split;
    const int64_t of_one = int64_t{batch} * split.groups + group, of_more = int64_t{batch} * split.slots() + slot;
    const int64_t outer_slot = task.grid.outer_axes > 1 ? of_more : of_one;
    return task.outer_sums + (outer_slot * task.grid.outer_entries + entry) * task.grid.padded_rows;
  }
  __device__ float* column_sum(const RowsTask& task, int column) const {
    const int64_t part_of_all = int64_t{batch} * task.split.parts + part;
    return task.column_sums + (part_of_all * task.grid.columns + column) * task.grid.padded_rows;
  }
};

// How a kernel's blocks take tokens: of so many rows each, so many strips at a time, in the time in which so many
// partial sums go to the L2 cache and back.
struct Division {
  int rows, strips;
  double partials_per_position;
};

// The division with the least predicted time, in outer positions of a block's strips one after the other on the
// multiprocessor with the most blocks, and as many as it could take while partial sums go to the L2 cache and back.
inline Split split_for_products(const Grid& grid, int multiprocessors, const Division& division) {
  constexpr double per_block = 4.0, per_strip = 2.0, filling = 2.0;
  constexpr int most_blocks = 8;  // that a multiprocessor may be given beyond one round
  Split best{}, split{};
  split.warps = 1;  // none shares rows with another
  const int64_t blocks = grid.batch * ceil_div(grid.rows, division.rows);
  double least = std::numeric_limits<double>::infinity();
  for (int strips = static_cast<int>(ceil_div(grid.strips, division.strips)); strips > 0; --strips) {
    split.group_size = strips * division.strips;
    split.groups = static_cast<int>(ceil_div(grid.strips, split.group_size));
    for (int wanted = 1; wanted <= most_blocks; ++wanted) {
      const int64_t parts = std::min<int64_t>(wanted * multiprocessors / (blocks * split.groups), grid.outer);
      split.part_size = static_cast<int>(ceil_div(grid.outer, std::max<int64_t>(parts, 1)));
      split.parts = static_cast<int>(ceil_div(grid.outer, split.part_size));
      if (split.slots() > kMostSlots) continue;
      const double rounds = static_cast<double>(ceil_div(blocks * split.slots(), multiprocessors)) + filling;
      const double partials = static_cast<double>(PartialSizes(grid, split).sum()) / multiprocessors;
      const double time =
          rounds * (per_block + strips * (per_strip + split.part_size)) + partials / division.partials_per_position;
      if (time < least) least = time, best = split;
    }
  }
  return best;
}

}  // namespace
}  // namespace cuda
}  // namespace pk
