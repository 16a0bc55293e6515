// latent_attention on a GPU, by tensor cores: tiles of 64 queries meet all keys, tile by tile; in backward tiles of
// keys meet all queries, too. What a warp computes from a tile stays in its registers, as left operand of the next
// product.
#include "latent_tiles.h"

namespace pk {
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The two rows of a lane on the way through backward; of a query that does not exist {+inf, 0}, so that weights are 0.
struct alignas(8) Statistics {
  float log2_total;  // of all weights; +inf where there is none
  float delta;       // d_out . out
};

struct LatentCall {
  Heads q, k, v, out, d_out, d_q, d_k, d_v;
  float* lse = nullptr;
  Statistics* statistics = nullptr;
  int heads = 0, queries = 0, keys = 0;
  float scale = 0.0f;
};

// --- forward ---

// The running softmax of a lane's two rows: weights are relative to a base, 2^-base, which follows the highest score.
struct Softmax {
  static constexpr float kMargin = 8.0f;  // log2: so far may scores exceed the base, so that it seldom moves

  float highest[2] = {-INFINITY, -INFINITY}, base[2] = {0.0f, 0.0f};
  float total[2] = {0.0f, 0.0f};  // of the weights that this lane has seen

  // Turns a tile's products into weights; what was summed up before shrinks where the base moves. score_scale is
  // positive and holds log2(e).
  template <class AnySums>
  __device__ __forceinline__ void weigh(float (&tile)[8][4], float score_scale, AnySums& sums) {
    float top[2];
    bool moves = false;
    for (int row = 0; row < 2; ++row) {
      top[row] = tile[0][2 * row];
#pragma unroll
      for (auto& products : tile) top[row] = fmaxf(top[row], fmaxf(products[2 * row], products[2 * row + 1]));
      top[row] = row_max(top[row]);
      moves |= exceeds(top[row], row, score_scale);
    }
    if (__any_sync(0xFFFFFFFF, moves)) move(top, score_scale, sums);
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (auto& products : tile) {
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          products[i] = exp2_approx(products[i] * score_scale - base[row]);
          total[row] += products[i];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ bool exceeds(float top, int row, float score_scale) const {
    return (top - highest[row]) * score_scale > kMargin;
  }

  template <class AnySums>
  __device__ __forceinline__ void move(const float (&top)[2], float score_scale, AnySums& sums) {
    float rescale[2] = {1.0f, 1.0f};
    for (int row = 0; row < 2; ++row) {
      if (!exceeds(top[row], row, score_scale)) continue;
      rescale[row] = exp2_approx((highest[row] - top[row]) * score_scale);
      highest[row] = top[row];
      base[row] = top[row] * score_scale;
      total[row] *= rescale[row];
    }
#pragma unroll
    for (auto& panel : sums)
      for (auto& sum : panel)
        for (int i = 0; i < 4; ++i) sum[i] *= rescale[i / 2];
  }
};

// Every query against every key of its head: out and lse.
template <class T, int channels>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<channels>) latent_attention_fwd_kernel(LatentCall call) {
  constexpr int kTile = kTileSize<channels>;
  T* memory = aligned_memory<T>();
  const auto k_tile = [&](int stage) { return memory + 2 * stage * kTile; };
  const auto v_tile = [&](int stage) { return memory + (2 * stage + 1) * kTile; };
  const Place place(call.heads, call.queries);
  const T* k = call.k.at<const T>(place, 0);
  const T* v = call.v.at<const T>(place, 0);
  const auto start = [&](int first, int stage) {
    copy_tile<T, channels>(k_tile(stage), k, call.k.row, first, call.keys);
    copy_tile<T, channels>(v_tile(stage), v, call.v.row, first, call.keys);
    async_commit();
  };

  copy_tile<T, channels>(k_tile(1), call.q.at<const T>(place, 0), call.q.row, place.first, call.queries);
  start(0, 0);
  wait_for_copies();
  Operands<channels> q;
  load_operands<channels>(q, k_tile(1));
  // The highest product is the highest score where the scale is positive.
  if (call.scale < 0.0f)
    for (auto& step : q)
      for (auto& pair : step) pair ^= 0x80008000u;
  // Not 0: that times the -inf of a key that does not exist would be NaN.
  const float score_scale = fmaxf(fabsf(call.scale) * kLog2E, FLT_MIN);

  Softmax softmax;
  Sums<channels> sums = {};
  for (int first = 0, stage = 0; first < call.keys; first += kTileRows, stage ^= 1) {
    wait_for_copies();  // this tile is there, and nobody reads the one before
    if (first + kTileRows < call.keys) start(first + kTileRows, stage ^ 1);

    float tile[8][4];
    multiply_by_tile<T, channels>(tile, q, k_tile(stage));
    if (first + kTileRows > call.keys) {
      __syncwarp();  // a branch, then, and not a selection in every tile
#pragma unroll
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i)
          if (first + 8 * j + 2 * quarter() + i % 2 >= call.keys) tile[j][i] = -INFINITY;
    }
    softmax.weigh(tile, score_scale, sums);
    add_tile<T, channels>(sums, tile, v_tile(stage));
  }

  float inverse[2];
  for (int i = 0; i < 2; ++i) {
    const float total = row_sum(softmax.total[i]);
    inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
    const int query = place.first + warp_row() + group() + 8 * i;
    const float lse = (softmax.base[i] + log2f(total)) * kLn2;
    if (quarter() == 0 && query < call.queries)
      call.lse[place.index(call.heads, call.queries, query)] = total == 0.0f ? -INFINITY : lse;
  }
  __syncthreads();
  store_rows<T, channels>(call.out.at<T>(place, 0), call.out.row, place.first, call.queries, memory, sums, inverse);
}

// --- backward: weights once more, from the saved lse ---

// Of the block's queries, padded to whole tiles.
__device__ __forceinline__ Statistics* statistics_of(const LatentCall& call, const Place& place) {
  const int64_t padded = (int64_t{call.queries} + kTileRows - 1) / kTileRows * kTileRows;
  return call.statistics + place.index(call.heads, padded, 0);
}

// Every query against every key of its head: d_q, and the statistics of the queries.
template <class T, int channels>
__global__ void __launch_bounds__(kThreads) latent_attention_bwd_queries_kernel(LatentCall call) {
  constexpr int kTile = kTileSize<channels>;
  T* memory = aligned_memory<T>();
  const auto k_tile = [&](int stage) { return memory + 2 * stage * kTile; };
  const auto v_tile = [&](int stage) { return memory + (2 * stage + 1) * kTile; };
  const Place place(call.heads, call.queries);
  const T* k = call.k.at<const T>(place, 0);
  const T* v = call.v.at<const T>(place, 0);
  const auto start = [&](int first, int stage) {
    copy_tile<T, channels>(k_tile(stage), k, call.k.row, first, call.keys);
    copy_tile<T, channels>(v_tile(stage), v, call.v.row, first, call.keys);
    async_commit();
  };

  copy_tile<T, channels>(k_tile(1), call.q.at<const T>(place, 0), call.q.row, place.first, call.queries);
  copy_tile<T, channels>(v_tile(1), call.d_out.at<const T>(place, 0), call.d_out.row, place.first, call.queries);
  start(0, 0);
  wait_for_copies();
  Operands<channels> q, d_out;
  load_operands<channels>(q, k_tile(1));
  load_operands<channels>(d_out, v_tile(1));

  Statistics rows[2];
  for (int i = 0; i < 2; ++i) {
    const int query = place.first + warp_row() + group() + 8 * i;
    const bool exists = query < call.queries;
    float delta = 0.0f;
    if (exists) {
      const T* out = call.out.at<const T>(place, query) + 2 * quarter();
#pragma unroll
      for (int channel = 0; channel < channels; channel += 8) {
        const float2 x = unpack<T>(*reinterpret_cast<const uint32_t*>(out + channel));
        const float2 gradient = unpack<T>(d_out[channel / 16][channel / 8 % 2 * 2 + i]);
        delta += x.x * gradient.x + x.y * gradient.y;
      }
    }
    const float lse = exists ? call.lse[place.index(call.heads, call.queries, query)] : -INFINITY;
    rows[i] = {lse == -INFINITY ? INFINITY : lse * kLog2E, row_sum(delta)};
    if (quarter() == 0) statistics_of(call, place)[query] = rows[i];
  }

  const float score_scale = call.scale * kLog2E;
  Sums<channels> d_q = {};
  for (int first = 0, stage = 0; first < call.keys; first += kTileRows, stage ^= 1) {
    wait_for_copies();
    if (first + kTileRows < call.keys) start(first + kTileRows, stage ^ 1);
    const uint32_t address = channels_then_rows(k_tile(stage)), k_rows = rows_then_channels(k_tile(stage));
#pragma unroll 1
    for (int slice = 0; slice < kTileRows; slice += 16) {
      float d_scores[2][4], d_weights[2][4];
      multiply_by_rows<T, channels>(d_scores[0], d_scores[1], q, address + slice * kRowBytes, 0);
      multiply_by_rows<T, channels>(d_weights[0], d_weights[1], d_out, address + slice * kRowBytes,
                                    kTileBytes<channels>);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < 4; ++i) {
          const float weight = exp2_approx(d_scores[j][i] * score_scale - rows[i / 2].log2_total);
          d_scores[j][i] = weight * (d_weights[j][i] - rows[i / 2].delta);
        }
      }
      if (first + slice + 16 > call.keys) {
        __syncwarp();  // a branch, then, and not a selection in every slice
#pragma unroll
        for (int j = 0; j < 2; ++j)
          for (int i = 0; i < 4; ++i)
            if (first + slice + 8 * j + 2 * quarter() + i % 2 >= call.keys) d_scores[j][i] = 0.0f;
      }
      uint32_t operand[4];
      pack_operand<T>(operand, d_scores[0], d_scores[1]);
      add_rows<T, channels>(d_q, operand, k_rows + slice * kRowBytes, 0);
    }
  }
  __syncthreads();
  store_rows<T, channels>(call.d_q.at<T>(place, 0), call.d_q.row, place.first, call.queries, memory, d_q,
                          {call.scale, call.scale});
}

// Every key against every query of its head: d_k and d_v.
template <class T, int channels>
__global__ void __launch_bounds__(kThreads) latent_attention_bwd_keys_kernel(LatentCall call) {
  constexpr int kTile = kTileSize<channels>;
  T* memory = aligned_memory<T>();
  const auto q_tile = [&](int stage) { return memory + 2 * stage * kTile; };
  const auto d_out_tile = [&](int stage) { return memory + (2 * stage + 1) * kTile; };
  // Registers for all operands there are at 64 channels; at 128 the tile of v stays where it is.
  constexpr bool kHoldsV = channels == 64;
  T* v_tile = kHoldsV ? d_out_tile(1) : memory + 2 * kStages * kTile;
  Statistics* all_statistics = reinterpret_cast<Statistics*>(memory + (2 * kStages + !kHoldsV) * kTile);
  const Place place(call.heads, call.keys);
  const auto start = [&](int first, int stage) {
    copy_tile<T, channels>(q_tile(stage), call.q.at<const T>(place, 0), call.q.row, first, call.queries);
    copy_tile<T, channels>(d_out_tile(stage), call.d_out.at<const T>(place, 0), call.d_out.row, first, call.queries);
    const int two = static_cast<int>(threadIdx.x) * 2;  // rows that a copy takes along
    if (two < kTileRows) {
      async_copy_or_zeros(all_statistics + stage * kTileRows + two, statistics_of(call, place) + first + two,
                          first < call.queries);
    }
    async_commit();
  };

  copy_tile<T, channels>(q_tile(1), call.k.at<const T>(place, 0), call.k.row, place.first, call.keys);
  copy_tile<T, channels>(v_tile, call.v.at<const T>(place, 0), call.v.row, place.first, call.keys);
  start(0, 0);
  wait_for_copies();
  Operands<channels> k, v;
  load_operands<channels>(k, q_tile(1));
  if constexpr (kHoldsV) load_operands<channels>(v, v_tile);

  const uint32_t v_address = rows_then_channels(v_tile) + warp_row() * kRowBytes;
  const float score_scale = call.scale * kLog2E;
  Sums<channels> d_k = {}, d_v = {};
  for (int first = 0, stage = 0; first < call.queries; first += kTileRows, stage ^= 1) {
    wait_for_copies();
    if (first + kTileRows < call.queries) start(first + kTileRows, stage ^ 1);
    const uint32_t address = channels_then_rows(q_tile(stage)), q_rows = rows_then_channels(q_tile(stage));
    const Statistics* columns = all_statistics + stage * kTileRows + 2 * quarter();
#pragma unroll 1
    for (int slice = 0; slice < kTileRows; slice += 16) {
      float weights[2][4], d_scores[2][4];
      multiply_by_rows<T, channels>(weights[0], weights[1], k, address + slice * kRowBytes, 0);
      if constexpr (kHoldsV) {
        multiply_by_rows<T, channels>(d_scores[0], d_scores[1], v, address + slice * kRowBytes, kTileBytes<channels>);
      } else {
        multiply_by_rows<T, channels>(d_scores[0], d_scores[1], v_address, address + slice * kRowBytes,
                                      kTileBytes<channels>);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < 4; ++i) {
          const Statistics& column = columns[slice + 8 * j + i % 2];
          weights[j][i] = exp2_approx(weights[j][i] * score_scale - column.log2_total);
          d_scores[j][i] = weights[j][i] * (d_scores[j][i] - column.delta);
        }
      }
      uint32_t operand[4];
      pack_operand<T>(operand, weights[0], weights[1]);
      add_rows<T, channels>(d_v, operand, q_rows + slice * kRowBytes, kTileBytes<channels>);
      pack_operand<T>(operand, d_scores[0], d_scores[1]);
      add_rows<T, channels>(d_k, operand, q_rows + slice * kRowBytes, 0);
    }
  }
  __syncthreads();
  store_rows<T, channels>(call.d_k.at<T>(place, 0), call.d_k.row, place.first, call.keys, memory, d_k,
                          {call.scale, call.scale});
  store_rows<T, channels>(call.d_v.at<T>(place, 0), call.d_v.row, place.first, call.keys, memory + kTile, d_v,
                          {1.0f, 1.0f});
}

// --- calls ---

LatentCall call_of(const LatentInputs& inputs, const LatentOutputs& outputs) {
  LatentCall call;
  call.q = Heads(inputs.q);
  call.k = Heads(inputs.k);
  call.v = Heads(inputs.v);
  call.out = Heads(outputs.out);
  call.lse = outputs.lse.as<float>();
  call.heads = static_cast<int>(inputs.q.size(1));
  call.queries = static_cast<int>(inputs.q.size(2));
  call.keys = static_cast<int>(inputs.k.size(2));
  call.scale = static_cast<float>(inputs.scale);
  return call;
}

// A block for every tile of a tensor's rows.
template <int channels>
Status launch_tiles(void (*kernel)(LatentCall), const LatentCall& call, const TensorView& rows, size_t further,
                    Stream stream) {
  const int64_t blocks = rows.size(0) * rows.size(1) * ceil_div(rows.size(2), kTileRows);
  const size_t tiles = 2 * kStages * kTileSize<channels> * sizeof(uint16_t);
  return launch(kernel, blocks, kThreads, kSwizzleBytes + tiles + further, stream, call);
}

template <class T, int channels>
Status backward(const LatentCall& call, const LatentInputs& inputs, Stream stream) {
  const Status status =
      launch_tiles<channels>(latent_attention_bwd_queries_kernel<T, channels>, call, inputs.q, 0, stream);
  if (status.code != 0) return status;
  return launch_tiles<channels>(latent_attention_bwd_keys_kernel<T, channels>, call, inputs.k,
                                kStages * kTileRows * sizeof(Statistics) + (channels == 64 ? 0 : kTileBytes<channels>),
                                stream);
}

}  // namespace

Status latent_attention_fwd(const LatentInputs& inputs, const LatentOutputs& outputs, Stream stream) {
  const LatentCall call = call_of(inputs, outputs);
  const auto forward = [&](auto kernel_64, auto kernel_128) {
    return inputs.q.size(3) == 64 ? launch_tiles<64>(kernel_64, call, inputs.q, 0, stream)
                                  : launch_tiles<128>(kernel_128, call, inputs.q, 0, stream);
  };
  return inputs.q.dtype == DType::bfloat16
             ? forward(latent_attention_fwd_kernel<BFloat16, 64>, latent_attention_fwd_kernel<BFloat16, 128>)
             : forward(latent_attention_fwd_kernel<Float16, 64>, latent_attention_fwd_kernel<Float16, 128>);
}

Status latent_attention_bwd(const LatentInputs& inputs, const LatentOutputs& saved, const TensorView& d_out,
                            const TensorView& statistics, const LatentGradients& gradients, Stream stream) {
  LatentCall call = call_of(inputs, saved);
  call.d_out = Heads(d_out);
  call.d_q = Heads(gradients.q);
  call.d_k = Heads(gradients.k);
  call.d_v = Heads(gradients.v);
  call.statistics = statistics.as<Statistics>();
  const bool narrow = inputs.q.size(3) == 64;
  if (inputs.q.dtype == DType::bfloat16)
    return narrow ? backward<BFloat16, 64>(call, inputs, stream) : backward<BFloat16, 128>(call, inputs, stream);
  return narrow ? backward<Float16, 64>(call, inputs, stream) : backward<Float16, 128>(call, inputs, stream);
}

}  // namespace cuda
}  // namespace pk
