// What attention over blocks is made of: scores of a block of queries and a block of keys in cache, their softmax, and
// the operands of the products. latent_attention.cpp, dense_attention.h and queries_on_grid.h put it together.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "aligned_buffer.h"
#include "gemm_tiles.h"
#include "panels.h"
#include "parallel.h"
#include "philox.h"
#include "scratch_pool.h"

namespace pk {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Scores of a block of queries and keys stay in the second-level cache together with the operands of their products.
// Backward takes fewer keys at a time, so that there are parts enough for many threads.
constexpr int kQueryBlock = 48;
constexpr int kForwardKeys = 256;
constexpr int kBackwardKeys = 128;
// Rows of scores are an odd number of cache lines apart, so that a column of them does not compete for one set.
template <class T, int Keys>
constexpr int score_step = Keys + 64 / static_cast<int>(sizeof(T));
// The same for rows of channels.
template <class T>
inline int64_t row_step(int64_t channels) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  return (blocks(rounded_up(channels, tile_width<T>), line) | 1) * line;
}
// From panel to panel of so many rows, likewise.
template <class T>
inline int64_t panel_step(int64_t rows) {
  return (rows | 1) * tile_width<T>;
}
// Products over more channels than these are added up part by part: what a tile reads of both operands then stays in
// the first-level cache, or comes from the second in time.
constexpr int64_t kMostDepth = 256;

// Part of the queries or of the keys.
struct Range {
  int64_t first, count;

  static Range block(int64_t index, int64_t size, int64_t total) {
    return {index * size, std::min(size, total - index * size)};
  }
};

// f(value of the type of the computation, value of the data's type).
template <class F>
void with_types(DType dtype, const F& f) {
  with_floating_type(dtype, [&](auto x) {
    using X = decltype(x);
    if constexpr (sizeof(X) == 8) {
      f(double{}, x);
    } else {
      f(float{}, x);
    }
  });
}

// Rows as columns of the right operand: panels of tile_width rows, channel after channel.
template <class T, class X>
void pack_columns(const Matrix<const X>& rows, int64_t count, int64_t channels, T* panels) {
  constexpr int width = tile_width<T>;
  for (int64_t m = 0; m < count; m += width) {
    const Matrix<const X> part{rows.row(m), rows.row_step, rows.channel_step};
    pack_transposed<T>(part, std::min<int64_t>(width, count - m), channels, T(1), width, width, panels + m * channels);
  }
}

// How many rows of a query block are computed with, so that few queries do not pay for a whole block.
template <class T>
inline int64_t touched_rows(int64_t queries) {
  return rounded_up(queries, std::max(Simd<T>::lanes, kLowTileRows));
}

// Rows of a query block as the left operand of a product that sums over channels.
template <class T, class X>
void pack_queries(const Matrix<const X>& rows, int64_t count, int64_t channels, T factor, T* packed) {
  pack_transposed<T>(rows, count, channels, factor, touched_rows<T>(count), kQueryBlock, packed);
}

template <class T>
inline T lane_sum(Vec<T> value) {
  T total = value[0];
  for (int lane = 1; lane < Simd<T>::lanes; ++lane) total += value[lane];
  return total;
}
// The largest lane of each of as many vectors as there are lanes.
template <class T>
inline Vec<T> lane_maxima(const Vec<T>* values) {
  Vec<T> square[Simd<T>::lanes];
  std::copy_n(values, Simd<T>::lanes, square);
  transpose<T>(square);
  Vec<T> largest = square[0];
  for (int lane = 1; lane < Simd<T>::lanes; ++lane) largest = larger<T>(largest, square[lane]);
  return largest;
}

// 2^(score - reference) in place for `count` scores, rounded up to whole vectors; returns their sum, lane by lane. No
// score is above the reference. A NaN stays NaN.
template <class T>
inline Vec<T> exponentiate(T* scores, int64_t count, T reference) {
  constexpr int lanes = Simd<T>::lanes, step = 4;
  const Vec<T> shift = broadcast(reference);
  Vec<T> sum[step] = {};
  int64_t j = 0;
  for (; j + (step - 1) * lanes < count; j += step * lanes) {
    PK_UNROLL
    for (int q = 0; q < step; ++q) {
      const Vec<T> weight = exp2_flushed<T>(load(scores + j + q * lanes) - shift);
      sum[q] += weight;
      store<T>(scores + j + q * lanes, weight);
    }
  }
  for (; j < count; j += lanes) {
    const Vec<T> weight = exp2_flushed<T>(load(scores + j) - shift);
    sum[0] += weight;
    store<T>(scores + j, weight);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Dropout of a block of queries, rows of the generator from first_row on, and of a block of keys: tokens from
// first_token on, or those that are listed.
struct KeptWeights {
  const Dropout& dropout;
  int64_t batch, first_row, first_token;
  const int64_t* listed = nullptr;

  bool drops() const { return dropout.p > 0; }
  // keep has room for a multiple of 4.
  template <class T>
  void row(int64_t query, int64_t count, T* keep) const {
    if (listed) {
      dropout_tokens(dropout, batch, first_row + query, listed, count, keep);
    } else {
      dropout_row(dropout, batch, first_row + query, first_token, count, keep);
    }
  }
};

// finish for multiply_block: stores the product, or adds it, to rows of Step elements.
template <class T, int Step>
struct StoreTile {
  T* target;
  bool adds = false;

  template <int Rows>
  __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
    PK_UNROLL_TILE
    for (int r = 0; r < Rows; ++r) {
      T* row = target + (i + r) * Step + c;
      store<T>(row, adds ? load(row) + sums.at[r][0] : sums.at[r][0]);
      store<T>(row + Simd<T>::lanes, adds ? load(row + Simd<T>::lanes) + sums.at[r][1] : sums.at[r][1]);
    }
  }
};

// The product of packed queries and packed columns over the channels; finish(adds, last) makes what takes each part.
template <class T, class Finish>
inline void multiply_channels(const T* queries, int64_t count, const T* columns, int64_t channels, int64_t keys,
                              const Finish& finish) {
  const int64_t depth = blocks(channels, blocks(channels, kMostDepth));
  for (int64_t c = 0; c < channels; c += depth) {
    multiply_block<T, 1, kQueryBlock>(queries + c * kQueryBlock, count, columns + c * tile_width<T>,
                                      tile_width<T> * channels, std::min(depth, channels - c), keys,
                                      finish(c > 0, c + depth >= channels));
  }
}

// What the online softmax (Milakov and Gimelshein 2018) of a block of queries remembers, in powers of two.
template <class T>
struct SoftmaxState {
  alignas(64) T maximum[kQueryBlock];
  Vec<T> sum[kQueryBlock], kept[kQueryBlock];  // to be taken over lanes; kept: what dropout leaves of the sum

  void clear() {
    std::fill_n(maximum, kQueryBlock, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, kQueryBlock, Vec<T>{});
    std::fill_n(kept, kQueryBlock, Vec<T>{});
  }
};

// Scores of one block of queries and one of up to kForwardKeys keys, in forward: score, softmax_step, accumulate.
template <class T>
class ScoreBlock {
 public:
  ScoreBlock() : scores_(kQueryBlock * kStep) {}

  // scores = queries columns^T
  void score(const T* queries, int64_t count, const T* columns, int64_t channels, int64_t keys) {
    forget_largest(count);
    multiply_channels<T>(queries, count, columns, channels, keys,
                         [&](bool adds, bool last) { return StoreScores{scores_.get(), largest_, keys, adds, last}; });
  }

  // For scores that are not a product alone: the product as it is, then the rows, each with its largest, lane by lane.
  void multiply(const T* queries, int64_t count, const T* columns, int64_t channels, int64_t keys) {
    multiply_channels<T>(queries, count, columns, channels, keys,
                         [&](bool adds, bool) { return StoreTile<T, kStep>{scores_.get(), adds}; });
  }
  void forget_largest(int64_t count) {
    std::fill_n(largest_, touched_rows<T>(count), broadcast(-std::numeric_limits<T>::infinity()));
  }
  T* row(int64_t query) { return scores_.get() + query * kStep; }
  void set_largest(int64_t query, Vec<T> largest) { largest_[query] = largest; }

  // Scores become weights, relative to the largest score so far.
  void softmax_step(SoftmaxState<T>& state, int64_t count, int64_t keys, const KeptWeights& kept) {
    alignas(64) T reference[kQueryBlock];
    for (int64_t i = 0; i < touched_rows<T>(count); i += Simd<T>::lanes) {
      const Vec<T> before = load(state.maximum + i), after = larger<T>(before, lane_maxima<T>(largest_ + i));
      // Where all scores so far are -inf, any finite reference gives weights of zero.
      const Vec<T> finite = at_least<T>(broadcast(std::numeric_limits<T>::lowest()), after);
      store<T>(state.maximum + i, after);
      store<T>(reference + i, finite);
      store<T>(factor_ + i, exp2_flushed<T>(before - finite));
    }
    for (int64_t i = 0; i < count; ++i) {
      T* scores = scores_.get() + i * kStep;
      const Vec<T> factor = broadcast(factor_[i]);
      state.sum[i] = state.sum[i] * factor + exponentiate(scores, keys, reference[i]);
      if (kept.drops()) state.kept[i] = state.kept[i] * factor + drop(scores, i, keys, kept);
    }
  }

  // out = factor * out + weights values
  void accumulate(T* out, int64_t out_step, int64_t count, const T* values, int64_t panel_step, int64_t keys,
                  int64_t channels) const {
    multiply_block<T, kStep, 1>(scores_.get(), count, values, panel_step, keys, channels,
                                RescaleAndAdd{out, out_step, factor_});
  }

 private:
  static constexpr int kStep = score_step<T, kForwardKeys>;

  static Vec<T> of_keys(Vec<T> scores, int64_t keys) {
    Vec<T> lane;
    for (int k = 0; k < Simd<T>::lanes; ++k) lane[k] = static_cast<T>(k);
    return lane < static_cast<T>(keys) ? scores : broadcast(-std::numeric_limits<T>::infinity());
  }

  // Stores scores, of the last channels also the largest of each row, lane by lane; -inf for columns that are no keys.
  struct StoreScores {
    T* scores;
    Vec<T>* largest;
    int64_t keys;
    bool adds, last;

    template <int Rows>
    __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
      const bool all = !last || c + tile_width<T> <= keys;
      PK_UNROLL_TILE
      for (int r = 0; r < Rows; ++r) {
        T* row = scores + (i + r) * kStep + c;
        Vec<T> first = sums.at[r][0], second = sums.at[r][1];
        if (adds) first += load(row), second += load(row + Simd<T>::lanes);
        if (!all) first = of_keys(first, keys - c), second = of_keys(second, keys - c - Simd<T>::lanes);
        store<T>(row, first);
        store<T>(row + Simd<T>::lanes, second);
        if (last) largest[i + r] = larger<T>(largest[i + r], larger<T>(first, second));
      }
    }
  };

  struct RescaleAndAdd {
    T* out;
    int64_t step;
    const T* factor;

    template <int Rows>
    __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
      PK_UNROLL_TILE
      for (int r = 0; r < Rows; ++r) {
        T* row = out + (i + r) * step + c;
        const Vec<T> rescale = broadcast(factor[i + r]);
        store<T>(row, load(row) * rescale + sums.at[r][0]);
        store<T>(row + Simd<T>::lanes, load(row + Simd<T>::lanes) * rescale + sums.at[r][1]);
      }
    }
  };

  // Returns the sum of the weights that are kept, lane by lane.
  static Vec<T> drop(T* weights, int64_t query, int64_t keys, const KeptWeights& kept) {
    alignas(64) T keep[kForwardKeys];
    kept.row(query, keys, keep);
    std::fill(keep + keys, keep + rounded_up(keys, Simd<T>::lanes), T(0));
    Vec<T> sum = {};
    for (int64_t j = 0; j < keys; j += Simd<T>::lanes) {
      const Vec<T> weight = load(weights + j) * load(keep + j);
      store<T>(weights + j, weight);
      sum += weight;
    }
    return sum;
  }

  AlignedBuffer<T> scores_;
  alignas(64) T factor_[kQueryBlock];
  Vec<T> largest_[kQueryBlock];
};

// ---- What rounding leaves of a sum of d_s, in backward. The gradients of a query's scores add up to zero, or to what
// came upstream of its lse, but for rounding. Where keys are much alike, that rest times what they have in common would
// be most of the query's gradient: it is taken off again (docs/dense_attention.md).

// sums[i * sums_step] += the sum of row i of a block of backward.
template <class T>
void add_row_sums(const T* block, int64_t rows, int64_t columns, T* sums, int64_t sums_step) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = block + i * score_step<T, kBackwardKeys>;
    Vec<T> sum = {};
    for (int64_t j = 0; j < columns; j += Simd<T>::lanes) sum += load_channels<T>(row + j, 1, columns - j);
    sums[i * sums_step] += lane_sum<T>(sum);
  }
}

// sums[j] += the sum of column j of a block of backward; whole vectors.
template <class T>
void add_column_sums(const T* block, int64_t rows, int64_t columns, T* sums) {
  for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
    Vec<T> sum = load(sums + j);
    for (int64_t i = 0; i < rows; ++i) sum += load(block + i * score_step<T, kBackwardKeys> + j);
    store<T>(sums + j, sum);
  }
}

// What keys have in common: their mean, each weighted by the attention it gets, so that keys nobody attends to do not
// count. In channels where that mean is no more than chance, nothing: of few large keys and many small ones it would be
// an error for the queries that attend to the small ones.
template <class T>
class CommonKey {
 public:
  explicit CommonKey(int64_t channels)
      : channels_(channels), step_(rounded_up(channels, tile_width<T>)), sums_(2 * step_), key_(step_) {
    clear();
  }

  void clear() {
    weight_ = weight_squares_ = 0;
    std::fill_n(sums_.get(), 2 * step_, T(0));
  }

  // Adds keys that are packed as rows (pack_panels), and the attention that each gets.
  void add(const T* panels, int64_t panel_step, int64_t keys, const T* weights) {
    for (int64_t j = 0; j < keys; ++j) weight_ += weights[j], weight_squares_ += weights[j] * weights[j];
    for (int64_t c = 0; c < channels_; c += Simd<T>::lanes) {
      const T* panel = panels + c / tile_width<T> * panel_step + c % tile_width<T>;
      Vec<T> sum = load(sums_.get() + c), squares = load(sums_.get() + step_ + c);
      for (int64_t j = 0; j < keys; ++j) {
        const Vec<T> key = load(panel + j * tile_width<T>), weighted = broadcast(weights[j]) * key;
        sum += weighted;
        squares += weighted * key;
      }
      store<T>(sums_.get() + c, sum);
      store<T>(sums_.get() + step_ + c, squares);
    }
  }
  void add(const CommonKey& other) {
    weight_ += other.weight_, weight_squares_ += other.weight_squares_;
    for (int64_t c = 0; c < 2 * step_; ++c) sums_[c] += other.sums_[c];
  }

  void finish() {
    // mean^2 > 8 / n * variance, of n = weight^2 / weight_squares keys; false for what is not finite
    const T chance = 8 * weight_squares_ / (weight_ * weight_);
    for (int64_t c = 0; c < channels_; ++c) {
      const T mean = sums_[c] / weight_, variance = sums_[step_ + c] / weight_ - mean * mean;
      key_[c] = mean * mean > chance * variance ? mean : T(0);
    }
  }

  // row -= rest * key
  void take(T rest, T* row) const {
    for (int64_t c = 0; c < channels_; ++c) row[c] -= rest * key_[c];
  }

 private:
  const int64_t channels_, step_;
  T weight_, weight_squares_;
  AlignedBuffer<T> sums_, key_;
};

// Runs all heads: as many as divide evenly among the threads as one task each, in cache, the remaining ones split among
// all threads. What is computed does not depend on which.
template <class Whole, class Split>
void for_each_head(int64_t heads, const Whole& whole, const Split& split) {
  const int64_t remaining = heads % num_threads();
  parallel_for(heads - remaining, whole);
  if (remaining > 0) split(heads - remaining, remaining);
}

// New heads for the indices from first on.
template <class NewHead>
auto begun(int64_t first, int64_t count, const NewHead& new_head) {
  std::vector<decltype(new_head())> heads;
  for (int64_t i = 0; i < count; ++i) {
    heads.push_back(new_head());
    heads.back()->begin(first + i);
  }
  return heads;
}

// run(head, block) for each block of each head, on all threads.
template <class Heads, class Run>
void each_block(const Heads& heads, int64_t per_head, const Run& run) {
  parallel_for(static_cast<int64_t>(heads.size()) * per_head,
               [&](int64_t task) { run(*heads[static_cast<size_t>(task / per_head)], task % per_head); });
}

}  // namespace
}  // namespace pk
