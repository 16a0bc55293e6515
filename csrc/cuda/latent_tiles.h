// What the kernels of latent_attention are made of: tiles of 64 rows in shared memory, and products of a warp's 16 rows
// with them. A block is four warps, each with 16 rows of a tile of its own.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "launch.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kThreads = 128, kTileRows = 64, kWarpRows = 16;
// Channels of a panel: 64 rows of 128 bytes each. A tile is one panel or two.
constexpr int kPanelWidth = 64, kVector = 8;
constexpr int kStages = 2;
constexpr size_t kSwizzleBytes = 1024;  // what the swizzle repeats after, and tiles are aligned to

// The head of a block and the first of its rows. Neighbours share a head, so that what they all read stays in the
// cache.
struct Place {
  int batch, head, first;

  __device__ Place(int heads, int rows) {
    const int tiles = (rows + kTileRows - 1) / kTileRows, head_in_all = static_cast<int>(blockIdx.x) / tiles;
    batch = head_in_all / heads;
    head = head_in_all % heads;
    first = static_cast<int>(blockIdx.x) % tiles * kTileRows;
  }

  // Of a row of a (batch, heads, rows) tensor without gaps.
  __device__ int64_t index(int heads, int64_t rows, int row) const {
    return (int64_t{batch} * heads + head) * rows + row;
  }
};

// A (batch, heads, rows, channels) tensor whose channels are contiguous and whose rows start at multiples of 16 bytes.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides

  Heads() = default;
  explicit Heads(const TensorView& view)
      : data(view.data), batch(view.stride(0)), head(view.stride(1)), row(view.stride(2)) {}

  template <class T>
  __device__ T* at(const Place& place, int64_t index) const {
    return static_cast<T*>(data) + place.batch * batch + place.head * head + index * row;
  }
};

// --- a lane's part of 16 rows, as primitives.h describes it ---

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % warpSize; }
__device__ __forceinline__ int group() { return lane() / 4; }
__device__ __forceinline__ int quarter() { return lane() % 4; }
__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / warpSize * kWarpRows; }

// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return pack_bfloat16(low, high);
  else
    return pack_half(low, high);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  else
    return make_float2(half_to_float(static_cast<uint16_t>(pair)), half_to_float(static_cast<uint16_t>(pair >> 16)));
}

// A result of 16 columns as the left operand of the next product.
template <class T>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// 16 rows x channels: left operands of products over channels; sums over rows.
template <int channels>
using Operands = uint32_t[channels / 16][4];
template <int channels>
using Sums = float[channels / kPanelWidth][kPanelWidth / 8][4];

// --- tiles ---

// Eight channels lie together, and the eight such pieces of a panel's row in the order of their number XOR the row's,
// so that what a warp reads at once, eight rows of a piece, is in different banks. Tensor cores know it as the 128-byte
// swizzle.
__device__ __forceinline__ int in_tile(int row, int channel) {
  const int panel = channel / kPanelWidth, piece = channel % kPanelWidth / kVector;
  return (panel * kTileRows + row) * kPanelWidth + (piece ^ row % 8) * kVector + channel % kVector;
}

constexpr int kPieceBytes = 16, kRowBytes = 128, kPanelBytes = kTileRows * kRowBytes;
template <int channels>
constexpr int kTileSize = kTileRows * channels;  // elements, of 16 bits
template <int channels>
constexpr int kTileBytes = 2 * kTileSize<channels>;

// From the address of channels 0 to 15 to that of the 16 channels of step k: pieces differ in bits that a tile's
// address and rows leave 0, so that one XOR leads from step to step.
__device__ __forceinline__ uint32_t at_step(uint32_t address, int k) {
  return (address ^ k % 4 * 2 * kPieceBytes) + k / 4 * kPanelBytes;
}

// Where a lane reads the matrices of 16 rows and 16 channels from, in the order of left operands: rows in pairs of
// matrices, then channels.
__device__ __forceinline__ uint32_t rows_then_channels(const void* tile) {
  return shared_address(tile) + 2 * in_tile(lane() % 16, lane() / 16 * 8);
}

// In the order of two right operands whose columns are rows of the tile: channels, then rows.
__device__ __forceinline__ uint32_t channels_then_rows(const void* tile) {
  return shared_address(tile) + 2 * in_tile(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 8);
}

// The block's shared memory from where the swizzle begins anew; the launch asks for kSwizzleBytes more.
template <class T>
__device__ __forceinline__ T* aligned_memory() {
  unsigned char* memory = shared_memory<unsigned char>();
  return reinterpret_cast<T*>(memory + (0u - shared_address(memory)) % kSwizzleBytes);
}

// Starts to copy rows `first` and following of a matrix; those that it does not have become zeros.
template <class T, int channels>
__device__ __forceinline__ void copy_tile(T* tile, const T* matrix, int64_t stride, int first, int rows) {
  constexpr int kPieces = channels / kVector, kStep = kThreads / kPieces;  // rows that are copied at once
  const int row = static_cast<int>(threadIdx.x) / kPieces, channel = static_cast<int>(threadIdx.x) % kPieces * kVector;
  const T* source = matrix + (first + row) * stride + channel;
  T* target = tile + in_tile(row, channel);
#pragma unroll
  for (int i = 0; i < kTileRows; i += kStep) {
    async_copy_or_zeros(target + i * kPanelWidth, source, first + row + i < rows);
    source += kStep * stride;
  }
}

// This warp's 16 rows of a tile as left operands.
template <int channels>
__device__ __forceinline__ void load_operands(Operands<channels>& a, const void* tile) {
  const uint32_t address = rows_then_channels(tile) + warp_row() * kRowBytes;
#pragma unroll
  for (int k = 0; k < channels / 16; ++k) load_matrices(a[k], at_step(address, k));
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>)
    mma_bfloat16(d, a, b);
  else
    mma_half(d, a, b);
}

// d (16 x 16) = a times the transpose of 16 rows of a tile; address: channels_then_rows, of a tile so many bytes
// before.
template <class T, int channels>
__device__ __forceinline__ void multiply_by_rows(float (&left)[4], float (&right)[4], const Operands<channels>& a,
                                                 uint32_t address, int offset) {
  for (int i = 0; i < 4; ++i) left[i] = right[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < channels / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, at_step(address, k) + offset);
    mma<T>(left, a[k], {b[0], b[1]});
    mma<T>(right, a[k], {b[2], b[3]});
  }
}

// The same with a still in shared memory, at rows_then_channels.
template <class T, int channels>
__device__ __forceinline__ void multiply_by_rows(float (&left)[4], float (&right)[4], uint32_t a_address,
                                                 uint32_t address, int offset) {
  for (int i = 0; i < 4; ++i) left[i] = right[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < channels / 16; ++k) {
    uint32_t a[4], b[4];
    load_matrices(a, at_step(a_address, k));
    load_matrices(b, at_step(address, k) + offset);
    mma<T>(left, a, {b[0], b[1]});
    mma<T>(right, a, {b[2], b[3]});
  }
}

// sums (16 x channels) += a (16 x 16) times 16 rows of a tile; address: rows_then_channels, so many bytes before.
template <class T, int channels>
__device__ __forceinline__ void add_rows(Sums<channels>& sums, const uint32_t (&a)[4], uint32_t address, int offset) {
#pragma unroll
  for (int k = 0; k < channels / 16; ++k) {
    uint32_t b[4];
    load_matrices_transposed(b, at_step(address, k) + offset);
    mma<T>(sums[k / 4][k % 4 * 2], a, {b[0], b[1]});
    mma<T>(sums[k / 4][k % 4 * 2 + 1], a, {b[2], b[3]});
  }
}

// --- a tile of keys as a whole: scores of this warp's 16 queries, and weighted sums of values ---

#if defined(PK_WARPGROUP_PRODUCTS)

// Blocks that are to fit into a multiprocessor, of whose memory they take 33 and 65 KB.
template <int channels>
constexpr int kForwardBlocks = channels == 64 ? 4 : 3;

template <bool rows, class T>
__device__ __forceinline__ void warpgroup_product(float (&d)[8][4], const uint32_t (&a)[4], uint64_t tile, int offset,
                                                  bool accumulate) {
  const uint64_t b = tile + offset / 16;  // bytes; descriptors count in 16 of them
  if constexpr (std::is_same_v<T, BFloat16>)
    warpgroup_product_bfloat16<rows>(d, a, b, accumulate);
  else
    warpgroup_product_half<rows>(d, a, b, accumulate);
}

// products (16 x 64) = q times the transpose of the tile.
template <class T, int channels>
__device__ __forceinline__ void multiply_by_tile(float (&products)[8][4], const Operands<channels>& q, const T* tile) {
  const uint64_t matrix = swizzled_matrix(shared_address(tile));
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < channels / 16; ++k)
    warpgroup_product<false, T>(products, q[k], matrix, k / 4 * kPanelBytes + k % 4 * 2 * kPieceBytes, k > 0);
  warpgroup_commit();
  warpgroup_wait();
  for (auto& product : products) pin(product);
}

// sums (16 x channels) += weights (16 x 64) times the tile.
template <class T, int channels>
__device__ __forceinline__ void add_tile(Sums<channels>& sums, const float (&weights)[8][4], const T* tile) {
  uint32_t operands[4][4];
  for (int j = 0; j < 4; ++j) {
    pack_operand<T>(operands[j], weights[2 * j], weights[2 * j + 1]);
    pin(operands[j]);
  }
  for (auto& panel : sums)
    for (auto& sum : panel) pin(sum);
  const uint64_t matrix = swizzled_matrix(shared_address(tile));
  warpgroup_fence();
#pragma unroll
  for (int j = 0; j < 4; ++j)
    for (int panel = 0; panel < channels / kPanelWidth; ++panel)
      warpgroup_product<true, T>(sums[panel], operands[j], matrix, panel * kPanelBytes + 16 * j * kRowBytes, true);
  warpgroup_commit();
  warpgroup_wait();
  for (auto& panel : sums)
    for (auto& sum : panel) pin(sum);
}

#else

template <int channels>
constexpr int kForwardBlocks = channels == 64 ? 3 : 2;

// products (16 x 64) = q times the transpose of the tile.
template <class T, int channels>
__device__ __forceinline__ void multiply_by_tile(float (&products)[8][4], const Operands<channels>& q, const T* tile) {
  const uint32_t address = channels_then_rows(tile);
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    multiply_by_rows<T, channels>(products[j], products[j + 1], q, address, 8 * j * kRowBytes);
}

// sums (16 x channels) += weights (16 x 64) times the tile.
template <class T, int channels>
__device__ __forceinline__ void add_tile(Sums<channels>& sums, const float (&weights)[8][4], const T* tile) {
  const uint32_t address = rows_then_channels(tile);
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t operand[4];
    pack_operand<T>(operand, weights[j], weights[j + 1]);
    add_rows<T, channels>(sums, operand, address, 8 * j * kRowBytes);
  }
}

#endif

// Until the copies that were started are there, for all threads and for the products.
__device__ __forceinline__ void wait_for_copies() {
  async_wait<0>();
#if defined(PK_WARPGROUP_PRODUCTS)
  async_proxy_fence();
#endif
  __syncthreads();
}

// Writes this warp's 16 rows of sums, times a factor for each of a lane's two rows, to rows `first` and following of a
// matrix, by way of a tile that no other warp's rows of matter.
template <class T, int channels>
__device__ __forceinline__ void store_rows(T* matrix, int64_t stride, int first, int rows, T* tile,
                                           const Sums<channels>& sums, const float (&factors)[2]) {
#pragma unroll
  for (int channel = 0; channel < channels; channel += 8) {
    const auto& sum = sums[channel / kPanelWidth][channel % kPanelWidth / 8];
    for (int i = 0; i < 2; ++i) {
      T* target = tile + in_tile(warp_row() + group() + 8 * i, channel + 2 * quarter());
      *reinterpret_cast<uint32_t*>(target) = pack<T>(sum[2 * i] * factors[i], sum[2 * i + 1] * factors[i]);
    }
  }
  __syncwarp();
  constexpr int kPieces = channels / kVector, kStep = 32 / kPieces;
  const int channel = lane() % kPieces * kVector;
#pragma unroll
  for (int i = 0; i < kWarpRows; i += kStep) {
    const int row = warp_row() + i + lane() / kPieces;
    if (first + row >= rows) continue;
    *reinterpret_cast<uint4*>(matrix + (first + row) * stride + channel) =
        *reinterpret_cast<const uint4*>(tile + in_tile(row, channel));
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pk
