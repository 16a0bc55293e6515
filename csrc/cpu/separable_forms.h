// The pieces that the separable kernels are made of: the geometry of a call, linear forms over tokens, packed tiles of
// tokens.
//
// A "linear form" of a row is  f(m) = r_m * ( channels . x_m + sum_k table_k[m_k] ): the shape of the score, of the
// upstream gradient and (as weighted sums) of every result, see docs/separable_attention.md. Rows lie across vector
// lanes, kRowVectors vectors at a time (a "group" of rows), so that no reduction ever crosses lanes; tokens are
// broadcast.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../ops.h"
#include "aligned_buffer.h"
#include "parallel.h"
#include "simd.h"

namespace pk {
namespace {

constexpr int kRowVectors = 2;
constexpr int kBlockTokens = 64;  // tokens per round of the three inner loops: their scores stay in L1
// Columns of the last axis worked on together: their tables take 16 KB and stay in L1.
constexpr int kStripTokens = 16384 / (kRowVectors * PK_VECTOR_BYTES);
constexpr int64_t kTileBytes = 1 << 17;  // packed tokens that all row groups of a work unit reuse from L2

template <class T>
constexpr int group_rows = kRowVectors * Simd<T>::lanes;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sizes of one call. The last grid axis is the "column" axis; the others together are the "outer" positions.
struct Geometry {
  int64_t batch, query_batch, rows, channels, axes;
  int64_t sizes[kMaxDims] = {};
  int64_t columns, outer, outer_table;  // outer_table: sum of the outer axes' sizes
  int64_t strips, strip_width;

  explicit Geometry(const SeparableInputs& in)
      : batch(in.x.size(0)),
        query_batch(in.a.size(0)),
        rows(in.a.size(1)),
        channels(in.a.size(2)),
        axes(static_cast<int64_t>(in.tables.size())),
        outer(1),
        outer_table(0) {
    for (int64_t k = 0; k < axes; ++k) sizes[k] = in.x.size(static_cast<int>(k) + 1);
    columns = sizes[axes - 1];
    for (int64_t k = 0; k + 1 < axes; ++k) {
      outer *= sizes[k];
      outer_table += sizes[k];
    }
    strips = ceil_div(columns, kStripTokens);
    strip_width = strips ? ceil_div(columns, strips) : 0;
  }
  int64_t tokens() const { return outer * columns; }
  int64_t strip_begin(int64_t strip) const { return strip * strip_width; }
  int64_t strip_size(int64_t strip) const { return std::min(strip_width, columns - strip_begin(strip)); }

  // Where outer position o stands on each outer axis; with table = true, as rows of the stacked outer tables.
  void outer_index(int64_t o, bool table, int64_t* index) const {
    int64_t base = outer_table;
    for (int64_t k = axes - 2; k >= 0; --k) {
      base -= sizes[k];
      const int64_t rest = k ? o / sizes[k] : 0;  // no division for the usual two axes
      index[k] = o - rest * sizes[k] + (table ? base : 0);
      o = rest;
    }
  }
};

// A linear form (or sums of that shape) for one group of rows; every entry is group_rows<T> wide.
template <class T>
struct Form {
  T* channels;  // [c]
  T* outer;     // [outer_table], outer axes stacked
  T* column;    // [columns]

  static int64_t entries(const Geometry& g) { return g.channels + g.outer_table + g.columns; }
  static Form at(T* memory, const Geometry& g) {
    return {memory, memory + g.channels * group_rows<T>, memory + (g.channels + g.outer_table) * group_rows<T>};
  }
};

// Sums of the shape of a form. The columns' collect in `recent` while a tile is worked on, for short sums lose less to
// rounding than long ones.
template <class T>
struct FormSums {
  Form<T> form;
  T* recent;  // [strip_width]

  static int64_t entries(const Geometry& g) { return Form<T>::entries(g) + g.strip_width; }
  static FormSums at(T* memory, const Geometry& g) {
    return {Form<T>::at(memory, g), memory + Form<T>::entries(g) * group_rows<T>};
  }
  void settle(const Geometry& g, int64_t strip) const {
    T* column = form.column + g.strip_begin(strip) * group_rows<T>;
    for (int64_t i = 0; i < g.strip_size(strip) * group_rows<T>; i += Simd<T>::lanes) {
      store<T>(column + i, load(column + i) + load(recent + i));
      store<T>(recent + i, Vec<T>{});
    }
  }
};

// One [rows, entries] part of a form in its tensor, seen from its first row of interest.
template <class T>
struct RowsView {
  T* data;
  int64_t row_stride, entry_stride, entries;

  RowsView(const TensorView& view, int64_t batch_index, int64_t first_row)
      : data(view.as<T>() + (view.size(0) == 1 ? 0 : batch_index) * view.stride(0) + first_row * view.stride(1)),
        row_stride(view.stride(1)),
        entry_stride(view.stride(2)),
        entries(view.size(2)) {}
};

template <class T, class F>
inline void for_each_part(const Form<T>& form, const TensorView& channels, const TensorList& tables,
                          int64_t batch_index, int64_t first_row, const F& f) {
  f(form.channels, RowsView<T>(channels, batch_index, first_row));
  T* outer = form.outer;
  const size_t axes = tables.size();
  for (size_t k = 0; k + 1 < axes; ++k) {
    f(outer, RowsView<T>(tables[k], batch_index, first_row));
    outer += tables[k].size(2) * group_rows<T>;
  }
  f(form.column, RowsView<T>(tables[axes - 1], batch_index, first_row));
}

// Entries of a view lie a page apart or so, beyond what the processor fetches ahead by itself.
constexpr int64_t kEntriesAhead = 12;

// packed[entry][row] = factor[row] * view[row][entry]; the rows beyond the last are zero.
template <class T>
inline void pack(T* packed, const RowsView<T>& view, int64_t rows, const T* factor) {
  constexpr int lanes = Simd<T>::lanes, width = group_rows<T>;
  for (int64_t e = 0; e < view.entries; ++e) {
    const T* source = view.data + e * view.entry_stride;
    __builtin_prefetch(source + kEntriesAhead * view.entry_stride);
    T* target = packed + e * width;
    if (view.row_stride == 1 && rows == width) {
      for (int i = 0; i < width; i += lanes)
        store<T>(target + i, load_unaligned(factor + i) * load_unaligned(source + i));
    } else {
      for (int64_t i = 0; i < width; ++i) target[i] = i < rows ? factor[i] * source[i * view.row_stride] : T(0);
    }
  }
}

// view[row][entry] = factor[row] * packed[entry][row]
template <class T>
inline void unpack(const RowsView<T>& view, const T* packed, int64_t rows, const T* factor) {
  constexpr int lanes = Simd<T>::lanes, width = group_rows<T>;
  for (int64_t e = 0; e < view.entries; ++e) {
    const T* source = packed + e * width;
    T* target = view.data + e * view.entry_stride;
    __builtin_prefetch(target + kEntriesAhead * view.entry_stride, 1);
    if (view.row_stride == 1 && rows == width) {
      for (int i = 0; i < width; i += lanes)
        store_unaligned<T>(target + i, load_unaligned(factor + i) * load(source + i));
    } else {
      for (int64_t i = 0; i < rows; ++i) target[i * view.row_stride] = factor[i] * source[i];
    }
  }
}

// sum[row] += sum over entries of left[row][entry] * right[row][entry]
template <class T>
inline void row_dots(double* sum, const RowsView<T>& left, const RowsView<T>& right, int64_t rows) {
  for (int64_t e = 0; e < left.entries; ++e) {
    const T* l = left.data + e * left.entry_stride;
    const T* q = right.data + e * right.entry_stride;
    for (int64_t i = 0; i < rows; ++i) sum[i] += static_cast<double>(l[i * left.row_stride]) * q[i * right.row_stride];
  }
}

// Tokens of a stretch of outer positions within one strip, converted, multiplied by r and packed as (r x_1 .. r x_c,
// r); masked tokens are left out. Row `o - outer_begin` holds the tokens of outer position o.
template <class T>
struct Tile {
  int64_t strip, outer_begin, outer_end;
  T* tokens;
  int32_t* index;  // column of each token within the strip; null when no token is left out
  int32_t* count;  // tokens per outer position
  T* extent;       // per outer position: the smallest values of (r x, r), then the largest; NaN where any is not finite

  int64_t channels;
  int64_t width;

  const T* row_tokens(int64_t o) const { return tokens + (o - outer_begin) * width * (channels + 1); }
  const int32_t* row_index(int64_t o) const { return index ? index + (o - outer_begin) * width : nullptr; }
  int row_count(int64_t o) const { return count[o - outer_begin]; }
  T* row_extent(int64_t o) const { return extent + (o - outer_begin) * 2 * (channels + 1); }
};

template <class T>
class TileMemory {
 public:
  TileMemory(const Geometry& g, bool masked, int64_t most_rows = std::numeric_limits<int64_t>::max())
      : channels_(g.channels),
        width_(g.strip_width),
        rows_(std::clamp<int64_t>(
            kTileBytes / (static_cast<int64_t>(sizeof(T)) * (g.channels + 1) * std::max<int64_t>(width_, 1)), 1,
            std::clamp<int64_t>(g.outer, 1, most_rows))),
        tokens_(rows_ * width_ * (channels_ + 1)),
        index_(masked ? rows_ * width_ : 0),
        count_(rows_),
        extent_(rows_ * 2 * (channels_ + 1)),
        masked_(masked) {}

  int64_t rows() const { return rows_; }
  Tile<T> tile(int64_t strip, int64_t outer_begin, int64_t outer_end) const {
    return {strip,        outer_begin,   outer_end, tokens_.get(), masked_ ? index_.get() : nullptr,
            count_.get(), extent_.get(), channels_, width_};
  }

 private:
  int64_t channels_, width_, rows_;
  AlignedBuffer<T> tokens_;
  AlignedBuffer<int32_t> index_;
  AlignedBuffer<int32_t> count_;
  AlignedBuffer<T> extent_;
  bool masked_;
};

// The packed tokens' smallest and largest values per channel; NaN everywhere if any value is NaN or infinite.
template <class T, int C>
inline void find_extent(const T* tokens, int count, int64_t channels, T* extent) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t values = (C ? C : channels) + 1, all = count * values;
  T* low = extent;
  T* high = extent + values;
  T not_finite = 0;
  for (int64_t c = 0; c < values; ++c) {
    low[c] = std::numeric_limits<T>::infinity();
    high[c] = -std::numeric_limits<T>::infinity();
  }
  const auto include = [&](int64_t c, T smallest, T largest) {
    low[c] = smallest < low[c] ? smallest : low[c];
    high[c] = largest > high[c] ? largest : high[c];
  };
  int64_t i = 0;
  if constexpr (C > 0) {  // after C + 1 vectors, the lanes stand for the same channels again
    constexpr int period = (C + 1) * lanes;
    Vec<T> lowest[C + 1], highest[C + 1], check = {};
    for (; i + period <= all; i += period) {
      PK_UNROLL
      for (int q = 0; q <= C; ++q) {
        const Vec<T> value = load_unaligned(tokens + i + q * lanes);
        lowest[q] = i ? smaller<T>(value, lowest[q]) : value;
        highest[q] = i ? larger<T>(value, highest[q]) : value;
        check += value * T(0);
      }
    }
    for (int q = 0; q < period && i; ++q)
      include(q % (C + 1), lowest[q / lanes][q % lanes], highest[q / lanes][q % lanes]);
    for (int q = 0; q < lanes; ++q) not_finite += check[q];
  }
  for (; i < all; ++i) {
    include(i % values, tokens[i], tokens[i]);
    not_finite += tokens[i] * T(0);
  }
  if (not_finite != T(0)) std::fill(extent, extent + 2 * values, std::numeric_limits<T>::quiet_NaN());
}

template <class T, class X, int C>
inline void pack_tile(const SeparableInputs& in, const TensorView& factor, const Geometry& g, int64_t batch_index,
                      const Tile<T>& tile) {
  const int64_t channels = C ? C : g.channels;
  const int64_t x_step = in.x.stride(-2), channel_step = in.x.stride(-1);
  const int64_t r_step = factor.defined() ? factor.stride(-1) : 0;
  const int64_t mask_step = in.mask.defined() ? in.mask.stride(-1) : 0;
  const int64_t first = g.strip_begin(tile.strip), width = g.strip_size(tile.strip);
  const T one = 1;
  for (int64_t o = tile.outer_begin; o < tile.outer_end; ++o) {
    int64_t at[kMaxDims];
    g.outer_index(o, false, at);
    const X* x = in.x.as<const X>() + batch_index * in.x.stride(0) + first * x_step;
    const T* r = factor.defined() ? factor.as<const T>() + batch_index * factor.stride(0) + first * r_step : &one;
    const uint8_t* mask =
        in.mask.defined() ? in.mask.as<const uint8_t>() + batch_index * in.mask.stride(0) + first * mask_step : nullptr;
    for (int64_t k = 0; k + 1 < g.axes; ++k) {
      x += at[k] * in.x.stride(static_cast<int>(k) + 1);
      if (factor.defined()) r += at[k] * factor.stride(static_cast<int>(k) + 1);
      if (mask) mask += at[k] * in.mask.stride(static_cast<int>(k) + 1);
    }
    T* token = const_cast<T*>(tile.row_tokens(o));
    int32_t* index = const_cast<int32_t*>(tile.row_index(o));
    int count = 0;
    for (int64_t j = 0; j < width; ++j) {
      if (mask) {
        if (!mask[j * mask_step]) continue;
        index[count] = static_cast<int32_t>(j);
      }
      const T scale = r[j * r_step];
      for (int64_t c = 0; c < channels; ++c) token[c] = scale * convert<T>(x[j * x_step + c * channel_step]);
      token[channels] = scale;
      token += channels + 1;
      ++count;
    }
    tile.count[o - tile.outer_begin] = count;
    find_extent<T, C>(tile.row_tokens(o), count, channels, tile.row_extent(o));
  }
}

// out[k] = constant + form(token k), for the tokens of one outer position; with Multiply, out[k] is multiplied by that
// instead. `column` starts at the strip, `outer` holds the sum of the outer tables there.
template <class T, int C, bool Indexed, bool Multiply = false>
inline void evaluate(const T* tokens, const int32_t* index, int count, int64_t channels, const T* coefficients,
                     const T* column, const Vec<T>* outer, const Vec<T>* constant, Vec<T>* out) {
  constexpr int lanes = Simd<T>::lanes, width = group_rows<T>;
  const Vec<T> outer_0 = outer[0], outer_1 = outer[1], constant_0 = constant[0], constant_1 = constant[1];
  if constexpr (C > 0) {
    Vec<T> a_0[C], a_1[C];
    PK_UNROLL
    for (int c = 0; c < C; ++c) {
      a_0[c] = load(coefficients + c * width);
      a_1[c] = load(coefficients + c * width + lanes);
    }
    for (int k = 0; k < count; ++k) {
      const T* token = tokens + k * (C + 1);
      const T* table = column + (Indexed ? index[k] : k) * width;
      Vec<T> value_0 = load(table) + outer_0, value_1 = load(table + lanes) + outer_1;
      Vec<T> factor = broadcast(token[C]);
      value_0 = value_0 * factor + constant_0;
      value_1 = value_1 * factor + constant_1;
      PK_UNROLL
      for (int c = 0; c < C; ++c) {
        factor = broadcast(token[c]);
        value_0 += a_0[c] * factor;
        value_1 += a_1[c] * factor;
      }
      out[2 * k] = Multiply ? out[2 * k] * value_0 : value_0;
      out[2 * k + 1] = Multiply ? out[2 * k + 1] * value_1 : value_1;
    }
  } else {
    constexpr int step = 4;  // tokens at a time: 8 independent sums
    for (int k = 0; k < count; k += step) {
      Vec<T> value[2 * step];
      const T* token[step];
      PK_UNROLL
      for (int q = 0; q < step; ++q) {
        const int at = k + q < count ? k + q : count - 1;
        token[q] = tokens + at * (channels + 1);
        const T* table = column + (Indexed ? index[at] : at) * width;
        const Vec<T> factor = broadcast(token[q][channels]);
        value[2 * q] = (load(table) + outer_0) * factor + constant_0;
        value[2 * q + 1] = (load(table + lanes) + outer_1) * factor + constant_1;
      }
      for (int64_t c = 0; c < channels; ++c) {
        const Vec<T> a_0 = load(coefficients + c * width), a_1 = load(coefficients + c * width + lanes);
        PK_UNROLL
        for (int q = 0; q < step; ++q) {
          const Vec<T> factor = broadcast(token[q][c]);
          value[2 * q] += a_0 * factor;
          value[2 * q + 1] += a_1 * factor;
        }
      }
      PK_UNROLL
      for (int q = 0; q < 2 * step; ++q) out[2 * k + q] = Multiply ? out[2 * k + q] * value[q] : value[q];
    }
  }
}

// sums += weight[k] * (r x, r) of token k, spread over channels, outer position and columns; plain += weight[k].
template <class T, int C, bool Indexed, bool Plain>
inline void accumulate(const T* tokens, const int32_t* index, int count, int64_t channels, const Vec<T>* weight,
                       T* channel_sums, T* column, Vec<T>* outer, Vec<T>* plain) {
  constexpr int lanes = Simd<T>::lanes, width = group_rows<T>;
  Vec<T> outer_0 = outer[0], outer_1 = outer[1], plain_0 = plain[0], plain_1 = plain[1];
  Vec<T> sum_0[C ? C : 1], sum_1[C ? C : 1];
  PK_UNROLL
  for (int c = 0; c < C; ++c) {
    sum_0[c] = load(channel_sums + c * width);
    sum_1[c] = load(channel_sums + c * width + lanes);
  }
  for (int k = 0; k < count; ++k) {
    const T* token = tokens + k * ((C ? C : channels) + 1);
    T* table = column + (Indexed ? index[k] : k) * width;
    const Vec<T> p_0 = weight[2 * k], p_1 = weight[2 * k + 1];
    Vec<T> factor = broadcast(token[C ? C : channels]);
    const Vec<T> w_0 = product<T>(p_0, factor), w_1 = product<T>(p_1, factor);
    if constexpr (Plain) {
      plain_0 += p_0;
      plain_1 += p_1;
    }
    outer_0 += w_0;
    outer_1 += w_1;
    store<T>(table, load(table) + w_0);
    store<T>(table + lanes, load(table + lanes) + w_1);
    PK_UNROLL
    for (int c = 0; c < C; ++c) {
      factor = broadcast(token[c]);
      sum_0[c] += p_0 * factor;
      sum_1[c] += p_1 * factor;
    }
  }
  outer[0] = outer_0, outer[1] = outer_1;
  if constexpr (Plain) plain[0] = plain_0, plain[1] = plain_1;
  PK_UNROLL
  for (int c = 0; c < C; ++c) {
    store<T>(channel_sums + c * width, sum_0[c]);
    store<T>(channel_sums + c * width + lanes, sum_1[c]);
  }
  if constexpr (C == 0) {
    constexpr int step = 4;  // channels at a time: 8 independent sums
    for (int64_t c = 0; c < channels; c += step) {
      Vec<T> sum[2 * step];
      PK_UNROLL
      for (int q = 0; q < step; ++q) {
        const int64_t at = std::min(c + q, channels - 1);
        sum[2 * q] = load(channel_sums + at * width);
        sum[2 * q + 1] = load(channel_sums + at * width + lanes);
      }
      for (int k = 0; k < count; ++k) {
        const T* token = tokens + k * (channels + 1) + c;
        PK_UNROLL
        for (int q = 0; q < step; ++q) {
          const Vec<T> factor = broadcast(token[c + q < channels ? q : 0]);
          sum[2 * q] += weight[2 * k] * factor;
          sum[2 * q + 1] += weight[2 * k + 1] * factor;
        }
      }
      for (int q = 0; q < step && c + q < channels; ++q) {
        store<T>(channel_sums + (c + q) * width, sum[2 * q]);
        store<T>(channel_sums + (c + q) * width + lanes, sum[2 * q + 1]);
      }
    }
  }
}

}  // namespace
}  // namespace pk
