// Self-attention over latents on the CPU, forward and backward: softmax(scale q k^T) v, block by block, so that no
// score matrix is stored. Compiled once per instruction set.
//
// Everything is computed in float (double for double): 16-bit inputs are widened when they are packed (panels.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../ops.h"
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

struct Sizes {
  int64_t batch, heads, queries, keys, head_dim, head_dim_v;

  explicit Sizes(const LatentInputs& in)
      : batch(in.q.size(0)),
        heads(in.q.size(1)),
        queries(in.q.size(2)),
        keys(in.k.size(2)),
        head_dim(in.q.size(3)),
        head_dim_v(in.v.size(3)) {}

  int64_t all_heads() const { return batch * heads; }
  int64_t query_blocks() const { return blocks(queries, kQueryBlock); }
};

// Part of the queries or of the keys.
struct Range {
  int64_t first, count;

  static Range block(int64_t index, int64_t size, int64_t total) {
    return {index * size, std::min(size, total - index * size)};
  }
};

// Keys as columns of q k^T: panels of tile_width keys, channel after channel.
template <class T, class X>
void pack_columns(const Matrix<const X>& source, const Range& keys, int64_t channels, T* panels) {
  constexpr int width = tile_width<T>;
  for (int64_t m = 0; m < keys.count; m += width) {
    const int64_t first = keys.first + m;
    const Matrix<const X> rows{source.row(first), source.row_step, source.channel_step};
    pack_transposed<T>(rows, std::min<int64_t>(width, keys.count - m), channels, T(1), width, width,
                       panels + first * channels);
  }
}

// Rows as the right operand of a product that sums over them.
template <class T, class X>
void pack_rows(const Matrix<const X>& source, const Range& range, int64_t channels, int64_t all_rows, T* panels) {
  constexpr int width = tile_width<T>;
  const Matrix<const X> rows{source.row(range.first), source.row_step, source.channel_step};
  pack_panels<T>(rows, range.count, channels, width, all_rows * width, panels + range.first * width);
}

// How many rows of a query block are computed with, so that few latents do not pay for a whole block.
template <class T>
inline int64_t touched_rows(int64_t queries) {
  return rounded_up(queries, std::max(Simd<T>::lanes, kLowTileRows));
}

// Rows of a query block as the left operand of a product that sums over channels.
template <class T, class X>
void pack_queries(const Matrix<const X>& source, const Range& range, int64_t channels, T factor, T* packed) {
  const Matrix<const X> rows{source.row(range.first), source.row_step, source.channel_step};
  pack_transposed<T>(rows, range.count, channels, factor, touched_rows<T>(range.count), kQueryBlock, packed);
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

// ---- Forward

template <class T, class X>
class ForwardHead {
 public:
  // Of one query block: the online softmax (Milakov and Gimelshein 2018), with out not yet divided by the sums.
  struct State {
    int64_t out_step;
    AlignedBuffer<T> queries, scores, out;
    alignas(64) T maximum[kQueryBlock], factor[kQueryBlock];
    Vec<T> block_maximum[kQueryBlock], sum[kQueryBlock];  // to be taken over lanes

    explicit State(const Sizes& sizes)
        : out_step(rounded_up(sizes.head_dim_v, tile_width<T>)),
          queries(sizes.head_dim * kQueryBlock),
          scores(kQueryBlock * score_step<T, kForwardKeys>),
          out(kQueryBlock * out_step) {}

    void clear(int64_t rows) {
      std::fill_n(out.get(), rows * out_step, T(0));
      std::fill_n(maximum, rows, -std::numeric_limits<T>::infinity());
      std::fill_n(sum, rows, Vec<T>{});
    }
  };

  ForwardHead(const LatentInputs& in, const LatentOutputs& out)
      : in_(in),
        out_(out),
        sizes_(in),
        keys_(rounded_up(sizes_.keys, tile_width<T>) * sizes_.head_dim),
        values_(sizes_.keys * rounded_up(sizes_.head_dim_v, tile_width<T>)) {}

  void begin(int64_t index) {
    batch_ = index / sizes_.heads;
    head_ = index % sizes_.heads;
  }

  void pack(int64_t key_block) {
    const Range keys = Range::block(key_block, kForwardKeys, sizes_.keys);
    pack_columns<T>(matrix_of<const X>(in_.k, batch_, head_), keys, sizes_.head_dim, keys_.get());
    pack_rows<T>(matrix_of<const X>(in_.v, batch_, head_), keys, sizes_.head_dim_v, sizes_.keys, values_.get());
  }

  void attend(int64_t query_block, State& state) const {
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    state.clear(touched_rows<T>(queries.count));
    pack_queries<T>(matrix_of<const X>(in_.q, batch_, head_), queries, sizes_.head_dim,
                    static_cast<T>(in_.scale * kLog2E), state.queries.get());
    for (int64_t block = 0; block < blocks(sizes_.keys, kForwardKeys); ++block) {
      const Range keys = Range::block(block, kForwardKeys, sizes_.keys);
      score(state, queries.count, keys);
      softmax_step(state, queries, keys);
      accumulate(state, queries.count, keys);
    }
    finish(state, queries);
  }

 private:
  static Vec<T> of_keys(Vec<T> scores, int64_t keys) {
    Vec<T> lane;
    for (int k = 0; k < Simd<T>::lanes; ++k) lane[k] = static_cast<T>(k);
    return lane < static_cast<T>(keys) ? scores : broadcast(-std::numeric_limits<T>::infinity());
  }

  // Stores scores and keeps the largest of each row, lane by lane; -inf for columns that are no keys.
  struct StoreScores {
    T* scores;
    Vec<T>* maximum;
    int64_t keys;

    template <int Rows>
    __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
      const bool all = c + tile_width<T> <= keys;
      PK_UNROLL_TILE
      for (int r = 0; r < Rows; ++r) {
        const Vec<T> first = all ? sums.at[r][0] : of_keys(sums.at[r][0], keys - c);
        const Vec<T> second = all ? sums.at[r][1] : of_keys(sums.at[r][1], keys - c - Simd<T>::lanes);
        T* row = scores + (i + r) * score_step<T, kForwardKeys> + c;
        store<T>(row, first);
        store<T>(row + Simd<T>::lanes, second);
        maximum[i + r] = larger<T>(maximum[i + r], larger<T>(first, second));
      }
    }
  };

  void score(State& state, int64_t queries, const Range& keys) const {
    std::fill_n(state.block_maximum, touched_rows<T>(queries), broadcast(-std::numeric_limits<T>::infinity()));
    multiply_block<T, 1, kQueryBlock>(state.queries.get(), queries, keys_.get() + keys.first * sizes_.head_dim,
                                      tile_width<T> * sizes_.head_dim, sizes_.head_dim, keys.count,
                                      StoreScores{state.scores.get(), state.block_maximum, keys.count});
  }

  void softmax_step(State& state, const Range& queries, const Range& keys) const {
    alignas(64) T reference[kQueryBlock];
    for (int64_t i = 0; i < touched_rows<T>(queries.count); i += Simd<T>::lanes) {
      const Vec<T> before = load(state.maximum + i), after = larger<T>(before, lane_maxima<T>(state.block_maximum + i));
      // Where all scores so far are -inf, any finite reference gives weights of zero.
      const Vec<T> finite = at_least<T>(broadcast(std::numeric_limits<T>::lowest()), after);
      store<T>(state.maximum + i, after);
      store<T>(reference + i, finite);
      store<T>(state.factor + i, exp2_flushed<T>(before - finite));
    }
    for (int64_t i = 0; i < queries.count; ++i) {
      T* scores = state.scores.get() + i * score_step<T, kForwardKeys>;
      state.sum[i] = state.sum[i] * broadcast(state.factor[i]) + exponentiate(scores, keys.count, reference[i]);
      if (in_.dropout.p > 0) drop(scores, queries.first + i, keys);
    }
  }

  void drop(T* weights, int64_t query, const Range& keys) const {
    alignas(64) T keep[kForwardKeys];
    dropout_row(in_.dropout, batch_, head_ * sizes_.queries + query, keys.first, keys.count, keep);
    for (int64_t j = 0; j < keys.count; ++j) weights[j] *= keep[j];
  }

  // out = factor * out + weights v
  void accumulate(State& state, int64_t queries, const Range& keys) const {
    const int64_t step = state.out_step;
    T* out = state.out.get();
    const T* factor = state.factor;
    multiply_block<T, score_step<T, kForwardKeys>, 1>(
        state.scores.get(), queries, values_.get() + keys.first * tile_width<T>, sizes_.keys * tile_width<T>,
        keys.count, sizes_.head_dim_v, [=](int64_t i, int64_t c, const auto& sums) __attribute__((always_inline)) {
          constexpr int rows = sizeof(sums.at) / sizeof(sums.at[0]);
          PK_UNROLL_TILE
          for (int r = 0; r < rows; ++r) {
            T* row = out + (i + r) * step + c;
            const Vec<T> rescale = broadcast(factor[i + r]);
            store<T>(row, load(row) * rescale + sums.at[r][0]);
            store<T>(row + Simd<T>::lanes, load(row + Simd<T>::lanes) * rescale + sums.at[r][1]);
          }
        });
  }

  void finish(const State& state, const Range& queries) const {
    const Matrix<X> out = matrix_of<X>(out_.out, batch_, head_);
    T* lse = out_.lse.template as<T>() + (batch_ * sizes_.heads + head_) * sizes_.queries + queries.first;
    for (int64_t i = 0; i < queries.count; ++i) {
      const T sum = lane_sum<T>(state.sum[i]);  // zero where all scores are -inf: such a query gets zeros
      write_row(state.out.get() + i * state.out_step, sum == 0 ? T(0) : 1 / sum, sizes_.head_dim_v,
                out.row(queries.first + i));
      lse[i] = static_cast<T>(kLn2 * (static_cast<double>(state.maximum[i]) + std::log2(static_cast<double>(sum))));
    }
  }

  const LatentInputs& in_;
  const LatentOutputs& out_;
  const Sizes sizes_;
  int64_t batch_ = 0, head_ = 0;
  AlignedBuffer<T> keys_, values_;
};

template <class T, class X>
void forward(const LatentInputs& in, const LatentOutputs& out) {
  const Sizes sizes(in);
  using Head = ForwardHead<T, X>;
  using State = typename Head::State;
  ScratchPool<Head> heads;
  ScratchPool<State> states;
  const auto new_head = [&] { return std::make_unique<Head>(in, out); };
  const auto new_state = [&] { return std::make_unique<State>(sizes); };
  const auto whole = [&](int64_t index) {
    heads.with(new_head, [&](Head& head) {
      head.begin(index);
      for (int64_t block = 0; block < blocks(sizes.keys, kForwardKeys); ++block) head.pack(block);
      states.with(new_state, [&](State& state) {
        for (int64_t block = 0; block < sizes.query_blocks(); ++block) head.attend(block, state);
      });
    });
  };
  const auto split = [&](int64_t first, int64_t count) {
    const auto all = begun(first, count, new_head);
    each_block(all, blocks(sizes.keys, kForwardKeys), [](Head& head, int64_t block) { head.pack(block); });
    each_block(all, sizes.query_blocks(), [&](const Head& head, int64_t block) {
      states.with(new_state, [&](State& state) { head.attend(block, state); });
    });
  };
  for_each_head(sizes.all_heads(), whole, split);
}

// ---- Backward

// Keys are taken in this many parts per head, by shape alone, so that few heads keep many threads busy. Each part has
// its own gradient of the queries; they are added in order, whatever the number of threads.
inline int64_t key_parts(const Sizes& sizes) {
  constexpr int64_t wanted_tasks = 32, most = 16;
  const int64_t wanted = blocks(wanted_tasks, std::max<int64_t>(sizes.all_heads(), 1));
  return std::max<int64_t>(1, std::min({wanted, most, blocks(sizes.keys, kBackwardKeys)}));
}

// With p = 2^(s - lse) recomputed, u = d_out v^T and delta = sum of d_out * out: d_s = p (keep u - delta), d_v = (keep
// p)^T d_out, d_k = scale d_s^T q, d_q = scale d_s k.
template <class T, class X>
class BackwardHead {
 public:
  // Of one part of the keys.
  struct State {
    AlignedBuffer<T> weights, d_scores, d_keys, d_values;

    explicit State(const Sizes& sizes)
        : weights(kQueryBlock * score_step<T, kBackwardKeys>),
          d_scores(kQueryBlock * score_step<T, kBackwardKeys>),
          d_keys(kBackwardKeys * rounded_up(sizes.head_dim, tile_width<T>)),
          d_values(kBackwardKeys * rounded_up(sizes.head_dim_v, tile_width<T>)) {}
  };

  BackwardHead(const LatentInputs& in, const LatentOutputs& saved, const TensorView& d_out,
               const LatentGradients& gradients, int64_t partial_sums)
      : in_(in),
        saved_(saved),
        d_out_(d_out),
        gradients_(gradients),
        sizes_(in),
        step_(rounded_up(sizes_.head_dim, tile_width<T>)),
        step_v_(rounded_up(sizes_.head_dim_v, tile_width<T>)),
        padded_queries_(sizes_.query_blocks() * kQueryBlock),
        key_columns_(rounded_up(sizes_.keys, tile_width<T>) * sizes_.head_dim),
        value_columns_(rounded_up(sizes_.keys, tile_width<T>) * sizes_.head_dim_v),
        key_rows_(sizes_.keys * step_),
        queries_(padded_queries_ * sizes_.head_dim),
        d_outs_(padded_queries_ * sizes_.head_dim_v),
        query_rows_(sizes_.queries * step_),
        d_out_rows_(sizes_.queries * step_v_),
        reference_(padded_queries_),
        delta_(padded_queries_),
        d_queries_(partial_sums * padded_queries_ * step_) {}

  void begin(int64_t index) {
    batch_ = index / sizes_.heads;
    head_ = index % sizes_.heads;
  }

  void pack_keys(int64_t key_block) {
    const Range keys = Range::block(key_block, kBackwardKeys, sizes_.keys);
    const auto k = matrix_of<const X>(in_.k, batch_, head_);
    pack_columns<T>(k, keys, sizes_.head_dim, key_columns_.get());
    pack_columns<T>(matrix_of<const X>(in_.v, batch_, head_), keys, sizes_.head_dim_v, value_columns_.get());
    pack_rows<T>(k, keys, sizes_.head_dim, sizes_.keys, key_rows_.get());
  }

  void pack_queries(int64_t query_block) {
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    const auto q = matrix_of<const X>(in_.q, batch_, head_), d_out = matrix_of<const X>(d_out_, batch_, head_);
    pk::pack_queries<T>(q, queries, sizes_.head_dim, static_cast<T>(in_.scale * kLog2E),
                        queries_.get() + queries.first * sizes_.head_dim);
    pk::pack_queries<T>(d_out, queries, sizes_.head_dim_v, T(1), d_outs_.get() + queries.first * sizes_.head_dim_v);
    pack_rows<T>(q, queries, sizes_.head_dim, sizes_.queries, query_rows_.get());
    pack_rows<T>(d_out, queries, sizes_.head_dim_v, sizes_.queries, d_out_rows_.get());
    load_statistics(queries);
  }

  // Gradients of one part of the keys and values, whole, and that part's share in the gradient of the queries.
  void part(int64_t index, int64_t partial_sum, State& state) {
    const int64_t all = blocks(sizes_.keys, kBackwardKeys), parts = key_parts(sizes_);
    T* d_queries = partial(partial_sum);
    std::fill_n(d_queries, rounded_up(sizes_.queries, kLowTileRows) * step_, T(0));
    T *weights = state.weights.get(), *d_scores = state.d_scores.get();
    T *d_keys = state.d_keys.get(), *d_values = state.d_values.get();
    for (int64_t key_block = index * all / parts; key_block < (index + 1) * all / parts; ++key_block) {
      const Range keys = Range::block(key_block, kBackwardKeys, sizes_.keys);
      const int64_t rows = rounded_up(keys.count, kLowTileRows);
      std::fill_n(d_keys, rows * step_, T(0));
      std::fill_n(d_values, rows * step_v_, T(0));
      for (int64_t query_block = 0; query_block < sizes_.query_blocks(); ++query_block) {
        const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
        score(queries, keys, weights, d_scores);
        differentiate(queries, keys, weights, d_scores);
        accumulate(queries, keys, weights, d_scores, d_keys, d_values, d_queries);
      }
      write(gradients_.k, keys, d_keys, step_, sizes_.head_dim, static_cast<T>(in_.scale));
      write(gradients_.v, keys, d_values, step_v_, sizes_.head_dim_v, T(1));
    }
  }

  // First partial sum += the given one.
  void add_partial(int64_t query_block, int64_t partial_sum) {
    const int64_t first = query_block * kQueryBlock * step_;
    T* sum = partial(0) + first;
    const T* addend = partial(partial_sum) + first;
    const int64_t rows = Range::block(query_block, kQueryBlock, sizes_.queries).count;
    for (int64_t i = 0; i < rows * step_; ++i) sum[i] += addend[i];
  }

  void write_queries(int64_t query_block) const {
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    write(gradients_.q, queries, partial(0) + queries.first * step_, step_, sizes_.head_dim, static_cast<T>(in_.scale));
  }

 private:
  T* partial(int64_t index) const { return d_queries_.get() + index * padded_queries_ * step_; }

  void load_statistics(const Range& queries) {
    const auto d_out = matrix_of<const X>(d_out_, batch_, head_), out = matrix_of<const X>(saved_.out, batch_, head_);
    const T* lse = saved_.lse.template as<const T>() + (batch_ * sizes_.heads + head_) * sizes_.queries;
    for (int64_t n = queries.first; n < queries.first + queries.count; ++n) {
      Vec<T> sum = {};
      for (int64_t c = 0; c < sizes_.head_dim_v; c += Simd<T>::lanes) {
        const int64_t count = sizes_.head_dim_v - c;
        sum += load_channels<T>(d_out.row(n) + c * d_out.channel_step, d_out.channel_step, count) *
               load_channels<T>(out.row(n) + c * out.channel_step, out.channel_step, count);
      }
      delta_[n] = lane_sum<T>(sum);
      // Nothing weighs anything where all scores are -inf.
      const bool empty = lse[n] == -std::numeric_limits<T>::infinity();
      reference_[n] = empty ? std::numeric_limits<T>::infinity() : static_cast<T>(kLog2E * static_cast<double>(lse[n]));
    }
  }

  struct StoreScores {
    T* scores;

    template <int Rows>
    __attribute__((always_inline)) inline void operator()(int64_t i, int64_t c, const TileSums<T, Rows>& sums) const {
      PK_UNROLL_TILE
      for (int r = 0; r < Rows; ++r) {
        T* row = scores + (i + r) * score_step<T, kBackwardKeys> + c;
        store<T>(row, sums.at[r][0]);
        store<T>(row + Simd<T>::lanes, sums.at[r][1]);
      }
    }
  };

  // scores = scale log2(e) q k^T, d_weights = d_out v^T
  void score(const Range& queries, const Range& keys, T* scores, T* d_weights) const {
    multiply_block<T, 1, kQueryBlock>(queries_.get() + queries.first * sizes_.head_dim, queries.count,
                                      key_columns_.get() + keys.first * sizes_.head_dim,
                                      tile_width<T> * sizes_.head_dim, sizes_.head_dim, keys.count,
                                      StoreScores{scores});
    multiply_block<T, 1, kQueryBlock>(d_outs_.get() + queries.first * sizes_.head_dim_v, queries.count,
                                      value_columns_.get() + keys.first * sizes_.head_dim_v,
                                      tile_width<T> * sizes_.head_dim_v, sizes_.head_dim_v, keys.count,
                                      StoreScores{d_weights});
  }

  // In place: scores become weights (dropped ones zero), gradients of the weights become gradients of the scores.
  void differentiate(const Range& queries, const Range& keys, T* scores, T* d_weights) const {
    alignas(64) T keep[kBackwardKeys];
    for (int64_t i = 0; i < queries.count; ++i) {
      T *s = scores + i * score_step<T, kBackwardKeys>, *u = d_weights + i * score_step<T, kBackwardKeys>;
      const Vec<T> reference = broadcast(reference_[queries.first + i]), delta = broadcast(delta_[queries.first + i]);
      if (in_.dropout.p > 0) {
        dropout_row(in_.dropout, batch_, head_ * sizes_.queries + queries.first + i, keys.first, keys.count, keep);
        for (int64_t j = 0; j < keys.count; j += Simd<T>::lanes) {
          const Vec<T> p = exp2_flushed<T>(load(s + j) - reference), kept = load(keep + j);
          store<T>(s + j, p * kept);
          store<T>(u + j, p * (kept * load(u + j) - delta));
        }
      } else {
        PK_UNROLL
        for (int64_t j = 0; j < keys.count; j += Simd<T>::lanes) {
          const Vec<T> p = exp2_flushed<T>(load(s + j) - reference);
          store<T>(s + j, p);
          store<T>(u + j, p * (load(u + j) - delta));
        }
      }
    }
  }

  void accumulate(const Range& queries, const Range& keys, const T* weights, const T* d_scores, T* d_keys, T* d_values,
                  T* d_queries) const {
    constexpr int width = tile_width<T>;
    multiply_block<T, 1, score_step<T, kBackwardKeys>>(weights, keys.count, d_out_rows_.get() + queries.first * width,
                                                       sizes_.queries * width, queries.count, sizes_.head_dim_v,
                                                       AddTo<T>{d_values, step_v_});
    multiply_block<T, 1, score_step<T, kBackwardKeys>>(d_scores, keys.count, query_rows_.get() + queries.first * width,
                                                       sizes_.queries * width, queries.count, sizes_.head_dim,
                                                       AddTo<T>{d_keys, step_});
    multiply_block<T, score_step<T, kBackwardKeys>, 1>(d_scores, queries.count, key_rows_.get() + keys.first * width,
                                                       sizes_.keys * width, keys.count, sizes_.head_dim,
                                                       AddTo<T>{d_queries + queries.first * step_, step_});
  }

  void write(const TensorView& gradient, const Range& range, const T* rows, int64_t step, int64_t channels,
             T factor) const {
    const Matrix<X> target = matrix_of<X>(gradient, batch_, head_);
    for (int64_t i = 0; i < range.count; ++i) {
      write_row(rows + i * step, factor, channels, target.row(range.first + i));
    }
  }

  const LatentInputs& in_;
  const LatentOutputs& saved_;
  const TensorView& d_out_;
  const LatentGradients& gradients_;
  const Sizes sizes_;
  int64_t batch_ = 0, head_ = 0;
  const int64_t step_, step_v_, padded_queries_;
  // The operands with channels as depth (k, v, q, d_out), and those with channels as columns (k, q, d_out).
  AlignedBuffer<T> key_columns_, value_columns_, key_rows_, queries_, d_outs_, query_rows_, d_out_rows_;
  AlignedBuffer<T> reference_, delta_;
  AlignedBuffer<T> d_queries_;
};

template <class T, class X>
void backward(const LatentInputs& in, const LatentOutputs& saved, const TensorView& d_out,
              const LatentGradients& gradients) {
  const Sizes sizes(in);
  const int64_t parts = key_parts(sizes);
  using Head = BackwardHead<T, X>;
  using State = typename Head::State;
  ScratchPool<Head> heads;
  ScratchPool<State> states;
  const auto new_head = [&](int64_t partial_sums) {
    return std::make_unique<Head>(in, saved, d_out, gradients, partial_sums);
  };
  const auto new_state = [&] { return std::make_unique<State>(sizes); };
  const auto run_part = [&](Head& head, int64_t part, int64_t partial_sum) {
    states.with(new_state, [&](State& state) { head.part(part, partial_sum, state); });
  };
  const auto whole = [&](int64_t index) {
    heads.with([&] { return new_head(std::min<int64_t>(parts, 2)); },
               [&](Head& head) {
                 head.begin(index);
                 for (int64_t block = 0; block < blocks(sizes.keys, kBackwardKeys); ++block) head.pack_keys(block);
                 for (int64_t block = 0; block < sizes.query_blocks(); ++block) head.pack_queries(block);
                 run_part(head, 0, 0);
                 for (int64_t part = 1; part < parts; ++part) {
                   run_part(head, part, 1);
                   for (int64_t block = 0; block < sizes.query_blocks(); ++block) head.add_partial(block, 1);
                 }
                 for (int64_t block = 0; block < sizes.query_blocks(); ++block) head.write_queries(block);
               });
  };
  const auto split = [&](int64_t first, int64_t count) {
    const auto all = begun(first, count, [&] { return new_head(parts); });
    each_block(all, blocks(sizes.keys, kBackwardKeys), [](Head& head, int64_t block) { head.pack_keys(block); });
    each_block(all, sizes.query_blocks(), [](Head& head, int64_t block) { head.pack_queries(block); });
    each_block(all, parts, [&](Head& head, int64_t part) { run_part(head, part, part); });
    each_block(all, sizes.query_blocks(), [&](Head& head, int64_t block) {
      for (int64_t part = 1; part < parts; ++part) head.add_partial(block, part);
      head.write_queries(block);
    });
  };
  for_each_head(sizes.all_heads(), whole, split);
}

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

}  // namespace

namespace PK_LEVEL {

void latent_attention_fwd(const LatentInputs& in, const LatentOutputs& out) {
  with_types(in.q.dtype, [&](auto compute, auto data) { forward<decltype(compute), decltype(data)>(in, out); });
}

void latent_attention_bwd(const LatentInputs& in, const LatentOutputs& saved, const TensorView& d_out,
                          const LatentGradients& gradients) {
  with_types(in.q.dtype, [&](auto compute, auto data) {
    backward<decltype(compute), decltype(data)>(in, saved, d_out, gradients);
  });
}

}  // namespace PK_LEVEL
}  // namespace pk
