// Separable attention of 5 to 128 data channels: the products with channels in tensor cores, forward and the gradients
// of its rows (docs/cuda.md). a . x is a product of TensorFloat-32 numbers, sums of x times weights are another;
// tables, marginals and exponentials are float32 in the registers between them.
#include "separable_products.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// A warp's tile of scores: rows by the columns of a strip at two outer positions, 8 tokens a product.
constexpr int kPositions = 2, kHalves = kColumns / 8, kTokenTiles = kPositions * kHalves;
// Of a quantity of a tile row in shared memory: channels side by side meet every bank once. After r follow kHeader.
constexpr int kQuantityStride = kColumns + 8;

// Kernels for up to 8 K channels. A warp has 16 M rows.
template <int K, bool backward>
struct Shape {
  static constexpr int M = K < (backward ? 8 : 16) ? 2 : 1;
  static constexpr int row_tiles = M * kWarps, rows = 16 * row_tiles;
  static constexpr int tile_floats = (8 * K + 1) * kQuantityStride;
  static constexpr int stage_positions = K == 16 ? kPositions : 16 / K, stages = K == 16 && backward ? 1 : 2;
};

// What a block has of a linear form, as lanes take it.
template <int K, bool backward>
struct FormMemory {
  using Own = Shape<K, backward>;
  float4 channels[K][Own::row_tiles][32];     // the product's operand, eight channels by 16 rows
  float4 columns[Own::M][kHalves][kThreads];  // the strip's table
};

template <int K, bool backward>
struct BlockMemory {
  FormMemory<K, backward> forms[backward ? 2 : 1];  // of the scores; of u
  float tokens[Shape<K, backward>::stages][Shape<K, backward>::stage_positions * Shape<K, backward>::tile_floats];
  Share share;
};

// --- products ---

// `products` of TensorFloat-32 numbers, of which tensor cores cut off the low 13 bits, make one of float32: three of
// rounded numbers and what rounding took from them; two where the second operand is exact as it is; or one, of numbers
// made larger by what is cut off on average.
enum class Digits { all, exact, first };

constexpr Digits first_digits(int products) { return products == 1 ? Digits::first : Digits::all; }
constexpr Digits second_digits(int products) { return products == 2 ? Digits::exact : first_digits(products); }
constexpr float kMore = 1.0f + 0.7213f / 2048;

template <int count, Digits digits>
struct Operand {
  uint32_t high[count], low[count];

  __device__ __forceinline__ void set(int i, float value) {
    if (digits == Digits::first) value *= kMore;
    high[i] = __float_as_uint(value);
    if (digits != Digits::all) return;
    high[i] = (high[i] + 0x1000) & 0xFFFFE000;  // may make NaN a number: not so what is left
    low[i] = __float_as_uint(value - __uint_as_float(high[i]));
  }
};
template <int products>
using First = Operand<4, first_digits(products)>;
template <int products>
using Second = Operand<2, second_digits(products)>;

// Small terms have sums of their own: a tensor core cuts off what it adds.
template <int products>
__device__ __forceinline__ void multiply(float (&sum)[4], float (&small)[4], const First<products>& a,
                                         const Second<products>& b) {
  mma_tf32(sum, a.high, b.high);
  if (products > 1) mma_tf32(small, a.low, b.high);
  if (products > 2) mma_tf32(small, a.high, b.low);
}

// A lane's pairs: of each tile rows group and group + 8, columns 2 quarter and 2 quarter + 1.
template <int M>
using Pairs = float[M][kTokenTiles][4];

__device__ __forceinline__ int tile_offset(int n, int tile_floats) {
  return n / kHalves * tile_floats + n % kHalves * 8;
}

// A linear form's data channels, `steps` times eight.
template <int M, int products>
__device__ __forceinline__ void form_product(Pairs<M>& value, const float4* channels, int row_tiles,
                                             const float* tokens, int tile_floats, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Pairs<M> small;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kTokenTiles; ++n)
      for (int e = 0; e < 4; ++e) value[m][n][e] = small[m][n][e] = 0.0f;
  const float* token = tokens + lane % 4 * kQuantityStride + lane / 4;
#pragma unroll 1
  for (int k = 0; k < steps; ++k, channels += row_tiles * 32, token += 8 * kQuantityStride) {
    First<products> a[M];
    for (int m = 0; m < M; ++m) {
      const float4 four = channels[m * 32];
      a[m].set(0, four.x), a[m].set(1, four.y), a[m].set(2, four.z), a[m].set(3, four.w);
    }
    for (int n = 0; n < kTokenTiles; ++n) {
      Second<products> b;
      b.set(0, token[tile_offset(n, tile_floats)]);
      b.set(1, token[tile_offset(n, tile_floats) + 4 * kQuantityStride]);
      for (int m = 0; m < M; ++m) multiply<products>(value[m][n], small[m][n], a[m], b);
    }
  }
  if (products > 1)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < kTokenTiles; ++n)
        for (int e = 0; e < 4; ++e) value[m][n][e] += small[m][n][e];
}

// Adds the tokens' channels times weights to sums. The lane's own pairs are the operand: its inner places quarter and
// quarter + 4 are said to be tokens 2 quarter and 2 quarter + 1, so no lane exchanges anything.
template <int K, int M, int products>
__device__ __forceinline__ void add_products(float (&acc)[K][M][4], const Pairs<M>& weights, const float* tokens,
                                             int tile_floats, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* token = tokens + lane / 4 * kQuantityStride + lane % 4 * 2;
  First<products> a[M][kTokenTiles];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kTokenTiles; ++n) {
      a[m][n].set(0, weights[m][n][0]), a[m][n].set(1, weights[m][n][2]);
      a[m][n].set(2, weights[m][n][1]), a[m][n].set(3, weights[m][n][3]);
    }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= steps) break;
    float sum[M][4] = {}, small[M][4] = {};
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 two =
          *reinterpret_cast<const float2*>(token + 8 * k * kQuantityStride + tile_offset(n, tile_floats));
      Second<products> b;
      b.set(0, two.x), b.set(1, two.y);
      for (int m = 0; m < M; ++m) multiply<products>(sum[m], small[m], a[m][n], b);
    }
    for (int m = 0; m < M; ++m)
      for (int e = 0; e < 4; ++e) acc[k][m][e] += sum[m][e] + small[m][e];
  }
}

// --- a warp's rows ---

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, 2));
}
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFF, value, 2);
}

// A number for each of a lane's rows: group and group + 8 of each tile of rows.
template <int M>
using PerRow = float[M][2];

// A row's entries of the tables of the outer axes at a position: call(entry) for each axis.
template <class Call>
__device__ __forceinline__ void each_outer_entry(const Grid& grid, const OuterIndex& index, const Call& call) {
  if (grid.outer_axes > 0) call(index.at[0]);
  if (grid.outer_axes > 1) call(grid.sizes[0] + index.at[1]);
  if (grid.outer_axes > 2) call(grid.sizes[0] + grid.sizes[1] + index.at[2]);
}

// A lane's rows of a linear form in global memory, entries [c + S_1 + ..., rows], times a factor. Rows that do not
// exist read as the last one that does.
template <int M>
struct LaneForm {
  const float* entries;
  PerRow<M> factor;

  __device__ float operator()(const Grid& grid, int first_row, int entry, int m, int h) const {
    const int row = min(first_row + 16 * m + 8 * h, grid.rows - 1);
    return entries[int64_t{entry} * grid.rows + row] * factor[m][h];
  }

  __device__ void outer(PerRow<M>& sum, const Grid& grid, int first_row, const OuterIndex& index) const {
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = 0.0f;
    each_outer_entry(grid, index, [&](int entry) {
      const float* of_entry = entries + int64_t{grid.channels + entry} * grid.rows;
      for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h)
          sum[m][h] += of_entry[min(first_row + 16 * m + 8 * h, grid.rows - 1)] * factor[m][h];
    });
  }

  // The table of a strip's columns to the lane's place in shared memory; `beyond` past its end.
  __device__ void store_columns(float4 (&columns)[M][kHalves][kThreads], const Grid& grid, int first_row, int strip,
                                float beyond) const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int m = 0; m < M; ++m)
      for (int half = 0; half < kHalves; ++half) {
        float value[4];
        for (int e = 0; e < 4; ++e) {
          const int column = strip * kColumns + 8 * half + thread % 4 * 2 + e % 2;
          const int entry = grid.channels + grid.outer_entries + column;
          value[e] = column < grid.columns ? (*this)(grid, first_row, entry, m, e / 2) : beyond;
        }
        columns[m][half][thread] = make_float4(value[0], value[1], value[2], value[3]);
      }
  }
};

// What a warp does with its rows; forward, sums of p = 2^(score - reference), backward, of dS = p (u - delta).
template <int K, bool backward, int products>
struct WarpRows {
  using Own = Shape<K, backward>;
  static constexpr int M = Own::M;

  const RowsTask& task;
  BlockMemory<K, backward>& memory;
  int first_row;  // the lane's first
  LaneForm<M> scores, upstream;
  PerRow<M> reference, delta, total;
  float acc[K][M][4];
  float marginal[M][kHalves][4];

  __device__ WarpRows(const RowsTask& task, BlockMemory<K, backward>& memory) : task(task), memory(memory) {
    const Grid& grid = task.grid;
    const Share& share = memory.share;
    first_row = share.first_row + warp() * 16 * M + lane() / 4;
    scores.entries = task.form + share.batch * grid.form_batch;
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) {
        scores.factor[m][h] = kLog2E, reference[m][h] = -kInfinity, total[m][h] = 0.0f;
        for (int k = 0; k < K; ++k) acc[k][m][2 * h] = acc[k][m][2 * h + 1] = 0.0f;
      }
    if (backward) {
      upstream.entries = task.upstream + int64_t{share.batch} * grid.entries() * grid.rows;
      for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h) {
          const int64_t row = min(first_row + 16 * m + 8 * h, grid.rows - 1);
          const float* statistics = task.statistics + int64_t{share.batch} * 4 * grid.padded_rows + row;
          reference[m][h] = statistics[0];
          upstream.factor[m][h] = statistics[grid.padded_rows];
          delta[m][h] = statistics[2 * grid.padded_rows];
        }
    }
    each_outer_sum([](float& sum) { sum = 0.0f; });
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ int steps() const { return (task.grid.channels + 7) / 8; }
  // Whether some of the warp's rows exist.
  __device__ bool works() const { return first_row - lane() / 4 < task.grid.rows; }

  // The outer marginals of the lane's own row, one of those that the four lanes of a quarter have together.
  __device__ bool has_own_row() const { return lane() % 4 < 2 * M; }
  __device__ float own(const PerRow<M>& values) const {
    const bool lower = lane() % 2 != 0, second_tile = lane() % 4 / 2 == M - 1;
    const float first = lower ? values[0][1] : values[0][0], last = lower ? values[M - 1][1] : values[M - 1][0];
    return second_tile ? last : first;
  }
  __device__ float* outer_sum(int entry) const {
    return memory.share.outer_sum(task, entry) + first_row + lane() % 4 * 8;
  }
  template <class Call>
  __device__ void each_outer_sum(const Call& call) const {
    const Share& share = memory.share;
    if (!works() || !has_own_row() || task.grid.outer_axes == 0) return;
    const bool one = task.grid.outer_axes == 1;
    const int last = one ? share.last : task.grid.outer_entries;
#pragma unroll 1
    for (int entry = one ? share.first : 0; entry < last; ++entry) call(*outer_sum(entry));
  }

  // call(sum, m, half, e) for the column marginals of a strip.
  template <class Call>
  __device__ __forceinline__ void each_column_sum(int strip, const Call& call) const {
    for (int half = 0; half < kHalves; ++half)
      for (int e = 0; e < 4; ++e) {
        const int column = strip * kColumns + 8 * half + lane() % 4 * 2 + e % 2;
        if (column >= task.grid.columns) continue;
        float* sum = memory.share.column_sum(task, column) + first_row + e / 2 * 8;
        for (int m = 0; m < M; ++m) call(sum[16 * m], m, half, e);
      }
  }

  __device__ void begin_strip(int strip) {
    scores.store_columns(memory.forms[0].columns, task.grid, first_row, strip, -kInfinity);
    if (backward) upstream.store_columns(memory.forms[backward].columns, task.grid, first_row, strip, 0.0f);
    for (int m = 0; m < M; ++m)
      for (int half = 0; half < kHalves; ++half)
        for (int e = 0; e < 4; ++e) marginal[m][half][e] = 0.0f;
  }

  // r (channels . x + (table + outer)) - constant.
  __device__ __forceinline__ void linear_form(Pairs<M>& value, const FormMemory<K, backward>& form, const float* tokens,
                                              const PerRow<M> (&outer)[kPositions], const PerRow<M>& constant) const {
    form_product<M, products>(value, form.channels[0][warp() * M] + lane(), Own::row_tiles, tokens, Own::tile_floats,
                              steps());
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 r = factors(tokens, n);
      for (int m = 0; m < M; ++m) {
        const float4 column = form.columns[m][n % kHalves][threadIdx.x];
        const float table[4] = {column.x, column.y, column.z, column.w};
        for (int e = 0; e < 4; ++e) {
          const float sum = value[m][n][e] + (table[e] + outer[n / kHalves][m][e / 2]);
          value[m][n][e] = fmaf(e % 2 ? r.y : r.x, sum, -constant[m][e / 2]);
        }
      }
    }
  }
  // r of the lane's tokens.
  __device__ __forceinline__ float2 factors(const float* tokens, int n) const {
    const float* r = tokens + 8 * K * kQuantityStride + tile_offset(n, Own::tile_floats);
    return *reinterpret_cast<const float2*>(r + lane() % 4 * 2);
  }

  // Adds the tokens at two outer positions, the second perhaps past the last: then it has no tokens.
  __device__ __forceinline__ void attend(const float* tokens, int strip, int position, OuterIndex& index) {
    const Grid& grid = task.grid;
    const bool both = position + 1 < memory.share.last;
    PerRow<M> outer[kPositions] = {}, d_outer[kPositions] = {};
    OuterIndex second = index;
    second.next(grid);
    scores.outer(outer[0], grid, first_row, index);
    if (both) scores.outer(outer[1], grid, first_row, second);
    if (backward) {
      upstream.outer(d_outer[0], grid, first_row, index);
      if (both) upstream.outer(d_outer[1], grid, first_row, second);
    }

    Pairs<M> p;
    do {
      PerRow<M> constant;
      for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h) constant[m][h] = reference[m][h] == -kInfinity ? 0.0f : reference[m][h];
      linear_form(p, memory.forms[0], tokens, outer, constant);
      leave_out_masked(p, tokens);
    } while (!backward && reference_rises(p, strip, position));
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < kTokenTiles; ++n)
        for (float& value : p[m][n]) value = exp2_approx(value);
    if (backward) {
      Pairs<M> u;
      linear_form(u, memory.forms[backward], tokens, d_outer, delta);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < kTokenTiles; ++n)
          for (int e = 0; e < 4; ++e) p[m][n][e] *= u[m][n][e];
    }

    PerRow<M> outer_weight[kPositions] = {};
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 r = factors(tokens, n);
      for (int m = 0; m < M; ++m)
        for (int e = 0; e < 4; ++e) {
          if (!backward) total[m][e / 2] += p[m][n][e];
          p[m][n][e] *= e % 2 ? r.y : r.x;
          marginal[m][n % kHalves][e] += p[m][n][e];
          outer_weight[n / kHalves][m][e / 2] += p[m][n][e];
        }
    }
    add_outer(outer_weight[0], index);
    if (both) add_outer(outer_weight[1], second);
    add_products<K, M, products>(acc, p, tokens, Own::tile_floats, steps());
    index = second;
    index.next(grid);
  }

  __device__ __forceinline__ void add_outer(const PerRow<M>& weight, const OuterIndex& index) const {
    PerRow<M> sum;
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) sum[m][h] = quad_sum(weight[m][h]);
    const float value = own(sum);
    if (has_own_row()) each_outer_entry(task.grid, index, [&](int entry) { *outer_sum(entry) += value; });
  }

  // Tokens that are not there have scores of -inf.
  __device__ __forceinline__ void leave_out_masked(Pairs<M>& value, const float* tokens) const {
    const float* header = tokens + 8 * K * kQuantityStride + kColumns;
    const uint32_t there[] = {__float_as_uint(header[0]), __float_as_uint(header[Own::tile_floats])};
    if ((there[0] & there[1]) == kAllThere) return;
    for (int n = 0; n < kTokenTiles; ++n)
      for (int e = 0; e < 4; ++e)
        if (!(there[n / kHalves] >> (n % kHalves * 8 + lane() % 4 * 2 + e % 2) & 1))
          for (int m = 0; m < M; ++m) value[m][n][e] = -kInfinity;
  }

  // Whether some scores lie far above their rows' references, or rows have none yet: then the largest become the
  // references, and what the rows have summed up is scaled down to them.
  __device__ __forceinline__ bool reference_rises(const Pairs<M>& score, int strip, int position) {
    PerRow<M> largest;
    bool rises = false;
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) {
        largest[m][h] = -kInfinity;
        for (int n = 0; n < kTokenTiles; ++n)
          largest[m][h] = fmaxf(largest[m][h], fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
        rises = rises || largest[m][h] > margin(reference[m][h]);
      }
    if (!__any_sync(0xFFFFFFFF, rises)) return false;
    PerRow<M> factor;
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) {
        float& own_reference = reference[m][h];
        const bool none = own_reference == -kInfinity;
        const float most = quad_max(largest[m][h]), rise = most > margin(own_reference) ? most : 0.0f;
        factor[m][h] = none ? 0.0f : exp2_approx(-rise);
        if (most > margin(own_reference)) own_reference = none ? most : own_reference + most;
        total[m][h] *= factor[m][h];
      }
    for (int m = 0; m < M; ++m)
      for (int e = 0; e < 4; ++e) {
        for (int k = 0; k < K; ++k) acc[k][m][e] *= factor[m][e / 2];
        for (int half = 0; half < kHalves; ++half) marginal[m][half][e] *= factor[m][e / 2];
      }
    const Share& share = memory.share;
    if (strip == share.first_strip && position == share.first) return true;
    const float own_factor = own(factor);
    each_outer_sum([&](float& sum) { sum *= own_factor; });
#pragma unroll 1
    for (int earlier = share.first_strip; earlier < strip; ++earlier)
      each_column_sum(earlier, [&](float& sum, int m, int, int e) { sum *= factor[m][e / 2]; });
    return true;
  }
  __device__ static float margin(float reference) { return reference == -kInfinity ? -kInfinity : kLazyMargin; }

  __device__ void leave_strip(int strip) const {
    each_column_sum(strip, [&](float& sum, int m, int half, int e) { sum = marginal[m][half][e]; });
  }

  // The block's states: acc; forward the sum of the weights and, after a place for it after dropout, the reference.
  __device__ void leave() const {
    const Grid& grid = task.grid;
    const Share& share = memory.share;
    for (int k = 0; k < K; ++k)
      for (int m = 0; m < M; ++m)
        for (int e = 0; e < 4; ++e) {
          const int channel = 8 * k + lane() % 4 * 2 + e % 2;
          if (channel < grid.channels) share.state(task, channel)[first_row + 16 * m + e / 2 * 8] = acc[k][m][e];
        }
    for (int m = 0; m < M && !backward; ++m)
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(total[m][h]);
        const int row = first_row + 16 * m + 8 * h;
        if (lane() % 4 == 0) share.state(task, grid.channels)[row] = sum;
        if (lane() % 4 == 1) share.state(task, grid.channels + 2)[row] = reference[m][h];
      }
  }
};

// --- a block's memory ---

// A linear form's coefficients of the data channels, zeros past the last.
template <int K, bool backward>
__device__ void stage_channels(FormMemory<K, backward>& memory, const RowsTask& task, const Share& share,
                               const float* entries, const float* factors) {
  using Own = Shape<K, backward>;
  float* const target = &memory.channels[0][0][0].x;
  for (int i = static_cast<int>(threadIdx.x); i < 8 * K * Own::rows; i += kThreads) {
    const int own_row = i % Own::rows, channel = i / Own::rows;
    const int row = min(share.first_row + own_row, task.grid.rows - 1);
    float value = 0.0f;
    if (channel < task.grid.channels)
      value = entries[int64_t{channel} * task.grid.rows + row] * (factors ? factors[row] : kLog2E);
    const int tile = channel / 8 * Own::row_tiles + own_row / 16, lane = own_row % 8 * 4 + channel % 4;
    target[(tile * 32 + lane) * 4 + own_row / 8 % 2 + channel / 4 % 2 * 2] = value;
  }
}

// Tile rows of a strip from an outer position on: each quantity's 16 tokens, r after the last that there may be, and
// the header after r; zeros for positions past the last.
template <int K, bool backward>
__device__ void fetch(float* tokens, const RowsTask& task, const Share& share, int strip, int first) {
  using Own = Shape<K, backward>;
  const int channels = task.grid.channels, pieces = (channels + 1) * (kColumns / 4) + kHeader / 4;
  if (strip < share.last_strip)
    for (int i = 0; i < Own::stage_positions; i += kPositions) {
      if (first + i >= share.last) break;
      for (int piece = static_cast<int>(threadIdx.x); piece < kPositions * pieces; piece += kThreads) {
        const int next = piece >= pieces, own = piece - next * pieces, quantity = own / (kColumns / 4);
        const int position = first + i + next;
        int at = quantity * kQuantityStride + own % (kColumns / 4) * 4;
        if (quantity >= channels) at += (8 * K - channels) * kQuantityStride;
        if (quantity > channels) at += kColumns - kQuantityStride;
        async_copy_or_zeros(tokens + (i + next) * Own::tile_floats + at,
                            share.tile(task, strip, min(position, share.last - 1)) + own * 4, position < share.last);
      }
    }
  async_commit();
}

template <int K, bool backward, int products>
__device__ __forceinline__ void sum_channels(const RowsTask& task) {
  using Own = Shape<K, backward>;
  BlockMemory<K, backward>& memory = *shared_memory<BlockMemory<K, backward>>();
  const Share& share = memory.share;
  const Grid& grid = task.grid;
  if (threadIdx.x == 0) memory.share = Share(task, Own::rows);
  for (auto& tokens : memory.tokens)
    for (int i = static_cast<int>(threadIdx.x); i < Own::stage_positions * Own::tile_floats; i += kThreads)
      tokens[i] = 0.0f;
  __syncthreads();
  stage_channels(memory.forms[0], task, share, task.form + share.batch * grid.form_batch, nullptr);
  if (backward)
    stage_channels(memory.forms[backward], task, share,
                   task.upstream + int64_t{share.batch} * grid.entries() * grid.rows,
                   task.statistics + (int64_t{share.batch} * 4 + 1) * grid.padded_rows);

  int stage = 0;
  fetch<K, backward>(memory.tokens[stage], task, share, share.first_strip, share.first);
  WarpRows<K, backward, products> rows(task, memory);
  for (int strip = share.first_strip; strip < share.last_strip; ++strip) {
    OuterIndex index(grid, share.first);
    rows.begin_strip(strip);
    for (int first = share.first; first < share.last; first += Own::stage_positions) {
      const int end = first + Own::stage_positions;
      const bool strip_ends = end >= share.last;
      const auto fetch_next = [&](int target) {
        fetch<K, backward>(memory.tokens[target], task, share, strip + strip_ends, strip_ends ? share.first : end);
      };
      if (Own::stages > 1) fetch_next(1 - stage);
      async_wait<Own::stages - 1>();
      __syncthreads();
      if (rows.works()) {
        const float* tokens = memory.tokens[stage];
#pragma unroll 1
        for (int position = first; position < min(end, share.last); position += kPositions) {
          rows.attend(tokens, strip, position, index);
          tokens += kPositions * Own::tile_floats;
        }
      }
      __syncthreads();
      if (Own::stages > 1)
        stage = 1 - stage;
      else
        fetch_next(stage);
    }
    if (rows.works()) rows.leave_strip(strip);
  }
  if (rows.works()) rows.leave();
}

template <int K, int products>
__global__ void __launch_bounds__(kThreads, 2) separable_attention_fwd_many_channels_kernel(RowsTask task) {
  sum_channels<K, false, products>(task);
}

template <int K, int products>
__global__ void __launch_bounds__(kThreads, 2) separable_attention_bwd_rows_many_channels_kernel(RowsTask task) {
  sum_channels<K, true, products>(task);
}

// --- launching ---

// call(integral constant K).
template <class Call>
auto with_capacity(int channels, const Call& call) {
  if (channels <= 16) return call(std::integral_constant<int, 2>{});
  if (channels <= 32) return call(std::integral_constant<int, 4>{});
  if (channels <= 64) return call(std::integral_constant<int, 8>{});
  return call(std::integral_constant<int, 16>{});
}

template <bool backward>
Split split_of_rows(const Grid& grid, int multiprocessors) {
  return with_capacity(grid.channels, [&](auto K) {
    return split_for_products(grid, multiprocessors, {Shape<K.value, backward>::rows, 1, 500.0 * K.value});
  });
}

template <int K, bool backward, int products>
auto kernel_of() {
  if constexpr (backward)
    return separable_attention_bwd_rows_many_channels_kernel<K, products>;
  else
    return separable_attention_fwd_many_channels_kernel<K, products>;
}

template <bool backward>
Status run_products(const SeparableCall& call, const RowsTask& task, int products, Stream stream) {
  const Grid& grid = task.grid;
  const Status packed =
      pack(call, grid, const_cast<float*>(task.tiles), const_cast<float*>(task.extents), stream, false);
  if (packed.code != 0) return packed;
  return with_capacity(grid.channels, [&](auto K) {
    constexpr int k = K.value;
    const auto kernel = products == 1   ? kernel_of<k, backward, 1>()
                        : products == 2 ? kernel_of<k, backward, 2>()
                                        : kernel_of<k, backward, 3>();
    const int64_t blocks = grid.batch * ceil_div(grid.rows, Shape<k, backward>::rows) * task.split.slots();
    return launch(kernel, blocks, kThreads, sizeof(BlockMemory<k, backward>), stream, task);
  });
}

}  // namespace

int64_t separable_attention_many_channels_workspace(const SeparableCall& call, int multiprocessors) {
  const Grid grid = grid_of(call);
  const Workspace forward(grid, split_of_rows<false>(grid, multiprocessors));
  const Workspace backward(grid, split_of_rows<true>(grid, multiprocessors));
  return forward.tiles + forward.extents + std::max(forward.partials, backward.partials);
}

Status separable_attention_fwd_many_channels(const SeparableCall& call, int products, int multiprocessors,
                                             const TensorView& workspace, const TensorView& sums, const TensorView& lse,
                                             const TensorView& total, Stream stream) {
  const Grid grid = grid_of(call);
  const RowsTask task = task_of(call, grid, split_of_rows<false>(grid, multiprocessors), workspace);
  const Status status = run_products<false>(call, task, products, stream);
  if (status.code != 0) return status;
  return merge(task, sums.as<float>(), lse.as<double>(), total.as<float>(), 1, stream);
}

Status separable_attention_bwd_rows_many_channels(const SeparableCall& call, int products, int multiprocessors,
                                                  const TensorView& workspace, const TensorView& d_sums,
                                                  const TensorView& statistics, const TensorView& d_form,
                                                  Stream stream) {
  const Grid grid = grid_of(call);
  RowsTask task = task_of(call, grid, split_of_rows<true>(grid, multiprocessors), workspace);
  task.upstream = d_sums.as<const float>();
  task.statistics = statistics.as<const float>();
  const Status status = run_products<true>(call, task, products, stream);
  if (status.code != 0) return status;
  return merge(task, d_form.as<float>(), nullptr, nullptr, call.form.size(0) == 1 ? grid.batch : 1, stream);
}

}  // namespace cuda
}  // namespace pk
