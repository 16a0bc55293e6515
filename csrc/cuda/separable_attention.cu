// separable_attention on a GPU, forward and the gradients of its rows (docs/separable_attention.md, docs/cuda.md): a
// row in a thread, tokens streaming past all rows. Nothing crosses lanes, and a strip's table and marginal stay in
// registers while the outer positions pass. Blocks leave partial sums, which a kernel adds in an order that follows
// from shapes.
#include "separable_forms.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kMostThreads = 128;

// Blocks that a multiprocessor holds: three where 168 registers suffice for a thread, else two.
template <int C, bool one_outer, bool careful>
constexpr int kForwardBlocks = C > 0 && one_outer && !careful ? 3 : 2;
template <int C, bool careful>
constexpr int kBackwardBlocks = C > 0 && C < 4 && !careful ? 3 : 2;

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
