// separable_query_attention on a GPU, docs/separable_attention.md: softmax attention of queries on a grid, whose scores
// are sums of one table entry per axis and a dot product of data channels.
//
// A query's outer position is that in all axes but the last, the columns. A form is [B|1, H, entries, N]: the data
// channels' entries, the outer tables', the columns'. Scores are in powers of two.
#include <cfloat>

#include "launch.h"
#include "philox.h"
#include "separable_query_tiles.h"

namespace pk {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMaxOuterAxes = 3;

struct Call {
  const float *form, *bias, *x, *r;
  int64_t form_batch, bias_batch, x_batch, x_query, x_channel, r_batch;  // 0 where the batch shares one
  int keys, heads, head_dim, outers, columns, channels, entries, outer_axes;
  int sizes[kMaxOuterAxes];  // of the outer axes, the last of them first
  bool aligned_form, aligned_rows, drops;
  DropoutRule dropout;

  explicit Call(const SeparableQueryInputs& in);
};

int64_t batch_stride(const TensorView& tensor) { return tensor.defined() && tensor.size(0) > 1 ? tensor.stride(0) : 0; }

Call::Call(const SeparableQueryInputs& in)
    : form(in.form.as<float>()),
      bias(in.bias.as<float>()),
      x(in.x.as<float>()),
      r(in.r.as<float>()),
      form_batch(batch_stride(in.form)),
      bias_batch(batch_stride(in.bias)),
      x_batch(batch_stride(in.x)),
      x_query(in.x.defined() ? in.x.stride(1) : 0),
      x_channel(in.x.defined() ? in.x.stride(2) : 0),
      r_batch(batch_stride(in.r)),
      keys(static_cast<int>(in.v.size(2))),
      heads(static_cast<int>(in.v.size(1))),
      head_dim(static_cast<int>(in.v.size(3))),
      outers(1),
      columns(static_cast<int>(in.grid.back())),
      channels(in.x.defined() ? static_cast<int>(in.x.size(2)) : 0),
      entries(static_cast<int>(in.form.size(2))),
      outer_axes(static_cast<int>(in.grid.size()) - 1),
      sizes{},
      aligned_form(keys % 4 == 0 && reinterpret_cast<uintptr_t>(form) % 16 == 0),
      aligned_rows(head_dim * element_size(in.v.dtype) % 16 == 0),
      drops(in.dropout.p > 0),
      dropout(in.dropout) {
  for (int axis = 0; axis < outer_axes; ++axis) {
    sizes[axis] = static_cast<int>(in.grid[static_cast<size_t>(outer_axes - 1 - axis)]);
    outers *= sizes[axis];
  }
}

bool aligned(const TensorView& rows) { return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0; }

// One head of one entry of the batch.
struct Head {
  int batch, head;
  const float *form, *bias, *x, *r;
};

__device__ __forceinline__ Head head_at(const Call& call, int64_t batch_head) {
  const int64_t batch = batch_head / call.heads, head = batch_head % call.heads;
  return {static_cast<int>(batch),
          static_cast<int>(head),
          call.form + batch * call.form_batch + head * call.entries * call.keys,
          call.bias == nullptr ? nullptr : call.bias + batch * call.bias_batch + head * call.keys,
          call.x + batch * call.x_batch,
          call.r == nullptr ? nullptr : call.r + batch * call.r_batch};
}

// What a key adds to its scores.
__device__ __forceinline__ float key_bias(const Call& call, const Head& at, int key) {
  return key >= call.keys ? -INFINITY : at.bias == nullptr ? 0.0f : at.bias[key];
}

__device__ __forceinline__ float query_factor(const Head& at, int query) {
  return at.r == nullptr ? 1.0f : __ldg(at.r + query);
}

// Entries of the outer tables at one outer position.
struct OuterEntries {
  int entries[kMaxOuterAxes];
};

__device__ __forceinline__ OuterEntries outer_entries(const Call& call, int outer) {
  OuterEntries result;
  int first = call.entries - call.columns;
#pragma unroll
  for (int axis = 0; axis < kMaxOuterAxes; ++axis) {
    if (axis >= call.outer_axes) break;
    first -= call.sizes[axis];
    const bool last = axis + 1 == call.outer_axes;  // needs no division
    result.entries[axis] = first + (last ? outer : outer % call.sizes[axis]);
    if (!last) outer /= call.sizes[axis];
  }
  return result;
}

__device__ __forceinline__ float outer_sum(const Call& call, const Head& at, const OuterEntries& outer, int key) {
  float total = 0.0f;
#pragma unroll
  for (int axis = 0; axis < kMaxOuterAxes; ++axis)
    if (axis < call.outer_axes) total += __ldg(at.form + int64_t{outer.entries[axis]} * call.keys + key);
  return total;
}

// Which weights dropout keeps, a bit each: four keys from `key` on, a multiple of 4, of `rows` queries `step` apart.
// One call of Philox in the code, in a loop: it is long.
__device__ __forceinline__ uint32_t kept_keys(const Call& call, const Head& at, int rows, int query, int step,
                                              int key) {
  const uint32_t row = static_cast<uint32_t>(at.head * call.outers * call.columns + query);
  uint32_t bits = 0;
#pragma unroll 1
  for (int j = 0; j < rows; ++j) {
    const float4 scales = keep_scales(call.dropout, static_cast<uint32_t>(at.batch),
                                      row + static_cast<uint32_t>(j * step), static_cast<uint32_t>(key) / 4);
    const uint32_t four = (scales.x != 0) | (scales.y != 0) << 1 | (scales.z != 0) << 2 | (scales.w != 0) << 3;
    bits |= four << 4 * j;
  }
  return bits;
}

// The same of four queries from `query` on, of each of `rows` keys 8 apart.
__device__ __forceinline__ uint32_t kept_queries(const Call& call, const Head& at, int rows, int query, int key) {
  const uint32_t row = static_cast<uint32_t>(at.head * call.outers * call.columns + query);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < 4 * rows; ++i) {
    const float scale =
        keep_scale(call.dropout, static_cast<uint32_t>(at.batch), row + static_cast<uint32_t>(i % 4), key + i / 4 * 8);
    bits |= static_cast<uint32_t>(scale != 0) << i;
  }
  return bits;
}

template <int rows>
__device__ __forceinline__ void drop(const Call& call, uint32_t kept, float (&p)[rows][4]) {
#pragma unroll
  for (int j = 0; j < rows; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[j][i] *= kept >> (4 * j + i) & 1 ? call.dropout.kept : 0.0f;
  }
}

// --- blocks that own queries ---

// How a block's rows lie on the grid: in a plane, where a lane's rows are outer positions at one column, so that a
// table entry of the column serves them all; or in a line of columns at one outer position.
struct QueryTiling {
  bool plane;
  int warps, outer_warps, lane_rows;
  int outer_extent, column_extent, outer_tiles, column_tiles;

  QueryTiling(const Call& call, int tiles, int warps) : warps(warps), lane_rows(2 * tiles) {
    const int64_t in_line = call.outers * ceil_div(call.columns, 8 * lane_rows) * lane_rows;
    const int64_t in_plane = ceil_div(call.outers, lane_rows) * lane_rows * ceil_div(call.columns, 8);
    plane = 4 * in_plane <= 5 * in_line;
    outer_warps = plane && warps >= 8 ? 2 : 1;
    outer_extent = plane ? outer_warps * lane_rows : 1;
    column_extent = 8 * (plane ? warps / outer_warps : warps * lane_rows);
    outer_tiles = static_cast<int>(ceil_div(call.outers, outer_extent));
    column_tiles = static_cast<int>(ceil_div(call.columns, column_extent));
  }

  int64_t blocks() const { return int64_t{outer_tiles} * column_tiles; }
  __host__ __device__ int table_rows(const Call& call) const { return column_extent + outer_extent + call.channels; }

  __device__ int outer(int warp, int row) const { return plane ? warp % outer_warps * lane_rows + row : 0; }
  __device__ int column(int warp, int row, int group) const {
    return 8 * (plane ? warp / outer_warps : warp * lane_rows + row) + group;
  }
};

// As many warps a block as leave every multiprocessor a block, if there are enough queries.
QueryTiling query_tiling(const Call& call, int tiles, int most_warps, int64_t others) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  for (int warps = most_warps;; warps /= 2) {
    const QueryTiling tiling(call, tiles, warps);
    const bool small = tiling.plane || warps * tiles <= 8;  // a line's tables need the most shared memory
    if (warps == 1 || (small && tiling.blocks() * others >= multiprocessors)) return tiling;
  }
}

// A stretch of the form in shared memory: rows of the tile's columns, of its outer positions, of the data channels, and
// what each key adds.
constexpr int kTablePitch = kStream + 16;  // two rows of four lanes each in banks of their own

__device__ __forceinline__ void stage_tables(const Call& call, const Head& at, const QueryTiling& tiling, int outer,
                                             int column, int key, float* tables, float* bias) {
  const int valid = call.keys - key;
  const auto entry = [&](int index) { return at.form + int64_t{index} * call.keys + key; };
  const auto copy = [&](float* to, int rows, const auto& source) {
    stage<kStream>(to, kTablePitch, rows, valid, call.aligned_form, source);
  };
  copy(tables, tiling.column_extent,
       [&](int i) { return column + i < call.columns ? entry(call.entries - call.columns + column + i) : nullptr; });
  float* outers = tables + tiling.column_extent * kTablePitch;
  if (call.outer_axes == 1) {
    copy(outers, tiling.outer_extent,
         [&](int i) { return outer + i < call.outers ? entry(call.channels + outer + i) : nullptr; });
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < tiling.outer_extent * kStream; i += static_cast<int>(blockDim.x)) {
      const int position = outer + i / kStream, number = i % kStream;
      const bool exists = position < call.outers && number < valid;
      outers[i / kStream * kTablePitch + number] =
          exists ? outer_sum(call, at, outer_entries(call, position), key + number) : 0.0f;
    }
  }
  copy(outers + tiling.outer_extent * kTablePitch, call.channels, [&](int i) { return entry(i); });
  if (threadIdx.x >= kStream) return;
  const int own = static_cast<int>(threadIdx.x);
  if (at.bias != nullptr && own < valid) {
    async_copy_word(bias + own, at.bias + key + own);
  } else {
    bias[own] = own < valid ? 0.0f : -INFINITY;
  }
}

// A lane's rows: their places on the grid and in the tables.
template <int rows>
struct QueryRows {
  int first, step, inside;        // queries: the first, from one to the next, how many are on the grid
  int near, far, far_step, data;  // rows of the tables: shared by all of the lane's, of the first and to the next one

  __device__ QueryRows(const Call& call, const QueryTiling& tiling, int outer, int column) {
    const int warp = static_cast<int>(threadIdx.x) / 32, group = static_cast<int>(threadIdx.x) % 32 / 4;
    const int first_outer = outer + tiling.outer(warp, 0), first_column = column + tiling.column(warp, 0, group);
    first = first_outer * call.columns + first_column;
    step = tiling.plane ? call.columns : 8;
    inside = tiling.plane ? call.outers - first_outer : (call.columns - first_column + 7) / 8;
    if (first_column >= call.columns) inside = 0;
    const int own_column = tiling.column(warp, 0, group), own_outer = tiling.column_extent + tiling.outer(warp, 0);
    near = (tiling.plane ? own_column : own_outer) * kTablePitch;
    far = (tiling.plane ? own_outer : own_column) * kTablePitch;
    far_step = (tiling.plane ? 1 : 8) * kTablePitch;
    data = (tiling.column_extent + tiling.outer_extent) * kTablePitch;
  }

  // u = x . k + the tables' sum, of four keys; `tables` at the first of them.
  __device__ __forceinline__ void over_keys(const Call& call, const Head& at, const float* tables,
                                            float (&u)[rows][4]) const {
    const float4 common = *reinterpret_cast<const float4*>(tables + near);
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      const float4 own = *reinterpret_cast<const float4*>(tables + far + j * far_step);
      u[j][0] = common.x + own.x;
      u[j][1] = common.y + own.y;
      u[j][2] = common.z + own.z;
      u[j][3] = common.w + own.w;
    }
    for (int channel = 0; channel < call.channels; ++channel) {
      const float4 k = *reinterpret_cast<const float4*>(tables + data + channel * kTablePitch);
#pragma unroll
      for (int j = 0; j < rows; ++j) {
        const int64_t query = first + j * step;
        const float datum = j < inside ? __ldg(at.x + query * call.x_query + channel * call.x_channel) : 0.0f;
        u[j][0] += datum * k.x;
        u[j][1] += datum * k.y;
        u[j][2] += datum * k.z;
        u[j][3] += datum * k.w;
      }
    }
  }
};

// A row's reference point may lag this far behind its largest score: weights stay below 2^8, in 16 bits too.
constexpr float kLag = 8.0f;

// out and lse of a tile of queries in one head, for one chunk of the values' channels. The weights never leave the
// registers, so other chunks compute them again: the tensor cores take longer over a chunk than that.
template <class T, int tiles, int channels, int threads, int blocks>
__global__ void __launch_bounds__(threads, blocks)
    separable_query_attention_fwd_kernel(Call call, QueryTiling tiling, const T* v, T* out, float* lse) {
  constexpr int rows = 2 * tiles, pitch = pitch_of<T>(channels);
  using Sum = WeightedSum<T, tiles, channels>;
  int64_t place = blockIdx.x;
  const int outer = static_cast<int>(place % tiling.outer_tiles) * tiling.outer_extent;
  place /= tiling.outer_tiles;
  const int column = static_cast<int>(place % tiling.column_tiles) * tiling.column_extent;
  place /= tiling.column_tiles;
  const int chunks = (call.head_dim + channels - 1) / channels;
  const int first_channel = static_cast<int>(place % chunks) * channels;
  const int64_t batch_head = place / chunks;
  const Head at = head_at(call, batch_head);
  const int warp = static_cast<int>(threadIdx.x) / 32, quarter = static_cast<int>(threadIdx.x) % 4;

  const int table_floats = tiling.table_rows(call) * kTablePitch;
  float* tables = shared_memory<float>();
  float* bias = tables + 2 * table_floats;
  float* scratch = bias + 2 * kStream + warp * Sum::kScratch;
  T* values = reinterpret_cast<T*>(bias + 2 * kStream + tiling.warps * Sum::kScratch);
  v += batch_head * call.keys * call.head_dim + first_channel;

  const QueryRows<rows> own(call, tiling, outer, column);
  float factor[rows], reference[rows], total[rows];
#pragma unroll
  for (int j = 0; j < rows; ++j) {
    factor[j] = j < own.inside ? query_factor(at, own.first + j * own.step) * kLog2E : 0.0f;
    reference[j] = -FLT_MAX;
    total[j] = 0.0f;
  }
  Sum sum;

  const auto load = [&](int step) {
    const int key = step * kStream, buffer = step % 2;
    stage_tables(call, at, tiling, outer, column, key, tables + buffer * table_floats, bias + buffer * kStream);
    stage<channels>(values + buffer * kStream * pitch, pitch, kStream, call.head_dim - first_channel, call.aligned_rows,
                    [&](int i) {
                      const int64_t row = key + row_at(i);
                      return row < call.keys ? v + row * call.head_dim : nullptr;
                    });
  };
  const auto attend = [&](int step) {
    const int buffer = step % 2;
#pragma unroll 1
    for (int part = 0; part < kStream; part += kStep) {
      const int first = part + 4 * quarter;
      float p[rows][4];
      own.over_keys(call, at, tables + buffer * table_floats + first, p);
      const float4 added = *reinterpret_cast<const float4*>(bias + buffer * kStream + first);
      bool larger = false;
#pragma unroll
      for (int j = 0; j < rows; ++j) {
        p[j][0] = fmaf(factor[j], p[j][0], added.x);
        p[j][1] = fmaf(factor[j], p[j][1], added.y);
        p[j][2] = fmaf(factor[j], p[j][2], added.z);
        p[j][3] = fmaf(factor[j], p[j][3], added.w);
        larger |= fmaxf(fmaxf(p[j][0], p[j][1]), fmaxf(p[j][2], p[j][3])) > reference[j] + kLag;
      }
      if (__any_sync(kWholeWarp, larger)) {
#pragma unroll
        for (int j = 0; j < rows; ++j) {
          const float most = quad_max(fmaxf(fmaxf(p[j][0], p[j][1]), fmaxf(p[j][2], p[j][3])));
          const float next = fmaxf(reference[j], most), by = exp2_approx(reference[j] - next);
          reference[j] = next;
          total[j] *= by;
          sum.scale(j, by);
        }
      }
#pragma unroll
      for (int j = 0; j < rows; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[j][i] = exp2_approx(p[j][i] - reference[j]);
          total[j] += p[j][i];
        }
      }
      if (call.drops) drop(call, kept_keys(call, at, rows, own.first, own.step, step * kStream + first), p);
      sum.add(p, values + (buffer * kStream + part) * pitch, scratch);
    }
  };
  pipeline((call.keys + kStream - 1) / kStream, load, attend);

  const int queries = call.outers * call.columns;
#pragma unroll
  for (int j = 0; j < rows; ++j) {
    const float all = quad_sum(total[j]);
    if (j >= own.inside) continue;
    const int64_t query = own.first + j * own.step;
    const bool empty = all == 0.0f;
    const float by = empty ? 0.0f : 1.0f / all;
    T* to = out + ((int64_t{at.batch} * queries + query) * call.heads + at.head) * call.head_dim + first_channel;
    const int left = call.head_dim - first_channel;
    sum.read(j, [&](int channel, float first, float second) {
      if (channel < left) to[channel] = from_float<T>(first * by);
      if (channel + 1 < left) to[channel + 1] = from_float<T>(second * by);
    });
    // Every chunk of channels has the same to say.
    if (quarter == 0 && first_channel == 0)
      lse[batch_head * queries + query] = empty ? -INFINITY : (reference[j] + log2f(all)) / kLog2E;
  }
}

// --- backward ---

// What is subtracted from a query's scores, in powers of two (0 for one that attends to nothing, whose scores are all
// -inf), and delta = d_out . out. A warp for each query of a head; rows are [B, M, H] here and [B, H, M] in the
// results.
constexpr int kRowsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kRowsThreads)
    separable_query_attention_bwd_rows_kernel(const T* out, const T* d_out, const float* lse, float* reference,
                                              float* delta, int64_t rows, int queries, int heads, int head_dim) {
  const int64_t row = int64_t{blockIdx.x} * (kRowsThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float total = 0.0f;
  for (int channel = static_cast<int>(threadIdx.x) % 32; channel < head_dim; channel += 32)
    total += to_float(out[row * head_dim + channel]) * to_float(d_out[row * head_dim + channel]);
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kWholeWarp, total, lanes);
  const int64_t head = row % heads, query = row / heads % queries, batch = row / heads / queries;
  const int64_t place = (batch * heads + head) * queries + query;
  if (threadIdx.x % 32 != 0) return;
  delta[place] = total;
  reference[place] = lse[place] == -INFINITY ? 0.0f : lse[place] * kLog2E;
}

// d_out [B, M, H, Dv]; reference and delta [B, H, M].
template <class T>
struct Saved {
  const T* d_out;
  const float *reference, *delta;
};

constexpr int kBackwardTiles = 2, kBackwardRows = 2 * kBackwardTiles, kWarpRows = 16 * kBackwardTiles;
constexpr int kBackwardWarps = 4, kBackwardThreads = 32 * kBackwardWarps;

// d_x and d_r, where they are not null, of a tile of queries: sums over keys, heads, and the `batches` entries of the
// batch that share the queries. d_x is zeros to begin with.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    separable_query_attention_bwd_queries_kernel(Call call, QueryTiling tiling, const T* v, Saved<T> saved, float* d_x,
                                                 float* d_r, int batches) {
  constexpr int pitch = pitch_of<T>(kChunk);
  int64_t place = blockIdx.x;
  const int outer = static_cast<int>(place % tiling.outer_tiles) * tiling.outer_extent;
  place /= tiling.outer_tiles;
  const int column = static_cast<int>(place % tiling.column_tiles) * tiling.column_extent;
  const int64_t group = place / tiling.column_tiles;
  const int warp = static_cast<int>(threadIdx.x) / 32, quarter = static_cast<int>(threadIdx.x) % 4;
  const int queries = call.outers * call.columns;
  const int chunks = (call.head_dim + kChunk - 1) / kChunk, own_pitch = pitch_of<T>(chunks * kChunk);

  const int table_floats = tiling.table_rows(call) * kTablePitch;
  float* tables = shared_memory<float>();
  float* bias = tables + 2 * table_floats;
  T* gradients = reinterpret_cast<T*>(bias + 2 * kStream);
  T* values = gradients + tiling.warps * kWarpRows * own_pitch;

  const QueryRows<kBackwardRows> own(call, tiling, outer, column);
  float d_factor[kBackwardRows] = {};
  for (int index = 0; index < batches * call.heads; ++index) {
    const int64_t batch_head = group * batches * call.heads + index;
    const Head at = head_at(call, batch_head);
    const T* value = v + batch_head * call.keys * call.head_dim;
    const T* d_out = saved.d_out + (int64_t{at.batch} * queries * call.heads + at.head) * call.head_dim;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int first = chunk * kChunk;
      stage<kChunk>(gradients + first, own_pitch, tiling.warps * kWarpRows, call.head_dim - first, call.aligned_rows,
                    [&](int i) {
                      const int of_warp = i / kWarpRows, row = i % kWarpRows / 8;
                      const int at_outer = outer + tiling.outer(of_warp, row);
                      const int at_column = column + tiling.column(of_warp, row, i % 8);
                      const int64_t query = int64_t{at_outer} * call.columns + at_column;
                      const bool exists = at_outer < call.outers && at_column < call.columns;
                      return exists ? d_out + query * call.heads * call.head_dim + first : nullptr;
                    });
    }
    float factor[kBackwardRows], reference[kBackwardRows], delta[kBackwardRows];
#pragma unroll
    for (int j = 0; j < kBackwardRows; ++j) {
      const bool inside = j < own.inside;
      const int query = own.first + j * own.step;
      factor[j] = inside ? query_factor(at, query) : 0.0f;
      reference[j] = inside ? saved.reference[batch_head * queries + query] : INFINITY;
      delta[j] = inside ? saved.delta[batch_head * queries + query] : 0.0f;
    }
    DotProducts<T, kBackwardTiles> d_p;

    const auto load = [&](int step) {
      const int key = step / chunks * kStream, first = step % chunks * kChunk, buffer = step / chunks % 2;
      stage<kChunk>(values + step % 2 * kStream * pitch, pitch, kStream, call.head_dim - first, call.aligned_rows,
                    [&](int i) {
                      const int64_t row = key + row_at(i);
                      return row < call.keys ? value + row * call.head_dim + first : nullptr;
                    });
      if (first > 0) return;
      stage_tables(call, at, tiling, outer, column, key, tables + buffer * table_floats, bias + buffer * kStream);
    };
    const auto differentiate = [&](int step) {
      const int chunk = step % chunks, buffer = step / chunks % 2;
      if (chunk == 0) d_p.clear();
      d_p.add(gradients + warp * kWarpRows * own_pitch + chunk * kChunk, own_pitch,
              values + step % 2 * kStream * pitch);
      if (chunk + 1 < chunks) return;
      const float* table = tables + buffer * table_floats;
#pragma unroll
      for (int part = 0; part < kStream / kStep; ++part) {
        const int first = part * kStep + 4 * quarter, key = step / chunks * kStream + first;
        float u[kBackwardRows][4];
        own.over_keys(call, at, table + first, u);
        const float4 added = *reinterpret_cast<const float4*>(bias + buffer * kStream + first);
        const float biases[4] = {added.x, added.y, added.z, added.w};
        float upstream[kBackwardRows][4];
        d_p.read(part, upstream);
        if (call.drops) drop(call, kept_keys(call, at, kBackwardRows, own.first, own.step, key), upstream);
#pragma unroll
        for (int j = 0; j < kBackwardRows; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float p = exp2_approx(fmaf(factor[j] * kLog2E, u[j][i], biases[i]) - reference[j]);
            const float d_s = p * (upstream[j][i] - delta[j]);
            // A score of -inf weighs nothing, whatever it is multiplied with.
            d_factor[j] += p == 0.0f ? 0.0f : d_s * u[j][i];
            u[j][i] = factor[j] * d_s;
          }
        }
        if (d_x == nullptr) continue;
        for (int channel = 0; channel < call.channels; ++channel) {
          const float4 k = *reinterpret_cast<const float4*>(table + own.data + channel * kTablePitch + first);
#pragma unroll
          for (int j = 0; j < kBackwardRows; ++j) {
            const float sum = quad_sum(u[j][0] * k.x + u[j][1] * k.y + u[j][2] * k.z + u[j][3] * k.w);
            if (quarter == j && j < own.inside)
              d_x[(group * queries + own.first + j * own.step) * call.channels + channel] += sum;
          }
        }
      }
    };
    pipeline((call.keys + kStream - 1) / kStream * chunks, load, differentiate);
  }
  if (d_r == nullptr) return;
#pragma unroll
  for (int j = 0; j < kBackwardRows; ++j) {
    const float sum = quad_sum(d_factor[j]);
    if (quarter == 0 && j < own.inside) d_r[group * queries + own.first + j * own.step] = sum;
  }
}

// --- blocks that own keys ---

// Queries in parts, which have sums of their own: every column_parts-th tile of kStream columns, and a share of the
// outer positions.
struct QueryParts {
  int column_parts, outer_parts;
};

// The share of a part among the outer positions, and its place among the columns' tiles.
struct Part {
  int column_part, outer_part, first_outer, end_outer;

  __device__ Part(const Call& call, const QueryParts& parts, int part)
      : column_part(part % parts.column_parts), outer_part(part / parts.column_parts) {
    const int share = (call.outers + parts.outer_parts - 1) / parts.outer_parts;
    first_outer = outer_part * share;
    end_outer = min(first_outer + share, call.outers);
  }
};

// A query's factor, reference and delta for a tile of columns in shared memory; outside the grid weights are 0.
constexpr int kStatistics = 3 * kStream;

template <class T>
__device__ __forceinline__ void stage_statistics(const Call& call, const Head& at, const Saved<T>& saved,
                                                 int64_t batch_head, int outer, int column, float* statistics) {
  if (threadIdx.x >= kStream) return;
  const int at_column = column + static_cast<int>(threadIdx.x);
  const bool inside = at_column < call.columns;
  const int query = outer * call.columns + at_column;
  const int64_t row = batch_head * call.outers * call.columns + query;
  float* to = statistics + threadIdx.x;
  stage_number(to + 2 * kStream, saved.delta + row, inside);
  if (inside && at.r != nullptr) {
    async_copy_word(to, at.r + query);
  } else {
    to[0] = 1.0f;
  }
  if (inside) {
    async_copy_word(to + kStream, saved.reference + row);
  } else {
    to[kStream] = INFINITY;
  }
}

// kStream rows of the upstream gradient, at one outer position and from one column on.
template <int width, class T>
__device__ __forceinline__ void stage_gradients(const Call& call, const Head& at, const Saved<T>& saved, int outer,
                                                int column, int first_channel, T* tile) {
  const int64_t query = (int64_t{at.batch} * call.outers + outer) * call.columns + column;
  const T* rows = saved.d_out + (query * call.heads + at.head) * call.head_dim + first_channel;
  stage<width>(tile, pitch_of<T>(width), kStream, call.head_dim - first_channel, call.aligned_rows, [&](int i) {
    const int64_t row = row_at(i);
    return column + row < call.columns ? rows + row * call.heads * call.head_dim : nullptr;
  });
}

// The outer tables' sum for each key of a block, as many as it has threads.
__device__ __forceinline__ void stage_outer_sums(const Call& call, const Head& at, int outer, int first_key,
                                                 float* sums) {
  const int key = first_key + static_cast<int>(threadIdx.x);
  float* to = sums + threadIdx.x;
  if (call.outer_axes == 1) {
    stage_number(to, at.form + int64_t{call.channels + outer} * call.keys + key, key < call.keys);
  } else {
    *to = key < call.keys ? outer_sum(call, at, outer_entries(call, outer), key) : 0.0f;
  }
}

// A lane's keys, and the columns' table for a tile of columns, which serves all outer positions: it lies in shared
// memory for want of registers, where each thread reads what it wrote.
constexpr int kTableVectors = kBackwardRows * (kStream / kStep);  // of a thread

struct KeyRows {
  float4* table;
  int first_key, first;  // the block's first; the lane's, whose row j is key 8 j after it
  float bias[kBackwardRows];

  __device__ KeyRows(const Call& call, const Head& at, int first_key, float4* tables)
      : table(tables + threadIdx.x), first_key(first_key) {
    first = first_key + static_cast<int>(threadIdx.x) / 32 * kWarpRows + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int j = 0; j < kBackwardRows; ++j) bias[j] = key_bias(call, at, first + 8 * j);
  }

  __device__ __forceinline__ void load_columns(const Call& call, const Head& at, int column) {
    const int quarter = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int part = 0; part < kStream / kStep; ++part) {
      const int own_column = column + part * kStep + 4 * quarter;
      const float* entry = at.form + int64_t{call.entries - call.columns + own_column} * call.keys;
#pragma unroll
      for (int j = 0; j < kBackwardRows; ++j) {
        const int key = first + 8 * j;
        float four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool exists = own_column + i < call.columns && key < call.keys;
          four[i] = exists ? __ldg(entry + int64_t{i} * call.keys + key) : 0.0f;
        }
        vector(j, part) = make_float4(four[0], four[1], four[2], four[3]);
      }
    }
  }

  __device__ __forceinline__ float4& vector(int row, int part) const {
    return table[(part * kBackwardRows + row) * static_cast<int>(blockDim.x)];
  }

  // Weights of four queries, from `query` on, of which `inside` are on the grid, with their statistics and the keys'
  // outer sums.
  __device__ __forceinline__ void weigh(const Call& call, const Head& at, int query, int inside, int part,
                                        const float* statistics, const float* sums,
                                        float (&p)[kBackwardRows][4]) const {
    const float4 factors = *reinterpret_cast<const float4*>(statistics);
    const float4 references = *reinterpret_cast<const float4*>(statistics + kStream);
#pragma unroll
    for (int j = 0; j < kBackwardRows; ++j) {
      const float4 entries = vector(j, part);
      const float outer = sums[first - first_key + 8 * j];
      p[j][0] = entries.x + outer;
      p[j][1] = entries.y + outer;
      p[j][2] = entries.z + outer;
      p[j][3] = entries.w + outer;
    }
    for (int channel = 0; channel < call.channels; ++channel) {
      float data[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        data[i] = i < inside ? __ldg(at.x + (query + i) * call.x_query + channel * call.x_channel) : 0.0f;
#pragma unroll
      for (int j = 0; j < kBackwardRows; ++j) {
        const int key = first + 8 * j;
        const float k = key < call.keys ? __ldg(at.form + int64_t{channel} * call.keys + key) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) p[j][i] += data[i] * k;
      }
    }
#pragma unroll
    for (int j = 0; j < kBackwardRows; ++j) {
      p[j][0] = exp2_approx(fmaf(factors.x * kLog2E, p[j][0], bias[j]) - references.x);
      p[j][1] = exp2_approx(fmaf(factors.y * kLog2E, p[j][1], bias[j]) - references.y);
      p[j][2] = exp2_approx(fmaf(factors.z * kLog2E, p[j][2], bias[j]) - references.z);
      p[j][3] = exp2_approx(fmaf(factors.w * kLog2E, p[j][3], bias[j]) - references.w);
    }
  }
};

// Sums of the queries' parts: data [B, H, parts, c, N] and outer [B, H, slots, entries of outer tables, N], which are
// zeros to begin with; table [B, H, outer_parts, columns, N]; h [B, H, parts, N]. With two axes, a position's entry
// belongs to one part of the outer positions alone: a slot for each part of the columns is enough.
struct KeyGradients {
  float *data, *outer, *table, *h;
};

// Gradients of the form and h of a tile of keys in one head, from one part of the queries.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    separable_query_attention_bwd_keys_kernel(Call call, QueryParts parts, const T* v, Saved<T> saved,
                                              KeyGradients results) {
  constexpr int pitch = pitch_of<T>(kChunk);
  const int block_keys = static_cast<int>(blockDim.x) / 32 * kWarpRows;
  const int key_tiles = (call.keys + block_keys - 1) / block_keys, all_parts = parts.column_parts * parts.outer_parts;
  int64_t place = blockIdx.x;
  const int first_key = static_cast<int>(place % key_tiles) * block_keys;
  place /= key_tiles;
  const int part_index = static_cast<int>(place % all_parts);
  const int64_t batch_head = place / all_parts;
  const Head at = head_at(call, batch_head);
  const Part part(call, parts, part_index);
  const int warp = static_cast<int>(threadIdx.x) / 32, quarter = static_cast<int>(threadIdx.x) % 4;
  const int chunks = (call.head_dim + kChunk - 1) / kChunk, own_pitch = pitch_of<T>(chunks * kChunk);

  float4* columns = shared_memory<float4>();
  float* statistics = reinterpret_cast<float*>(columns + kTableVectors * blockDim.x);
  float* sums = statistics + 2 * kStatistics;
  T* values = reinterpret_cast<T*>(sums + 2 * blockDim.x);
  T* gradients = values + block_keys * own_pitch;

  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first = chunk * kChunk;
    stage<kChunk>(values + first, own_pitch, block_keys, call.head_dim - first, call.aligned_rows, [&](int i) {
      const int64_t row = batch_head * call.keys + first_key + i;
      return first_key + i < call.keys ? v + row * call.head_dim + first : nullptr;
    });
  }

  const int64_t outer_entry_count = call.entries - call.columns - call.channels;
  const int slots = call.outer_axes == 1 ? parts.column_parts : all_parts;
  const int slot = call.outer_axes == 1 ? part.column_part : part_index;
  float* d_data = results.data + (batch_head * all_parts + part_index) * call.channels * call.keys;
  float* d_outer = results.outer + (batch_head * slots + slot) * outer_entry_count * call.keys;
  float* d_table = results.table + (batch_head * parts.outer_parts + part.outer_part) * call.columns * call.keys;

  KeyRows own(call, at, first_key, columns);
  float d_bias[kBackwardRows] = {};
  const int tiles = (call.columns + kStream - 1) / kStream;
  const int own_key = own.first + 8 * quarter;  // whose sums over queries this lane writes
  for (int tile = part.column_part; tile < tiles; tile += parts.column_parts) {
    const int column = tile * kStream;
    own.load_columns(call, at, column);
    float d_column[kBackwardRows][kStream / kStep][4] = {};
    DotProducts<T, kBackwardTiles> d_p;

    const auto load = [&](int step) {
      const int outer = part.first_outer + step / chunks, first = step % chunks * kChunk;
      stage_gradients<kChunk>(call, at, saved, outer, column, first, gradients + step % 2 * kStream * pitch);
      if (first > 0) return;
      const int buffer = step / chunks % 2;
      stage_statistics(call, at, saved, batch_head, outer, column, statistics + buffer * kStatistics);
      stage_outer_sums(call, at, outer, first_key, sums + buffer * static_cast<int>(blockDim.x));
    };
    const auto differentiate = [&](int step) {
      const int outer = part.first_outer + step / chunks, chunk = step % chunks;
      if (chunk == 0) d_p.clear();
      d_p.add(values + warp * kWarpRows * own_pitch + chunk * kChunk, own_pitch,
              gradients + step % 2 * kStream * pitch);
      if (chunk + 1 < chunks) return;
      const int buffer = step / chunks % 2;
      float d_position[kBackwardRows] = {};
#pragma unroll
      for (int stretch = 0; stretch < kStream / kStep; ++stretch) {
        const int first = stretch * kStep + 4 * quarter, query = outer * call.columns + column + first;
        const int inside = call.columns - column - first;
        const float* statistic = statistics + buffer * kStatistics + first;
        float p[kBackwardRows][4];
        own.weigh(call, at, query, inside, stretch, statistic, sums + buffer * static_cast<int>(blockDim.x), p);
        float upstream[kBackwardRows][4];
        d_p.read(stretch, upstream);
        if (call.drops) drop(call, kept_queries(call, at, kBackwardRows, query, own.first), upstream);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float factor = statistic[i], delta = statistic[2 * kStream + i];
#pragma unroll
          for (int j = 0; j < kBackwardRows; ++j) {
            const float d_s = p[j][i] * (upstream[j][i] - delta), d_u = factor * d_s;
            d_bias[j] += d_s;
            d_position[j] += d_u;
            d_column[j][stretch][i] += d_u;
            p[j][i] = d_u;
          }
        }
        for (int channel = 0; channel < call.channels; ++channel) {
          float sum[kBackwardRows] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float datum = i < inside ? __ldg(at.x + (query + i) * call.x_query + channel * call.x_channel) : 0.0f;
#pragma unroll
            for (int j = 0; j < kBackwardRows; ++j) sum[j] += p[j][i] * datum;
          }
#pragma unroll
          for (int j = 0; j < kBackwardRows; ++j) {
            const float all = quad_sum(sum[j]);
            if (quarter == j && own_key < call.keys) d_data[int64_t{channel} * call.keys + own_key] += all;
          }
        }
      }
      const OuterEntries entries = outer_entries(call, outer);
#pragma unroll
      for (int j = 0; j < kBackwardRows; ++j) {
        const float all = quad_sum(d_position[j]);
        if (quarter != j || own_key >= call.keys) continue;
#pragma unroll
        for (int axis = 0; axis < kMaxOuterAxes; ++axis)
          if (axis < call.outer_axes)
            d_outer[int64_t{entries.entries[axis] - call.channels} * call.keys + own_key] += all;
      }
    };
    pipeline(max(part.end_outer - part.first_outer, 0) * chunks, load, differentiate);

#pragma unroll
    for (int stretch = 0; stretch < kStream / kStep; ++stretch) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at_column = column + stretch * kStep + 4 * quarter + i;
#pragma unroll
        for (int j = 0; j < kBackwardRows; ++j) {
          const int key = own.first + 8 * j;
          if (at_column < call.columns && key < call.keys)
            d_table[int64_t{at_column} * call.keys + key] = d_column[j][stretch][i];
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kBackwardRows; ++j) {
    const float sum = quad_sum(d_bias[j]);
    if (quarter == j && own_key < call.keys)
      results.h[(batch_head * all_parts + part_index) * call.keys + own_key] = sum;
  }
}

// The gradient of v, of a tile of keys in one head and one chunk of channels, from one part of the queries: apart from
// those of the scores, which need all channels at once and whose products contract over other dimensions.
template <class T, int channels>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    separable_query_attention_bwd_values_kernel(Call call, QueryParts parts, Saved<T> saved, float* d_v) {
  constexpr int pitch = pitch_of<T>(channels);
  using Sum = WeightedSum<T, kBackwardTiles, channels>;
  const int warps = static_cast<int>(blockDim.x) / 32, block_keys = warps * kWarpRows;
  const int key_tiles = (call.keys + block_keys - 1) / block_keys, all_parts = parts.column_parts * parts.outer_parts;
  int64_t place = blockIdx.x;
  const int first_key = static_cast<int>(place % key_tiles) * block_keys;
  place /= key_tiles;
  const int part_index = static_cast<int>(place % all_parts);
  place /= all_parts;
  const int chunks = (call.head_dim + channels - 1) / channels;
  const int first_channel = static_cast<int>(place % chunks) * channels;
  const int64_t batch_head = place / chunks;
  const Head at = head_at(call, batch_head);
  const Part part(call, parts, part_index);
  const int warp = static_cast<int>(threadIdx.x) / 32, quarter = static_cast<int>(threadIdx.x) % 4;

  float4* columns = shared_memory<float4>();
  float* statistics = reinterpret_cast<float*>(columns + kTableVectors * blockDim.x);
  float* sums = statistics + 2 * kStatistics;
  float* scratch = sums + 2 * blockDim.x + warp * Sum::kScratch;
  T* gradients = reinterpret_cast<T*>(sums + 2 * blockDim.x + warps * Sum::kScratch);

  KeyRows own(call, at, first_key, columns);
  Sum sum;
  const int tiles = (call.columns + kStream - 1) / kStream;
  for (int tile = part.column_part; tile < tiles; tile += parts.column_parts) {
    const int column = tile * kStream;
    own.load_columns(call, at, column);
    const auto load = [&](int step) {
      const int outer = part.first_outer + step, buffer = step % 2;
      stage_gradients<channels>(call, at, saved, outer, column, first_channel, gradients + buffer * kStream * pitch);
      stage_statistics(call, at, saved, batch_head, outer, column, statistics + buffer * kStatistics);
      stage_outer_sums(call, at, outer, first_key, sums + buffer * static_cast<int>(blockDim.x));
    };
    const auto differentiate = [&](int step) {
      const int outer = part.first_outer + step, buffer = step % 2;
#pragma unroll
      for (int stretch = 0; stretch < kStream / kStep; ++stretch) {
        const int first = stretch * kStep + 4 * quarter, query = outer * call.columns + column + first;
        float p[kBackwardRows][4];
        own.weigh(call, at, query, call.columns - column - first, stretch, statistics + buffer * kStatistics + first,
                  sums + buffer * static_cast<int>(blockDim.x), p);
        if (call.drops) drop(call, kept_queries(call, at, kBackwardRows, query, own.first), p);
        sum.add(p, gradients + (buffer * kStream + stretch * kStep) * pitch, scratch);
      }
    };
    pipeline(max(part.end_outer - part.first_outer, 0), load, differentiate);
  }

  const int left = call.head_dim - first_channel;
#pragma unroll
  for (int j = 0; j < kBackwardRows; ++j) {
    const int key = own.first + 8 * j;
    if (key >= call.keys) continue;
    float* to = d_v + ((batch_head * all_parts + part_index) * call.keys + key) * call.head_dim + first_channel;
    sum.read(j, [&](int channel, float first, float second) {
      if (channel < left) to[channel] = first;
      if (channel + 1 < left) to[channel + 1] = second;
    });
  }
}

// --- launching ---

constexpr int kNarrow = 64, kWide = 128;  // channels of a product

template <class T, int tiles, int channels, int warps, int blocks>
Status run_fwd(const Call& call, const SeparableQueryInputs& in, const TensorView& out, const TensorView& lse,
               Stream stream) {
  using Sum = WeightedSum<T, tiles, channels>;
  const int64_t others = in.v.size(0) * call.heads * ceil_div(call.head_dim, channels);
  for (int most_warps = warps;; most_warps /= 2) {
    const QueryTiling tiling = query_tiling(call, tiles, most_warps, others);
    const int64_t floats = 2 * (tiling.table_rows(call) * kTablePitch + kStream) + tiling.warps * Sum::kScratch;
    const size_t shared = static_cast<size_t>(4 * floats) + 2 * kStream * pitch_of<T>(channels) * sizeof(T);
    if (shared > most_shared() && most_warps > 1) continue;
    return launch(separable_query_attention_fwd_kernel<T, tiles, channels, 32 * warps, blocks>,
                  tiling.blocks() * others, 32 * tiling.warps, shared, stream, call, tiling, in.v.as<const T>(),
                  out.as<T>(), lse.as<float>());
  }
}

// Bytes of what blocks that own keys have beside values and gradients: their tables and statistics.
size_t key_bytes(int warps) {
  return static_cast<size_t>(warps) * 32 * (kTableVectors * 16 + 2 * 4) + 2 * kStatistics * 4;
}

// Bytes of the rows that a block of the backward keeps, whole, and of the tiles that it streams.
template <class T>
size_t product_bytes(const Call& call, int warps) {
  const int width = static_cast<int>(ceil_div(call.head_dim, kChunk)) * kChunk;
  return (static_cast<size_t>(warps) * kWarpRows * pitch_of<T>(width) + 2 * kStream * pitch_of<T>(kChunk)) * sizeof(T);
}

template <class T>
Saved<T> saved_of(const SeparableQuerySaved& saved) {
  return {saved.d_out.as<const T>(), saved.reference.as<const float>(), saved.delta.as<const float>()};
}

}  // namespace

Status separable_query_attention_fwd(const SeparableQueryInputs& in, const TensorView& out, const TensorView& lse,
                                     Stream stream) {
  Call call(in);
  call.aligned_rows &= aligned(in.v);
  return with_floating(in.v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 4) {
      return run_fwd<T, 2, kNarrow, 4, 2>(call, in, out, lse, stream);
    } else {
      return call.head_dim <= kNarrow ? run_fwd<T, 4, kNarrow, 4, 2>(call, in, out, lse, stream)
                                      : run_fwd<T, 2, kWide, 8, 1>(call, in, out, lse, stream);
    }
  });
}

Status separable_query_attention_bwd_rows(const TensorView& out, const TensorView& d_out, const TensorView& lse,
                                          const TensorView& reference, const TensorView& delta, Stream stream) {
  const int64_t rows = out.size(0) * out.size(1) * out.size(2);
  return with_floating(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(separable_query_attention_bwd_rows_kernel<T>, ceil_div(rows, kRowsThreads / 32), kRowsThreads, 0,
                  stream, out.as<const T>(), d_out.as<const T>(), lse.as<const float>(), reference.as<float>(),
                  delta.as<float>(), rows, out.size(1), out.size(2), out.size(3));
  });
}

Status separable_query_attention_bwd_queries(const SeparableQueryInputs& in, const SeparableQuerySaved& saved,
                                             const TensorView& d_x, const TensorView& d_r, Stream stream) {
  Call call(in);
  call.aligned_rows &= aligned(in.v) && aligned(saved.d_out);
  const int64_t groups = d_x.defined() ? d_x.size(0) : d_r.size(0);
  return with_floating(in.v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int warps = kBackwardWarps;; warps /= 2) {
      const QueryTiling tiling = query_tiling(call, kBackwardTiles, warps, groups);
      const size_t tables = 8 * static_cast<size_t>(tiling.table_rows(call) * kTablePitch + kStream);
      const size_t shared = tables + product_bytes<T>(call, tiling.warps);
      if (shared > most_shared() && warps > 1) continue;
      return launch(separable_query_attention_bwd_queries_kernel<T>, tiling.blocks() * groups, 32 * tiling.warps,
                    shared, stream, call, tiling, in.v.as<const T>(), saved_of<T>(saved), d_x.as<float>(),
                    d_r.as<float>(), groups == 0 ? 0 : in.v.size(0) / groups);
    }
  });
}

Status separable_query_attention_bwd_keys(const SeparableQueryInputs& in, const SeparableQuerySaved& saved,
                                          const SeparableQueryKeyGradients& out, Stream stream) {
  Call call(in);
  call.aligned_rows &= aligned(in.v) && aligned(saved.d_out);
  const int outer_parts = static_cast<int>(out.table.size(2)), parts = static_cast<int>(out.h.size(2));
  const QueryParts split{parts / outer_parts, outer_parts};
  const KeyGradients results{out.data.as<float>(), out.outer.as<float>(), out.table.as<float>(), out.h.as<float>()};
  return with_floating(in.v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    int warps = kBackwardWarps;
    const auto shared = [&] { return key_bytes(warps) + product_bytes<T>(call, warps); };
    while (warps > 1 && (shared() > most_shared() || (warps - 1) * kWarpRows >= call.keys)) warps /= 2;
    const int64_t blocks = ceil_div(call.keys, warps * kWarpRows) * parts * in.v.size(0) * call.heads;
    return launch(separable_query_attention_bwd_keys_kernel<T>, blocks, 32 * warps, shared(), stream, call, split,
                  in.v.as<const T>(), saved_of<T>(saved), results);
  });
}

Status separable_query_attention_bwd_values(const SeparableQueryInputs& in, const SeparableQuerySaved& saved,
                                            const TensorView& d_v, Stream stream) {
  Call call(in);
  call.aligned_rows &= aligned(saved.d_out);
  const QueryParts split{static_cast<int>(d_v.size(2)), static_cast<int>(d_v.size(3))};
  return with_floating(in.v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int channels = sizeof(T) == 4 ? kNarrow : kWide;
    using Sum = WeightedSum<T, kBackwardTiles, channels>;
    const int warps = call.keys <= kWarpRows ? 1 : call.keys <= 2 * kWarpRows ? 2 : kBackwardWarps;
    const size_t shared = key_bytes(warps) + static_cast<size_t>(warps) * Sum::kScratch * 4 +
                          2 * kStream * pitch_of<T>(channels) * sizeof(T);
    const int64_t blocks = ceil_div(call.keys, warps * kWarpRows) * split.column_parts * split.outer_parts *
                           ceil_div(call.head_dim, channels) * in.v.size(0) * call.heads;
    return launch(separable_query_attention_bwd_values_kernel<T, channels>, blocks, 32 * warps, shared, stream, call,
                  split, saved_of<T>(saved), d_v.as<float>());
  });
}

}  // namespace cuda
}  // namespace pk
