// separable_query_attention on a GPU: gradients of what keys own, the form, h and v. Blocks own keys, and the queries
// stream past.
#include "separable_query_call.h"

namespace pk {
namespace cuda {
namespace {

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

// Bytes of what blocks that own keys have beside values and gradients: their tables and statistics.
size_t key_bytes(int warps) {
  return static_cast<size_t>(warps) * 32 * (kTableVectors * 16 + 2 * 4) + 2 * kStatistics * 4;
}

}  // namespace

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
