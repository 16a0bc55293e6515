// Separable attention on planes of up to three channels by TensorFloat-32 products, a mode of its own: forward and the
// gradients of its rows (docs/cuda.md). Of a linear form r (a . x + t_1 + t_2) the column table t_2 is a multiply-add;
// a and t_1 are one product with the tokens' features [r x, r], and sums of [r x, r] times weights are another.
#include "separable_products.h"

namespace pk {
namespace cuda {
namespace {

// A warp's tile of scores: rows by the columns of a strip, at one outer position.
constexpr int kRowTiles = 2, kWarpRows = 16 * kRowTiles, kTokenTiles = 4, kStripColumns = 8 * kTokenTiles;
constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = kWarpRows * kWarps;  // of a block: a row to a thread
static_assert(kRows == kThreads, "threads stage what belongs to rows");
constexpr int kStripTiles = kStripColumns / kColumns;
constexpr int kChunk = 8;  // outer positions in shared memory

// Features of tokens, rounded as operands are: r x_1, r x_2, r x_3, r, 1. Then r as it is.
constexpr int kMostChannels = 3, kFactor = kMostChannels, kOne = kFactor + 1, kExactFactor = kOne + 1;
constexpr int kFeatureStride = kStripColumns + 8;  // four features side by side meet every bank once
constexpr int kTokenFloats = (kExactFactor + 1) * kFeatureStride;

// A tensor core cuts off the low 13 bits of a weight: on average, over mantissas as they are of products, 0.7213 / 2048
// of it. By so much weights are larger here until they are summed; in powers of two:
constexpr float kMore = 1.0f + 0.7213f / 2048, kMoreLog2 = 5.0802e-4f;

// A linear form of the block's rows in shared memory. An operand is of the rows' coefficients of a feature, as a
// product takes them: those of the channels and, of r, the row table at kChunk outer positions.
constexpr int kOperand = 2 * kRows;

struct FormMemory {
  alignas(16) float operands[kMostChannels + kChunk][kOperand];
  float factor[kRows], constant[kRows];
  const float* entries;  // [c + S_1 + S_2, rows]
};

// What a block has in shared memory; there rather than in registers, which are for sums.
struct ForwardMemory {
  FormMemory form;
  float features[kChunk * kTokenFloats];
  float totals[4 * kRowTiles][kThreads];  // of each lane's sums: short sums lose less to rounding
  Share share;
};

struct BlockMemory : ForwardMemory {
  // Backward only: the other linear form, and its column table, each lane's.
  FormMemory upstream;
  float2 upstream_table[2 * kRowTiles * kTokenTiles][kThreads];
};

// A form's entries times the rows' factors. Rows that do not exist read as the last one that does.
struct Entries {
  const Share& share;
  const Grid& grid;
  FormMemory& memory;

  __device__ float operator()(int index, int own_row) const {
    const int row = min(share.first_row + own_row, grid.rows - 1);
    return memory.entries[int64_t{index} * grid.rows + row] * memory.factor[own_row];
  }
  __device__ float channel(int c, int own_row) const { return c < grid.channels ? (*this)(c, own_row) : 0.0f; }
  __device__ float outer(int position, int own_row) const { return (*this)(grid.channels + position, own_row); }
  __device__ float column(int at, int own_row, float beyond) const {
    return at < grid.columns ? (*this)(grid.channels + grid.outer + at, own_row) : beyond;
  }

  // Leaves the coefficient of this thread's row, rounded, and what rounding took away as one of the feature once more.
  __device__ void store(int operand, float value) const {
    const int row = static_cast<int>(threadIdx.x);
    float* const place = memory.operands[operand] + row / 16 * 32 + row % 8 * 4 + row / 8 % 2;
    const float high = __uint_as_float(round_tf32(value));
    place[0] = high;
    place[2] = fabsf(high) == kInfinity ? 0.0f : value - high;
  }
  __device__ void store_channels() const {
    for (int c = 0; c < kMostChannels; ++c) store(c, channel(c, static_cast<int>(threadIdx.x)));
  }
  __device__ void store_outer(int first) const {
    const int thread = anew(static_cast<int>(threadIdx.x)), row = min(share.first_row + thread, grid.rows - 1);
    const int count = share.last - first;
    const float* entry = memory.entries + int64_t{grid.channels + first} * grid.rows + row;
    float value[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i, entry += grid.rows) value[i] = i < count ? *entry : 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) store(kMostChannels + i, value[i] * memory.factor[thread]);
  }
};

// The features of a strip's tokens at kChunk outer positions. A warp takes a tile row, a thread a column.
__device__ __forceinline__ void stage_features(const RowsTask& task, const Share& share, int strip, int first,
                                               float* features) {
  static_assert(kStripColumns == 32, "a lane to a column");
  const int thread = anew(static_cast<int>(threadIdx.x)), column = thread % 32, warp = thread / 32;
  const bool exists = strip + column / kColumns < task.grid.strips;
  const float* token = share.tile(task, exists ? strip + column / kColumns : strip, first + warp) + column % kColumns;
  float* target = features + warp * kTokenFloats + column;
#pragma unroll 1
  for (int left = min(share.last - first, kChunk) - warp; left > 0; left -= kWarps) {
    const float r = exists ? token[task.grid.channels * kColumns] : 1.0f;
#pragma unroll
    for (int f = 0; f < kExactFactor; ++f) {
      float value = f == kFactor ? r : f == kOne ? 1.0f : 0.0f;
      if (exists && f < task.grid.channels) value = token[f * kColumns];
      target[f * kFeatureStride] = __uint_as_float(round_tf32(value));
    }
    target[kExactFactor * kFeatureStride] = r;
    token += kWarps * task.grid.tile_floats(), target += kWarps * kTokenFloats;
  }
}

// --- the reference: of a thread's own row ---

// Its score of a token, -inf past the last column.
__device__ __forceinline__ float score(const RowsTask& task, const Entries& form, int column, int position) {
  const Grid& grid = task.grid;
  const int row = static_cast<int>(threadIdx.x);
  const float* token = form.share.tile(task, column / kColumns, position) + column % kColumns;
  float value = token[grid.channels * kColumns] * (form.outer(position, row) + form.column(column, row, -kInfinity));
#pragma unroll
  for (int c = 0; c < kMostChannels; ++c)
    if (c < grid.channels) value = fmaf(form.channel(c, row), token[c * kColumns], value);
  return value;
}

// A bound of its scores by interval arithmetic.
__device__ float score_bound(const RowsTask& task, const Share& share, const Entries& form) {
  const Grid& grid = task.grid;
  const int row = static_cast<int>(threadIdx.x), quantities = grid.channels + 1;
  float low = kInfinity, high = -kInfinity, column_low = kInfinity, column_high = -kInfinity;
#pragma unroll 8
  for (int position = share.first; position < share.last; ++position) {
    const float value = form.outer(position, row);
    low = fminf(low, value), high = fmaxf(high, value);
  }
  const int last_column = min(share.last_strip * kColumns, grid.columns);
#pragma unroll 8
  for (int column = share.first_strip * kColumns; column < last_column; ++column) {
    const float value = form.column(column, row, 0.0f);
    column_low = fminf(column_low, value), column_high = fmaxf(column_high, value);
  }
  low += column_low, high += column_high;
  const int64_t first_block = (int64_t{share.first_strip} * grid.outer + share.first) / kPackedTileRows;
  const int64_t last_block = ((share.last_strip - int64_t{1}) * grid.outer + share.last - 1) / kPackedTileRows + 1;
  const float* extents = task.extents + share.batch * grid.extent_blocks() * 2 * quantities;
  const float2 r = extent(extents + grid.channels, quantities, first_block, last_block);
  float bound = fmaxf(fmaxf(low * r.x, low * r.y), fmaxf(high * r.x, high * r.y));
  for (int c = 0; c < grid.channels; ++c) {
    const float2 x = extent(extents + c, quantities, first_block, last_block);
    bound += fmaxf(form.channel(c, row) * x.x, form.channel(c, row) * x.y);
  }
  return bound;
}

// A score that the row has, and where others may lie far above it, the largest.
__device__ float reference_of(const RowsTask& task, const Share& share, const Entries& form) {
  float largest = -kInfinity;
#pragma unroll 8
  for (int j = 0; j < kColumns; ++j)
    largest = fmaxf(largest, score(task, form, share.first_strip * kColumns + j, share.first));
  if (score_bound(task, share, form) <= largest + kLazyMargin) return largest;
#pragma unroll 1
  for (int column = share.first_strip * kColumns; column < share.last_strip * kColumns; ++column)
    for (int position = share.first; position < share.last; ++position)
      largest = fmaxf(largest, score(task, form, column, position));
  return largest;
}

// --- sums ---

// Where a thread is in its block: it has rows `row` and row + 8 of each tile of rows, two neighbouring columns of each
// tile of tokens, and the coefficients of one feature.
struct Lane {
  int group, quarter, warp, row;

  __device__ Lane() {
    const int thread = anew(static_cast<int>(threadIdx.x));
    group = thread % 32 / 4, quarter = thread % 4, warp = thread / 32, row = warp * kWarpRows + group;
  }
  // Whether some of its warp's rows exist.
  __device__ bool works(const RowsTask& task, const Share& share) const {
    return share.first_row + warp * kWarpRows < task.grid.padded_rows;
  }
  __device__ int column(int strip, int n, int e) const { return strip * kColumns + 8 * n + 2 * quarter + e % 2; }
  // Among a form's operands those of a channel, or of r, which follow the outer position.
  __device__ int operand() const { return min(quarter, kMostChannels) * kOperand + (warp * kRowTiles * 8 + group) * 4; }
  __device__ int operand_step() const { return quarter < kMostChannels ? 0 : kOperand; }
};

// What a lane has of a linear form besides the column table.
struct LaneForm {
  float constant[kRowTiles][2];
  uint32_t coefficients[kRowTiles][4];

  __device__ void load_constants(const FormMemory& memory, int row) {
    for (int m = 0; m < kRowTiles; ++m)
      for (int h = 0; h < 2; ++h) constant[m][h] = memory.constant[row + 16 * m + 8 * h];
  }
  __device__ void load_coefficients(const float* operand) {
    for (int m = 0; m < kRowTiles; ++m) {
      const uint4 four = reinterpret_cast<const uint4*>(operand)[8 * m];
      coefficients[m][0] = four.x, coefficients[m][1] = four.y, coefficients[m][2] = four.z,
      coefficients[m][3] = four.w;
    }
  }
  __device__ void at(float (&value)[4], const float (&table)[4], int m, const float2& r, float feature) const {
    for (int e = 0; e < 4; ++e) value[e] = fmaf(e % 2 ? r.y : r.x, table[e], constant[m][e / 2]);
    mma_tf32(value, coefficients[m], {__float_as_uint(feature), __float_as_uint(feature)});
  }
};

// A lane's share of a strip's table or marginal.
using Tile = float[kRowTiles][kTokenTiles][4];

__device__ __forceinline__ void load_table(Tile& table, const Entries& entries, int strip, float beyond) {
  const Lane lane;
  for (int m = 0; m < kRowTiles; ++m)
    for (int n = 0; n < kTokenTiles; ++n)
      for (int e = 0; e < 4; ++e)
        table[m][n][e] = entries.column(lane.column(strip, n, e), lane.row + 16 * m + e / 2 * 8, beyond);
}

// A table that waits in shared memory, each lane's share of it.
struct LaneTable {
  float2 (&pairs)[2 * kRowTiles * kTokenTiles][kThreads];

  __device__ void store(const Tile& table) const {
    for (int m = 0; m < kRowTiles; ++m)
      for (int n = 0; n < kTokenTiles; ++n)
        for (int h = 0; h < 2; ++h)
          pairs[(m * kTokenTiles + n) * 2 + h][threadIdx.x] = make_float2(table[m][n][2 * h], table[m][n][2 * h + 1]);
  }
  __device__ void load(float (&entries)[4], int m, int n) const {
    for (int h = 0; h < 2; ++h) {
      const float2 pair = pairs[(m * kTokenTiles + n) * 2 + h][threadIdx.x];
      entries[2 * h] = pair.x, entries[2 * h + 1] = pair.y;
    }
  }
};

// What a lane reads of a tile row of tokens: a feature of one token of each tile, as the operand of scores has it; r of
// its two columns; and, as the operand of sums has it, a feature of these two. For that operand's rows quarter and
// quarter + 4 are said to be tokens 2 quarter and 2 quarter + 1, whose weights the lane has: so none is exchanged.
// Nobody looks at the sums of features past the last.
struct LaneTokens {
  const float *feature, *factor, *summed;

  __device__ LaneTokens(const float* features, const Lane& lane)
      : feature(features + lane.quarter * kFeatureStride + lane.group),
        factor(features + kExactFactor * kFeatureStride + 2 * lane.quarter),
        summed(features + min(lane.group, kOne) * kFeatureStride + 2 * lane.quarter) {}
  __device__ static float2 pair(const float* at) { return *reinterpret_cast<const float2*>(at); }
  __device__ void next() { feature += kTokenFloats, factor += kTokenFloats, summed += kTokenFloats; }
};

// A strip's marginal to column_sums.
__device__ __forceinline__ void leave_marginal(const Tile& marginal, const RowsTask& task, const Share& share,
                                               int strip) {
  const Lane lane;
  if (!lane.works(task, share)) return;
  for (int n = 0; n < kTokenTiles; ++n)
    for (int e = 0; e < 4; ++e) {
      const int column = lane.column(strip, n, e);
      if (column >= task.grid.columns) continue;
      float* column_sum = share.column_sum(task, column) + share.first_row + lane.row + e / 2 * 8;
      for (int m = 0; m < kRowTiles; ++m) column_sum[16 * m] = marginal[m][n][e] * (1.0f / kMore);
    }
}

// The block's sums with features to its states.
__device__ __forceinline__ void leave_totals(const float (&totals)[4 * kRowTiles][kThreads], const RowsTask& task,
                                             const Share& share) {
  const Lane lane;
  if (!lane.works(task, share)) return;
  for (int m = 0; m < kRowTiles; ++m)
    for (int e = 0; e < 4; ++e) {
      const int feature = 2 * lane.quarter + e % 2;
      if (feature >= task.grid.channels && feature != kOne) continue;
      float* state = share.state(task, min(feature, task.grid.channels)) + share.first_row + lane.row;
      state[16 * m + e / 2 * 8] = totals[4 * m + e][threadIdx.x];
    }
}

// Adds a tile row's weights, backward dS, times r to the marginal of the columns, and times features to sums.
template <bool backward>
__device__ __forceinline__ void attend(const LaneTokens& tokens, const LaneForm& scores, const Tile& table,
                                       const LaneForm& upstream, const LaneTable& upstream_table, Tile& marginal,
                                       float (&sums)[kRowTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    const float feature = tokens.feature[8 * n];
    const float2 r = LaneTokens::pair(tokens.factor + 8 * n), summed = LaneTokens::pair(tokens.summed + 8 * n);
    for (int m = 0; m < kRowTiles; ++m) {
      float weight[4];
      scores.at(weight, table[m][n], m, r, feature);
      for (float& p : weight) p = exp2_approx(p);
      if (backward) {
        float entries[4], u[4];
        upstream_table.load(entries, m, n);
        upstream.at(u, entries, m, r, feature);
        for (int e = 0; e < 4; ++e) weight[e] *= u[e];
      }
      for (int e = 0; e < 4; ++e) marginal[m][n][e] = fmaf(e % 2 ? r.y : r.x, weight[e], marginal[m][n][e]);
      const uint32_t a[4] = {__float_as_uint(weight[0]), __float_as_uint(weight[2]), __float_as_uint(weight[1]),
                             __float_as_uint(weight[3])};
      mma_tf32(sums[m], a, {__float_as_uint(summed.x), __float_as_uint(summed.y)});
    }
  }
}

// Forward, sums of p = 2^(score - reference); backward, of dS = p (r u - delta). The block's states: acc, the sum of p,
// the same again, the reference.
template <bool backward>
__device__ __forceinline__ void sum_products(const RowsTask& task) {
  BlockMemory& memory = *shared_memory<BlockMemory>();
  const Grid& grid = task.grid;
  const Share& share = memory.share;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    memory.share = Share(task, kRows);
    memory.form.entries = task.form + share.batch * grid.form_batch;
    if (backward) memory.upstream.entries = task.upstream + int64_t{share.batch} * grid.entries() * grid.rows;
  }
  __syncthreads();
  const Entries form{share, grid, memory.form}, upstream{share, grid, memory.upstream};
  const LaneTable upstream_table{memory.upstream_table};
  memory.form.factor[thread] = kLog2E;
  form.store_channels();
  if (backward) {
    const int64_t row = min(share.first_row + thread, grid.rows - 1);
    const float* statistics = task.statistics + int64_t{share.batch} * 4 * grid.padded_rows + row;
    memory.form.constant[thread] = kMoreLog2 - statistics[0];
    memory.upstream.factor[thread] = statistics[grid.padded_rows];
    memory.upstream.constant[thread] = -statistics[2 * grid.padded_rows];
    upstream.store_channels();
  } else {
    const float reference = reference_of(task, share, form);
    const int row = share.first_row + thread;
    // A row that has only scores of -inf: its weights are 2^-inf = 0, not 2^(-inf + inf).
    memory.form.constant[thread] = reference == -kInfinity ? 0.0f : kMoreLog2 - reference;
    if (row < grid.padded_rows) share.state(task, grid.channels + 2)[row] = reference;
  }
  for (float (&total)[kThreads] : memory.totals) total[thread] = 0.0f;
  __syncthreads();

  for (int strip = share.first_strip; strip < share.last_strip; strip += kStripTiles) {
    Tile table, marginal = {};
    if (backward) {
      load_table(table, upstream, strip, 0.0f);
      upstream_table.store(table);
    }
    load_table(table, form, strip, -kInfinity);
    for (int first = share.first; first < share.last; first += kChunk) {
      __syncthreads();
      stage_features(task, share, strip, first, memory.features);
      form.store_outer(first);
      if (backward) upstream.store_outer(first);
      __syncthreads();
      const Lane lane;
      if (!lane.works(task, share)) continue;
      LaneForm scores, u;
      scores.load_constants(memory.form, lane.row);
      if (backward) u.load_constants(memory.upstream, lane.row);
      LaneTokens tokens(memory.features, lane);
      const float* operands = memory.form.operands[0] + lane.operand();
      const int operand_step = lane.operand_step();
      float* outer_sum = share.outer_sum(task, first) + share.first_row + lane.row;
      const bool has_outer_sum = lane.quarter == kFactor / 2;
      float sums[kRowTiles][4] = {};
#pragma unroll 1
      for (int left = min(share.last - first, kChunk); left > 0; --left) {
        // The sums with r of this position go on from where the last strip left them.
        if (has_outer_sum)
          for (int m = 0; m < kRowTiles; ++m)
            for (int h = 0; h < 2; ++h)
              sums[m][2 * h + kFactor % 2] = strip > share.first_strip ? outer_sum[16 * m + 8 * h] : 0.0f;
        scores.load_coefficients(operands);
        if (backward) u.load_coefficients(operands + (memory.upstream.operands[0] - memory.form.operands[0]));
        attend<backward>(tokens, scores, table, u, upstream_table, marginal, sums);
        if (has_outer_sum)
          for (int m = 0; m < kRowTiles; ++m)
            for (int h = 0; h < 2; ++h) outer_sum[16 * m + 8 * h] = sums[m][2 * h + kFactor % 2];
        tokens.next(), operands += operand_step, outer_sum += grid.padded_rows;
      }
      for (int m = 0; m < kRowTiles; ++m)
        for (int e = 0; e < 4; ++e) memory.totals[4 * m + e][thread] += sums[m][e];
    }
    leave_marginal(marginal, task, share, strip);
  }
  leave_totals(memory.totals, task, share);
}

__global__ void __launch_bounds__(kThreads, 3) separable_attention_fwd_tensor_cores_kernel(RowsTask task) {
  sum_products<false>(task);
}

__global__ void __launch_bounds__(kThreads, 3) separable_attention_bwd_rows_tensor_cores_kernel(RowsTask task) {
  sum_products<true>(task);
}

// --- launching ---

constexpr Division kDivision = {kRows, kStripTiles, 1000.0};

Status run_products(void (*kernel)(RowsTask), size_t shared, const SeparableCall& call, const RowsTask& task,
                    Stream stream) {
  const Status packed = pack(call, task.grid, const_cast<float*>(task.tiles), const_cast<float*>(task.extents), stream);
  if (packed.code != 0) return packed;
  const int64_t blocks = task.grid.batch * ceil_div(task.grid.rows, kRows) * task.split.slots();
  return launch(kernel, blocks, kThreads, shared, stream, task);
}

}  // namespace

int64_t separable_attention_tensor_cores_workspace(const SeparableCall& call, int multiprocessors) {
  const Grid grid = grid_of(call);
  const Workspace sizes(grid, split_for_products(grid, multiprocessors, kDivision));
  return sizes.tiles + sizes.extents + sizes.partials;
}

Status separable_attention_fwd_tensor_cores(const SeparableCall& call, int multiprocessors, const TensorView& workspace,
                                            const TensorView& sums, const TensorView& lse, const TensorView& total,
                                            Stream stream) {
  const Grid grid = grid_of(call);
  const RowsTask task = task_of(call, grid, split_for_products(grid, multiprocessors, kDivision), workspace);
  const Status status =
      run_products(separable_attention_fwd_tensor_cores_kernel, sizeof(ForwardMemory), call, task, stream);
  if (status.code != 0) return status;
  return merge(task, sums.as<float>(), lse.as<double>(), total.as<float>(), 1, stream);
}

Status separable_attention_bwd_rows_tensor_cores(const SeparableCall& call, int multiprocessors,
                                                 const TensorView& workspace, const TensorView& d_sums,
                                                 const TensorView& statistics, const TensorView& d_form,
                                                 Stream stream) {
  const Grid grid = grid_of(call);
  RowsTask task = task_of(call, grid, split_for_products(grid, multiprocessors, kDivision), workspace);
  task.upstream = d_sums.as<const float>();
  task.statistics = statistics.as<const float>();
  const Status status =
      run_products(separable_attention_bwd_rows_tensor_cores_kernel, sizeof(BlockMemory), call, task, stream);
  if (status.code != 0) return status;
  return merge(task, d_form.as<float>(), nullptr, nullptr, call.form.size(0) == 1 ? grid.batch : 1, stream);
}

}  // namespace cuda
}  // namespace pk
