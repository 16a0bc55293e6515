// The other half of separable attention's backward on a GPU: gradients of the tokens, x and r, where they are wanted
// (docs/separable_attention.md). Threads own tokens and stream over rows, whose forms a block lays out in shared
// memory, each entry beside its upstream gradient. Where tokens are few, the rows are split and a second kernel adds.
#include <algorithm>

#include "elements.h"
#include "launch.h"
#include "philox.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kMaxOuterAxes = 3;
constexpr float kLog2E = 1.44269504088896340736f;
// In d_r a form below this counts as this: a weight of 0 times a form of -inf is 0.
constexpr float kLeastForm = -1e25f;

// A few channels stay in a thread's registers; this kernel knows no dropout.
constexpr int kFewChannels = 4, kThreads = 256, kStagedRows = 32;
// Any number of channels, and dropout.
constexpr int kManyTokens = 64, kManyRows = 16, kManyWarps = 8;

// How the tokens are divided among blocks: strips of columns times bands of outer positions, and splits of the rows.
struct TokensPlan {
  bool few;                // which of the two kernels
  int positions, columns;  // of a block
  int lanes;               // threads that share the columns of a block
  int threads;
  int64_t strips, bands, splits, split_rows;
  int row_pairs;  // of a staged row

  int64_t tiles() const { return strips * bands; }
};

struct TokensStrides {
  int64_t batch = 0, outer[kMaxOuterAxes] = {}, column = 0;
};

struct TokensCall {
  const float *form, *d_sums, *statistics, *r;
  const void* x;
  const uint8_t* mask;
  float* partials;  // (splits, elements of d_x), then (splits, elements of d_r); null where there is one split
  void* d_x;        // either is null where it is not wanted
  float* d_r;
  DType dtype;
  int channels, outer_axes;
  int64_t batches, form_batch, rows, padded_rows, outer, columns, outer_table;
  int64_t sizes[kMaxOuterAxes];
  int64_t x_channel;
  TokensStrides of_x, of_r, of_mask;
  bool with_dropout;
  DropoutRule dropout{{}};
  TokensPlan plan;

  __device__ int64_t entries() const { return channels + outer_table + columns; }
};

// Which tokens and rows a block does.
struct Window {
  int64_t batch, split, position, column, first_row, last_row;
};

constexpr int kWindowPairs = sizeof(Window) / sizeof(float2);

__device__ Window find_window(const TokensCall& call) {
  int64_t place = blockIdx.x;
  const int64_t strip = place % call.plan.strips;
  place /= call.plan.strips;
  const int64_t band = place % call.plan.bands;
  place /= call.plan.bands;
  const int64_t split = place % call.plan.splits, first = split * call.plan.split_rows;
  return {place / call.plan.splits,  split, band * call.plan.positions,
          strip * call.plan.columns, first, min(first + call.plan.split_rows, call.rows)};
}

// The block's, kept in shared memory: registers are for tokens.
__device__ const Window& window_of(const TokensCall& call) {
  Window* window = shared_memory<Window>();
  if (threadIdx.x == 0) *window = find_window(call);
  __syncthreads();
  return *window;
}

// Where an outer position stands on each outer axis; sizes beyond the last of them are 1.
struct OuterIndex {
  int64_t at[kMaxOuterAxes];

  __device__ OuterIndex(const TokensCall& call, int64_t position) {
    at[2] = position % call.sizes[2];
    at[1] = position / call.sizes[2] % call.sizes[1];
    at[0] = position / call.sizes[2] / call.sizes[1];
  }

  __device__ int64_t offset(const TokensStrides& strides, int64_t batch, int64_t column) const {
    return batch * strides.batch + at[0] * strides.outer[0] + at[1] * strides.outer[1] + at[2] * strides.outer[2] +
           column * strides.column;
  }
};

__device__ float load_data(const TokensCall& call, int64_t at) {
  switch (call.dtype) {
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(call.x)[at]);
    case DType::float16:
      return to_float(static_cast<const Float16*>(call.x)[at]);
    case DType::uint8:
      return to_float(static_cast<const uint8_t*>(call.x)[at]);
    default:
      return static_cast<const float*>(call.x)[at];
  }
}

__device__ void store_gradient(const TokensCall& call, int64_t at, float value) {
  switch (call.dtype) {
    case DType::bfloat16:
      static_cast<BFloat16*>(call.d_x)[at] = from_float<BFloat16>(value);
      break;
    case DType::float16:
      static_cast<Float16*>(call.d_x)[at] = from_float<Float16>(value);
      break;
    default:
      static_cast<float*>(call.d_x)[at] = value;
  }
}

__device__ int64_t gradient_elements(const TokensCall& call) {
  return call.d_x ? call.batches * call.outer * call.columns * call.channels : 0;
}

// A token's gradients, the sums over a block's rows: final, or one of the partial sums.
struct TokenGradients {
  const TokensCall& call;
  int64_t split, token;  // the latter counted over the batch
  float factor, keep;

  __device__ TokenGradients(const TokensCall& call, const Window& window, int64_t position, int64_t column)
      : call(call), split(window.split), token((window.batch * call.outer + position) * call.columns + column) {
    const OuterIndex index(call, position);
    keep = !call.mask || call.mask[index.offset(call.of_mask, window.batch, column)];
    factor = call.r ? call.r[index.offset(call.of_r, window.batch, column)] : 1.0f;
  }

  __device__ void store_x(int channel, float sum) const {
    if (!call.d_x) return;
    const int64_t at = token * call.channels + channel;
    const float value = keep ? factor * sum : 0.0f;
    if (!call.partials) return store_gradient(call, at, value);
    call.partials[split * gradient_elements(call) + at] = value;
  }

  __device__ void store_r(float sum) const {
    if (!call.d_r) return;
    const float value = keep ? sum : 0.0f;
    const int64_t tokens = call.batches * call.outer * call.columns;
    float* target =
        call.partials ? call.partials + call.plan.splits * gradient_elements(call) + split * tokens : call.d_r;
    target[token] = value;
  }
};

// --- rows in shared memory -------------------------------------------------------------------------------------------

// A staged row is made of pairs, an entry of the form and of the upstream gradient: the channels, (-reference, -delta),
// padding to an even number; then the block's outer positions, the sum of the outer tables of each; then its columns.
constexpr int leading_pairs(int channels) { return (channels + 2) / 2 * 2; }

// The entries of the block's outer positions in the stacked tables of the outer axes, axis after axis; -1: outside.
__device__ void stage_entries(const TokensCall& call, const Window& window, int* entries) {
  for (int i = static_cast<int>(threadIdx.x); i < call.plan.positions; i += static_cast<int>(blockDim.x)) {
    const int64_t position = window.position + i;
    const OuterIndex index(call, position);
    int64_t first = 0;
    for (int axis = 0; axis < kMaxOuterAxes; ++axis) {
      if (axis == call.outer_axes) break;
      entries[axis * call.plan.positions + i] = position < call.outer ? static_cast<int>(first + index.at[axis]) : -1;
      first += call.sizes[axis];
    }
  }
}

// Rows from first_row on, fewer than staged_rows at the end. What rounding took from the reference multiplies the
// upstream gradients.
template <int staged_rows>
__device__ void stage_rows(const TokensCall& call, const Window& window, int64_t first_row, const int* entries,
                           float2* staged) {
  const int slot = static_cast<int>(threadIdx.x) % staged_rows, step = static_cast<int>(blockDim.x) / staged_rows;
  const int64_t row = first_row + slot;
  if (row >= window.last_row) return;
  const float* form = call.form + window.batch * call.form_batch + row;
  const float* upstream = call.d_sums + window.batch * call.entries() * call.rows + row;
  const float* statistics = call.statistics + window.batch * 4 * call.padded_rows + row;
  const float factor = statistics[call.padded_rows];
  const auto pair = [&](int64_t entry) {
    return make_float2(form[entry * call.rows], factor * upstream[entry * call.rows]);
  };

  const int channels = call.channels, leading = leading_pairs(channels), positions = call.plan.positions;
  const int outer = call.outer_axes ? positions : 0;
  float2* target = staged + slot * call.plan.row_pairs;
  for (int i = static_cast<int>(threadIdx.x) / staged_rows; i < leading + outer + call.plan.columns; i += step) {
    float2 value = make_float2(0.0f, 0.0f);
    if (i >= leading + outer) {
      const int64_t column = window.column + i - leading - outer;
      if (column < call.columns) value = pair(channels + call.outer_table + column);
    } else if (i >= leading) {
      for (int axis = 0; axis < call.outer_axes; ++axis) {
        const int entry = entries[axis * positions + i - leading];
        const float2 term = entry < 0 ? value : pair(channels + entry);
        value.x += term.x, value.y += term.y;
      }
    } else if (i == channels) {
      value = make_float2(-statistics[0], -statistics[2 * call.padded_rows]);
    } else if (i < channels) {
      value = pair(i);
    }
    target[i] = value;
  }
}

// --- few channels ----------------------------------------------------------------------------------------------------

// Some pairs, two to a load.
template <int pairs>
__device__ __forceinline__ void load_pairs(float2 (&values)[pairs], const float2* staged) {
  static_assert(pairs % 2 == 0, "loads are of two");
  for (int i = 0; i < pairs; i += 2) {
    const float4 two = *reinterpret_cast<const float4*>(staged + i);
    values[i] = make_float2(two.x, two.y);
    values[i + 1] = make_float2(two.z, two.w);
  }
}

template <int channels, int positions, int columns>
struct OwnTokens {
  float data[positions][columns][channels], d_data[positions][columns][channels];
  float factor[positions][columns], log2_factor[positions][columns], d_factor[positions][columns];
};

// A thread owns `columns` neighbouring columns at `positions` neighbouring outer positions. One position: the grid has
// no outer axis.
template <int channels, int positions, int columns, bool needs_r>
__global__ void __launch_bounds__(kThreads, 2) separable_attention_bwd_tokens_kernel(TokensCall call) {
  const Window& window = window_of(call);
  float2* staged = shared_memory<float2>() + kWindowPairs;
  int* entries = reinterpret_cast<int*>(staged + kStagedRows * call.plan.row_pairs);
  // Threads beyond the last band stage rows, and do again what the first ones do.
  const int lane = static_cast<int>(threadIdx.x) % call.plan.lanes;
  const int band = static_cast<int>(threadIdx.x) / call.plan.lanes * positions % call.plan.positions;

  OwnTokens<channels, positions, columns> own{};
  for (int i = 0; i < positions; ++i) {
    const int64_t position = window.position + band + i;
    const OuterIndex index(call, position);
    for (int j = 0; j < columns; ++j) {
      const int64_t column = window.column + lane * columns + j;
      if (position >= call.outer || column >= call.columns) continue;
      const int64_t at = index.offset(call.of_x, window.batch, column);
      for (int c = 0; c < channels; ++c) own.data[i][j][c] = load_data(call, at + c * call.x_channel);
      own.factor[i][j] = call.r ? call.r[index.offset(call.of_r, window.batch, column)] : 1.0f;
      own.log2_factor[i][j] = own.factor[i][j] * kLog2E;
    }
  }

  stage_entries(call, window, entries);
  constexpr int leading = leading_pairs(channels);
  const float2* of_positions = staged + leading + band;
  const float2* of_columns = staged + leading + (positions > 1 ? call.plan.positions : 0) + lane * columns;
  for (int64_t first = window.first_row; first < window.last_row; first += kStagedRows) {
    __syncthreads();
    stage_rows<kStagedRows>(call, window, first, entries, staged);
    __syncthreads();
    const int rows = static_cast<int>(min(window.last_row - first, int64_t{kStagedRows}));
#pragma unroll 2
    for (int row = 0; row < rows; ++row) {
      const int at = row * call.plan.row_pairs;
      float2 form[leading], outer[positions] = {}, table[columns];
      load_pairs(form, staged + at);
      if constexpr (positions > 1) load_pairs(outer, of_positions + at);
      load_pairs(table, of_columns + at);
      for (int i = 0; i < positions; ++i) {
        for (int j = 0; j < columns; ++j) {
          float scores = outer[i].x + table[j].x, u = outer[i].y + table[j].y;
          for (int c = 0; c < channels; ++c) {
            scores = fmaf(form[c].x, own.data[i][j][c], scores);
            u = fmaf(form[c].y, own.data[i][j][c], u);
          }
          const float p = exp2_approx(fmaf(own.log2_factor[i][j], scores, form[channels].x));
          const float slope = fmaf(own.factor[i][j], u, form[channels].y);  // dS = p slope
          for (int c = 0; c < channels; ++c)
            own.d_data[i][j][c] = fmaf(p, fmaf(slope, form[c].x, form[c].y), own.d_data[i][j][c]);
          if constexpr (needs_r)
            own.d_factor[i][j] = fmaf(p, fmaf(slope, fmaxf(scores, kLeastForm), u), own.d_factor[i][j]);
        }
      }
    }
  }

  if (static_cast<int>(threadIdx.x) / call.plan.lanes * positions >= call.plan.positions) return;
  for (int i = 0; i < positions; ++i) {
    const int64_t position = window.position + band + i;
    for (int j = 0; j < columns; ++j) {
      const int64_t column = window.column + lane * columns + j;
      if (position >= call.outer || column >= call.columns) continue;
      const TokenGradients token(call, window, position, column);
      for (int c = 0; c < channels; ++c) token.store_x(c, own.d_data[i][j][c]);
      if constexpr (needs_r) token.store_r(own.d_factor[i][j]);
    }
  }
}

// --- many channels, and dropout --------------------------------------------------------------------------------------

// A lane has two neighbouring tokens. A warp does some rows' weights and dS; all of them, by way of shared memory, give
// each warp the sums of its own channels.
template <int own_channels>
__global__ void __launch_bounds__(32 * kManyWarps, 2) separable_attention_bwd_many_tokens_kernel(TokensCall call) {
  constexpr int kRowsOfWarp = kManyRows / kManyWarps;
  const int row_pairs = call.plan.row_pairs, channels = call.channels;
  const Window& window = window_of(call);
  float2* staged = shared_memory<float2>() + kWindowPairs;
  float2* weights = staged + kManyRows * row_pairs;  // (rows, tokens): dS and w / r
  float2* data = weights + kManyRows * kManyTokens;  // (channels, lanes): of two tokens
  float2* d_factors = data + channels * 32;          // (warps, lanes)
  int* entries = reinterpret_cast<int*>(d_factors + kManyWarps * 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int band = 2 * lane / call.plan.columns, strip_column = 2 * lane % call.plan.columns;
  const int64_t position = window.position + band, column = window.column + strip_column;
  const bool there = position < call.outer;
  const bool both[2] = {there && column < call.columns, there && column + 1 < call.columns};

  const OuterIndex index(call, position);
  float2 factor = make_float2(1.0f, 1.0f), d_factor = make_float2(0.0f, 0.0f);
  if (call.r && both[0]) factor.x = call.r[index.offset(call.of_r, window.batch, column)];
  if (call.r && both[1]) factor.y = call.r[index.offset(call.of_r, window.batch, column + 1)];
  const int64_t at_x = index.offset(call.of_x, window.batch, column);
  for (int c = warp; c < channels; c += kManyWarps) {
    const int64_t at = at_x + c * call.x_channel;
    data[c * 32 + lane] =
        make_float2(both[0] ? load_data(call, at) : 0.0f, both[1] ? load_data(call, at + call.of_x.column) : 0.0f);
  }
  stage_entries(call, window, entries);

  const int leading = leading_pairs(channels);
  const float2* of_columns = staged + leading + (call.outer_axes ? call.plan.positions : 0) + strip_column;
  float2 d_data[own_channels] = {};
  for (int64_t first = window.first_row; first < window.last_row; first += kManyRows) {
    __syncthreads();
    stage_rows<kManyRows>(call, window, first, entries, staged);
    __syncthreads();
    const int rows = static_cast<int>(min(window.last_row - first, int64_t{kManyRows}));
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = warp * kRowsOfWarp + i;
      if (row >= rows) break;
      const float2* form = staged + row * row_pairs;
      const float2 outer = call.outer_axes ? form[leading + band] : make_float2(0.0f, 0.0f);
      // A long sum of channels loses less to rounding apart from what may be large.
      float scores[2] = {}, u[2] = {};
      for (int c = 0; c < channels; ++c) {
        const float2 x = data[c * 32 + lane], channel = form[c];
        scores[0] = fmaf(channel.x, x.x, scores[0]), scores[1] = fmaf(channel.x, x.y, scores[1]);
        u[0] = fmaf(channel.y, x.x, u[0]), u[1] = fmaf(channel.y, x.y, u[1]);
      }
      for (int j = 0; j < 2; ++j) {
        const float2 table = of_columns[row * row_pairs + j];
        scores[j] += outer.x + table.x, u[j] += outer.y + table.y;
      }
      const float minus_reference = form[channels].x, minus_delta = form[channels].y;
      const float total = call.statistics[(window.batch * 4 + 3) * call.padded_rows + first + row];
      float d_factors_of_row[2];
      for (int j = 0; j < 2; ++j) {
        const float r = j ? factor.y : factor.x, p = exp2_approx(fmaf(r * kLog2E, scores[j], minus_reference));
        const float scale = call.with_dropout
                                ? keep_scale(call.dropout, static_cast<uint32_t>(window.batch),
                                             static_cast<uint32_t>(first + row), position * call.columns + column + j)
                                : 1.0f;
        const float kept = p * scale, d_scores = fmaf(kept, fmaf(r, u[j], total), p * minus_delta);
        weights[row * kManyTokens + 2 * lane + j] = make_float2(d_scores, kept);
        d_factors_of_row[j] = fmaf(d_scores, fmaxf(scores[j], kLeastForm), kept * u[j]);
      }
      d_factor.x += d_factors_of_row[0], d_factor.y += d_factors_of_row[1];
    }
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      const float4 two = reinterpret_cast<const float4*>(weights + row * kManyTokens)[lane];
      const float2* form = staged + row * row_pairs + warp * own_channels;
      for (int c = 0; c < own_channels; ++c) {
        if (warp * own_channels + c >= channels) break;
        const float2 channel = form[c];
        d_data[c].x = fmaf(two.x, channel.x, fmaf(two.y, channel.y, d_data[c].x));
        d_data[c].y = fmaf(two.z, channel.x, fmaf(two.w, channel.y, d_data[c].y));
      }
    }
  }

  d_factors[warp * 32 + lane] = d_factor;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (!both[j]) continue;
    const TokenGradients token(call, window, position, column + j);
    for (int c = 0; c < own_channels; ++c)
      if (warp * own_channels + c < channels) token.store_x(warp * own_channels + c, j ? d_data[c].y : d_data[c].x);
    if (warp > 0) continue;
    float sum = 0.0f;
    for (int i = 0; i < kManyWarps; ++i) sum += j ? d_factors[i * 32 + lane].y : d_factors[i * 32 + lane].x;
    token.store_r(sum);
  }
}

// --- second stage ----------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) separable_attention_bwd_tokens_sum_kernel(TokensCall call) {
  const int64_t of_x = gradient_elements(call), of_r = call.d_r ? call.batches * call.outer * call.columns : 0;
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (element >= of_x + of_r) return;
  const bool is_x = element < of_x;
  const float* partials = is_x ? call.partials + element : call.partials + call.plan.splits * of_x + (element - of_x);
  float sum = 0.0f;
  for (int64_t split = 0; split < call.plan.splits; ++split) sum += partials[split * (is_x ? of_x : of_r)];
  if (is_x)
    store_gradient(call, element, sum);
  else
    call.d_r[element - of_x] = sum;
}

// --- launching -------------------------------------------------------------------------------------------------------

int64_t multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// As pairs that a row of the stage takes: a multiple of 2 for the loads, an odd one for the stores.
int row_pairs(int channels, int positions, int columns) {
  return (leading_pairs(channels) + positions + columns + 1) / 2 / 2 * 4 + 2;
}

// Outer positions of a thread: as many as registers hold.
constexpr int own_positions(int channels) { return channels < 4 ? 4 : 2; }

// The block's share of the grid for which the kernel's instructions are fewest, all blocks together.
TokensPlan few_channels_plan(int64_t outer, int64_t columns, int channels, bool one_axis) {
  constexpr int64_t kInstructionsPerPair = 21, kInstructionsPerStagedPair = 12, kMostRowPairs = 250, kMostColumns = 192;
  const int64_t of_positions = one_axis ? 1 : own_positions(channels), own_columns = one_axis ? 4 : 2;
  TokensPlan best{};
  int64_t least = -1;
  const int64_t lanes_in_all = ceil_div(columns, own_columns);
  for (int64_t fewest = ceil_div(columns, kMostColumns), strips = fewest; strips < fewest + 8; ++strips) {
    const int64_t lanes = ceil_div(lanes_in_all, strips);
    for (int64_t bands = 1; bands * lanes <= kThreads; ++bands) {
      const int64_t threads = ceil_div(bands * lanes, 32) * 32, positions = bands * of_positions;
      const int pairs = row_pairs(channels, static_cast<int>(positions), static_cast<int>(lanes * own_columns));
      if (pairs > kMostRowPairs) break;
      const int64_t of_thread = of_positions * own_columns * kInstructionsPerPair;
      const int64_t tiles = strips * ceil_div(outer, positions);
      const int64_t cost = tiles * (threads * of_thread + pairs * kInstructionsPerStagedPair);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      best = {true,
              static_cast<int>(positions),
              static_cast<int>(lanes * own_columns),
              static_cast<int>(lanes),
              static_cast<int>(threads),
              strips,
              ceil_div(outer, positions),
              1,
              0,
              pairs};
    }
  }
  return best;
}

TokensPlan many_channels_plan(int64_t outer, int64_t columns, int channels, bool one_axis) {
  const int of_block = one_axis ? kManyTokens : kManyTokens / 4, positions = kManyTokens / of_block;
  return {false,
          positions,
          of_block,
          32,
          32 * kManyWarps,
          ceil_div(columns, of_block),
          ceil_div(outer, positions),
          1,
          0,
          row_pairs(channels, positions, of_block)};
}

// Splits the rows where blocks are too few for all multiprocessors, or leave many of them idle at the end.
void split_rows(TokensPlan& plan, int64_t batches, int64_t rows) {
  constexpr int64_t kMostSplits = 32, kLeastRows = 16, kThreadsOfMultiprocessor = 512;
  constexpr int64_t kOverhead = 16;  // of a block, in rows; and as much for partial sums
  const int64_t at_once = multiprocessors() * (kThreadsOfMultiprocessor / plan.threads);
  int64_t least = -1;
  for (int64_t splits = 1; splits <= kMostSplits && (splits == 1 || (splits - 1) * kLeastRows < rows); ++splits) {
    const int64_t split_rows = ceil_div(rows, splits);
    const int64_t cost =
        ceil_div(plan.tiles() * batches * splits, at_once) * (split_rows + kOverhead + (splits > 1 ? kOverhead : 0));
    if (least >= 0 && cost >= least) continue;
    least = cost;
    plan.splits = ceil_div(rows, split_rows);
    plan.split_rows = split_rows;
  }
}

TokensPlan plan_of(const SeparableCall& tokens) {
  const TensorView& x = tokens.x;
  const int axes = x.dims - 2, channels = static_cast<int>(x.size(-1));
  int64_t outer = 1;
  for (int axis = 1; axis < axes; ++axis) outer *= x.size(axis);
  const bool few = channels <= kFewChannels && tokens.dropout.p == 0.0;
  const int64_t columns = x.size(axes);
  TokensPlan plan = few ? few_channels_plan(outer, columns, channels, axes == 1)
                        : many_channels_plan(outer, columns, channels, axes == 1);
  split_rows(plan, x.size(0), tokens.form.size(2));
  return plan;
}

size_t shared_bytes(const TokensCall& call) {
  const auto rows = static_cast<size_t>(call.plan.few ? kStagedRows : kManyRows);
  const size_t pairs = rows * static_cast<size_t>(call.plan.row_pairs);
  const size_t of_many = static_cast<size_t>(kManyRows * kManyTokens + (call.channels + kManyWarps) * 32);
  const auto entries = static_cast<size_t>(call.outer_axes * call.plan.positions);
  return (kWindowPairs + pairs + (call.plan.few ? 0 : of_many)) * sizeof(float2) + entries * sizeof(int);
}

using TokensKernel = void (*)(TokensCall);

template <int channels>
TokensKernel few_channels_kernel(const TokensCall& call) {
  constexpr int positions = own_positions(channels);
  if (call.outer_axes == 0)
    return call.d_r ? separable_attention_bwd_tokens_kernel<channels, 1, 4, true>
                    : separable_attention_bwd_tokens_kernel<channels, 1, 4, false>;
  return call.d_r ? separable_attention_bwd_tokens_kernel<channels, positions, 2, true>
                  : separable_attention_bwd_tokens_kernel<channels, positions, 2, false>;
}

TokensKernel kernel_of(const TokensCall& call) {
  if (!call.plan.few) {
    if (call.channels <= kManyWarps) return separable_attention_bwd_many_tokens_kernel<1>;
    if (call.channels <= 4 * kManyWarps) return separable_attention_bwd_many_tokens_kernel<4>;
    return separable_attention_bwd_many_tokens_kernel<16>;
  }
  switch (call.channels) {
    case 1:
      return few_channels_kernel<1>(call);
    case 2:
      return few_channels_kernel<2>(call);
    case 3:
      return few_channels_kernel<3>(call);
    default:
      return few_channels_kernel<4>(call);
  }
}

TokensStrides strides_of(const TensorView& view, int axes) {
  TokensStrides strides;
  if (!view.defined()) return strides;
  strides.batch = view.stride(0), strides.column = view.stride(axes);
  for (int axis = 0; axis < axes - 1; ++axis) strides.outer[axis] = view.stride(1 + axis);
  return strides;
}

}  // namespace

int64_t separable_attention_bwd_tokens_workspace(const SeparableCall& tokens, bool needs_x, bool needs_r) {
  const int64_t splits = plan_of(tokens).splits;
  if (splits == 1) return 0;
  int64_t of_token = (needs_x ? tokens.x.size(-1) : 0) + (needs_r ? 1 : 0);
  for (int dim = 0; dim < tokens.x.dims - 1; ++dim) of_token *= tokens.x.size(dim);
  return splits * of_token;
}

Status separable_attention_bwd_tokens(const SeparableCall& tokens, const TensorView& workspace,
                                      const TensorView& d_sums, const TensorView& statistics, const TensorView& d_x,
                                      const TensorView& d_r, Stream stream) {
  const TensorView& x = tokens.x;
  const int axes = x.dims - 2;
  TokensCall call{};
  call.form = tokens.form.as<float>(), call.d_sums = d_sums.as<float>(), call.statistics = statistics.as<float>();
  call.x = x.data, call.r = tokens.r.as<float>(), call.mask = tokens.mask.as<uint8_t>();
  call.d_x = d_x.data, call.d_r = d_r.as<float>();
  call.dtype = x.dtype;
  call.channels = static_cast<int>(x.size(-1));
  call.outer_axes = axes - 1;
  call.batches = x.size(0), call.rows = tokens.form.size(2), call.padded_rows = statistics.size(-1);
  call.form_batch = tokens.form.size(0) == 1 ? 0 : tokens.form.size(1) * call.rows;
  call.outer = 1, call.columns = x.size(axes);
  std::fill(call.sizes, call.sizes + kMaxOuterAxes, 1);
  call.x_channel = x.stride(-1);
  call.of_x = strides_of(x, axes), call.of_r = strides_of(tokens.r, axes), call.of_mask = strides_of(tokens.mask, axes);
  call.with_dropout = tokens.dropout.p > 0.0, call.dropout = DropoutRule(tokens.dropout);
  call.plan = plan_of(tokens);
  call.partials = call.plan.splits > 1 ? workspace.as<float>() : nullptr;
  for (int axis = 0; axis < call.outer_axes; ++axis) {
    call.sizes[axis] = x.size(1 + axis);
    call.outer *= call.sizes[axis];
    call.outer_table += call.sizes[axis];
  }
  const int64_t blocks = call.plan.tiles() * call.batches * call.plan.splits;
  const Status status = launch(kernel_of(call), blocks, call.plan.threads, shared_bytes(call), stream, call);
  if (status.code != 0 || call.plan.splits == 1) return status;
  const int64_t elements =
      call.batches * call.outer * call.columns * ((d_x.defined() ? call.channels : 0) + d_r.defined());
  return launch(separable_attention_bwd_tokens_sum_kernel, ceil_div(elements, kThreads), kThreads, 0, stream, call);
}

}  // namespace cuda
}  // namespace pk
