// What separable_query_attention's kernels share: a call's arguments, the parts of a score, dropout, and what backward
// is given.
//
// A query's outer position is that in all axes but the last, the columns. A form is [B|1, H, entries, N]: the data
// channels' entries, the outer tables', the columns'. Scores are in powers of two.
#pragma once

#include <cfloat>

#include "launch.h"
#include "philox.h"
#include "separable_query_tiles.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kNarrow = 64, kWide = 128;  // channels of a product

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

// --- backward ---

// d_out [B, M, H, Dv]; reference and delta [B, H, M].
template <class T>
struct Saved {
  const T* d_out;
  const float *reference, *delta;
};

constexpr int kBackwardTiles = 2, kBackwardRows = 2 * kBackwardTiles, kWarpRows = 16 * kBackwardTiles;
constexpr int kBackwardWarps = 4, kBackwardThreads = 32 * kBackwardWarps;

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
}  // namespace cuda
}  // namespace pk
