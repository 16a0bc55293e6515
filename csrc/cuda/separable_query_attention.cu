// separable_query_attention on a GPU, docs/separable_attention.md: softmax attention of queries on a grid, whose scores
// are sums of one table entry per axis and a dot product of data channels.
// Here blocks own queries: forward, and backward's gradients of the queries, x and r; separable_query_attention_keys.cu
// has those of the keys.
#include "separable_query_call.h"

namespace pk {
namespace cuda {
namespace {

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

// --- launching ---

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

}  // namespace cuda
}  // namespace pk
