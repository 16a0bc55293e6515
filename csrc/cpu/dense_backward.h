// Dense attention, backward. With p = 2^(s - lse) recomputed, u = d_out v^T + d_total and delta as Gradients gives it:
// d_s = p (keep u - delta), d_v = (keep p)^T d_out, d_k = scale d_s^T q, d_q = scale d_s k.
//
// Of queries and keys the more numerous ones are taken in parts, a task each: their gradients are a part's own, and
// each part has sums for the gradients of all the others, which are added up in order.
#pragma once

#include "dense_attention.h"

namespace pk {
namespace {

// Packed blocks of queries.
template <class T>
class PackedQueries {
 public:
  PackedQueries(const DenseSizes& sizes, int64_t blocks)
      : sizes_(sizes),
        rows_size_(panel_step<T>(kQueryBlock) * pk::blocks(sizes.head_dim, tile_width<T>)),
        rows_size_v_(panel_step<T>(kQueryBlock) * pk::blocks(sizes.head_dim_v, tile_width<T>)),
        queries_(blocks * kQueryBlock * sizes.head_dim),
        d_outs_(blocks * kQueryBlock * sizes.head_dim_v),
        query_rows_(blocks * rows_size_),
        d_out_rows_(blocks * rows_size_v_),
        statistics_(blocks * kQueryBlock * 3) {}

  // Left operands of products over channels, and right operands of products over queries.
  T* queries(int64_t block) const { return queries_.get() + block * kQueryBlock * sizes_.head_dim; }
  T* d_outs(int64_t block) const { return d_outs_.get() + block * kQueryBlock * sizes_.head_dim_v; }
  T* query_rows(int64_t block) const { return query_rows_.get() + block * rows_size_; }
  T* d_out_rows(int64_t block) const { return d_out_rows_.get() + block * rows_size_v_; }
  // log2(e) lse, infinity where nothing weighs anything; delta; d_total.
  T* reference(int64_t block) const { return statistics_.get() + block * kQueryBlock * 3; }
  T* delta(int64_t block) const { return reference(block) + kQueryBlock; }
  T* d_total(int64_t block) const { return reference(block) + 2 * kQueryBlock; }

 private:
  const DenseSizes& sizes_;
  const int64_t rows_size_, rows_size_v_;
  AlignedBuffer<T> queries_, d_outs_, query_rows_, d_out_rows_, statistics_;
};

// Packed blocks of keys and values.
template <class T, bool one_matrix>
class PackedKeys {
 public:
  PackedKeys(const DenseSizes& sizes, int64_t blocks)
      : sizes_(sizes),
        rows_size_(panel_step<T>(kBackwardKeys) * pk::blocks(sizes.head_dim, tile_width<T>)),
        columns_(blocks * kBackwardKeys * sizes.head_dim),
        value_columns_(one_matrix ? 0 : blocks * kBackwardKeys * sizes.head_dim_v),
        rows_(blocks * rows_size_) {}

  // Right operands of products over channels, and of the product over keys.
  T* columns(int64_t block) const { return columns_.get() + block * kBackwardKeys * sizes_.head_dim; }
  T* value_columns(int64_t block) const {
    return one_matrix ? columns(block) : value_columns_.get() + block * kBackwardKeys * sizes_.head_dim_v;
  }
  T* rows(int64_t block) const { return rows_.get() + block * rows_size_; }

 private:
  const DenseSizes& sizes_;
  const int64_t rows_size_;
  AlignedBuffer<T> columns_, value_columns_, rows_;
};

// Which of queries and keys is taken in parts ("outer"), in how many, and the others' blocks ("inner").
struct BackwardPlan {
  static constexpr int64_t kQueryGroup = 4;  // blocks of queries that are taken together, as keys' blocks are larger

  bool keys_outer;
  int64_t parts, inner_blocks, outer_blocks;

  explicit BackwardPlan(const DenseSizes& sizes) : keys_outer(sizes.tokens >= sizes.queries) {
    const int64_t query_blocks = sizes.query_blocks(), key_blocks = blocks(sizes.tokens, kBackwardKeys);
    inner_blocks = keys_outer ? query_blocks : key_blocks;
    outer_blocks = keys_outer ? key_blocks : blocks(query_blocks, kQueryGroup);
    // Sums of a part take memory: fewer parts where there are many of them.
    const int64_t inner = std::max<int64_t>(keys_outer ? sizes.queries : sizes.tokens, 1);
    const int64_t most = std::clamp<int64_t>(16384 / inner, 8, kMostParts);
    const int64_t wanted = blocks(kWantedTasks, std::max<int64_t>(sizes.all_heads(), 1));
    parts = std::max<int64_t>(1, std::min({wanted, most, outer_blocks}));
  }
};

template <class T, class Tokens, class Gradients>
class DenseBackwardHead {
  static constexpr bool kOneMatrix = Tokens::kOneMatrix;
  static constexpr int kStep = score_step<T, kBackwardKeys>;

 public:
  // Of one part.
  struct State {
    PackedQueries<T> queries;
    PackedKeys<T, kOneMatrix> keys;
    AlignedBuffer<T> weights, d_scores, d_outer, copy;
    CommonKey<T> common_key;                 // of a group of queries
    alignas(64) T attention[kBackwardKeys];  // that each key of a block gets from the queries

    State(const DenseCall<Tokens>& call, const BackwardPlan& plan)
        : queries(call.sizes, plan.keys_outer ? 0 : BackwardPlan::kQueryGroup),
          keys(call.sizes, plan.keys_outer ? 1 : 0),
          weights(kQueryBlock * kStep),
          d_scores(kQueryBlock * kStep),
          d_outer(std::max(kBackwardKeys * key_width(call.sizes),
                           BackwardPlan::kQueryGroup * kQueryBlock * query_width(call.sizes))),
          copy(copy_size(call)),
          common_key(call.sizes.head_dim) {}
  };

  DenseBackwardHead(const DenseCall<Tokens>& call, const Gradients& gradients, const BackwardPlan& plan,
                    int64_t partial_sums)
      : call_(call),
        gradients_(gradients),
        plan_(plan),
        sizes_(call.sizes),
        query_step_(query_width(sizes_)),
        step_(row_step<T>(sizes_.head_dim)),
        step_v_(row_step<T>(sizes_.head_dim_v)),
        inner_size_(plan.keys_outer ? plan.inner_blocks * kQueryBlock * query_step_
                                    : plan.inner_blocks * kBackwardKeys * key_width(sizes_)),
        queries_(sizes_, plan.keys_outer ? plan.inner_blocks : 0),
        keys_(sizes_, plan.keys_outer ? 0 : plan.inner_blocks),
        d_inner_(partial_sums * inner_size_) {
    for (int64_t part = 0; plan.keys_outer && part < plan.parts; ++part) {
      common_keys_.push_back(std::make_unique<CommonKey<T>>(sizes_.head_dim));
    }
  }

  void begin(int64_t index) {
    batch_ = index / sizes_.heads;
    head_ = index % sizes_.heads;
    tokens_ = call_.tokens.attended().count(batch_);
  }

  void pack_inner(int64_t block, State& state) {
    if (plan_.keys_outer) {
      pack_queries_of(block, queries_, block, state);
    } else if (block < key_blocks()) {
      pack_keys_of(block, keys_, block, state);
    }
  }

  // Gradients of one part of the outer ones, whole, and that part's share in those of the inner ones.
  void part(int64_t index, int64_t partial_sum, State& state) {
    T* d_inner = d_inner_.get() + partial_sum * inner_size_;
    std::fill_n(d_inner, inner_size_, T(0));
    const int64_t all = plan_.keys_outer ? key_blocks() : plan_.outer_blocks;
    if (plan_.keys_outer) common_keys_[static_cast<size_t>(index)]->clear();
    for (int64_t outer = index * all / plan_.parts; outer < (index + 1) * all / plan_.parts; ++outer) {
      if (plan_.keys_outer) {
        key_block(outer, d_inner, *common_keys_[static_cast<size_t>(index)], state);
      } else {
        query_group(outer, d_inner, state);
      }
    }
  }

  // First partial sum += the given one, of one inner block.
  void add_partial(int64_t block, int64_t partial_sum) {
    const int64_t size = inner_size_ / plan_.inner_blocks;
    T* sum = d_inner_.get() + block * size;
    const T* addend = d_inner_.get() + partial_sum * inner_size_ + block * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += addend[i];
  }

  void write_inner(int64_t block, State& state) const {
    if (plan_.keys_outer) {
      CommonKey<T> common_key(sizes_.head_dim);
      for (const auto& part : common_keys_) common_key.add(*part);
      common_key.finish();
      write_queries(block, common_key, d_inner_.get() + block * kQueryBlock * query_step_);
    } else if (block < key_blocks()) {
      write_keys(block, d_inner_.get() + block * kBackwardKeys * key_width(sizes_), state);
    }
  }

 private:
  // Of the gradient of a query and, behind it, the sum of its d_s.
  static int64_t query_width(const DenseSizes& sizes) { return row_step<T>(sizes.head_dim + 1); }
  // Of the gradients of a key and its value, which are one where these are.
  static int64_t key_width(const DenseSizes& sizes) {
    return row_step<T>(sizes.head_dim) + (kOneMatrix ? 0 : row_step<T>(sizes.head_dim_v));
  }
  static int64_t copy_size(const DenseCall<Tokens>& call) {
    const int64_t channels = std::max(call.sizes.head_dim, call.sizes.head_dim_v);
    return std::max(kQueryBlock * channels, call.tokens.copy_size(kBackwardKeys));
  }

  int64_t key_blocks() const { return blocks(tokens_, kBackwardKeys); }
  Range query_range(int64_t block) const { return Range::block(block, kQueryBlock, sizes_.queries); }
  Range key_range(int64_t block) const { return Range::block(block, kBackwardKeys, tokens_); }

  void key_block(int64_t block, T* d_queries, CommonKey<T>& common_key, State& state) const {
    pack_keys_of(block, state.keys, 0, state);
    T* d_keys = state.d_outer.get();
    std::fill_n(d_keys, kBackwardKeys * key_width(sizes_), T(0));
    std::fill_n(state.attention, kBackwardKeys, T(0));
    for (int64_t query_block = 0; query_block < plan_.inner_blocks; ++query_block) {
      step({queries_, query_block, query_range(query_block)}, {state.keys, 0, key_range(block)},
           d_queries + query_block * kQueryBlock * query_step_, d_keys, state);
    }
    add_attended({state.keys, 0, key_range(block)}, state.attention, common_key);
    write_keys(block, d_keys, state);
  }

  void query_group(int64_t group, T* d_keys, State& state) const {
    const int64_t first = group * BackwardPlan::kQueryGroup;
    const int64_t count = std::min(BackwardPlan::kQueryGroup, sizes_.query_blocks() - first);
    T* d_queries = state.d_outer.get();
    std::fill_n(d_queries, count * kQueryBlock * query_step_, T(0));
    for (int64_t i = 0; i < count; ++i) pack_queries_of(first + i, state.queries, i, state);
    state.common_key.clear();
    for (int64_t block = 0; block < key_blocks(); ++block) {
      std::fill_n(state.attention, kBackwardKeys, T(0));
      for (int64_t i = 0; i < count; ++i) {
        step({state.queries, i, query_range(first + i)}, {keys_, block, key_range(block)},
             d_queries + i * kQueryBlock * query_step_, d_keys + block * kBackwardKeys * key_width(sizes_), state);
      }
      add_attended({keys_, block, key_range(block)}, state.attention, state.common_key);
    }
    state.common_key.finish();
    for (int64_t i = 0; i < count; ++i) {
      write_queries(first + i, state.common_key, d_queries + i * kQueryBlock * query_step_);
    }
  }

  void pack_queries_of(int64_t block, PackedQueries<T>& packed, int64_t place, State& state) const {
    constexpr int width = tile_width<T>;
    const Range range = query_range(block);
    const auto q = rows_of<T>(call_.q, batch_, head_, range, nullptr, state.copy.get());
    pack_queries<T>(q, range.count, sizes_.head_dim, static_cast<T>(call_.scale * kLog2E), packed.queries(place));
    pack_panels<T>(q, range.count, sizes_.head_dim, width, panel_step<T>(kQueryBlock), packed.query_rows(place));
    const auto d_out = rows_of<T>(gradients_.d_out(), batch_, head_, range, nullptr, state.copy.get());
    pack_queries<T>(d_out, range.count, sizes_.head_dim_v, T(1), packed.d_outs(place));
    pack_panels<T>(d_out, range.count, sizes_.head_dim_v, width, panel_step<T>(kQueryBlock), packed.d_out_rows(place));
    gradients_.statistics(batch_, head_, range, packed.reference(place), packed.delta(place), packed.d_total(place));
  }

  void pack_keys_of(int64_t block, PackedKeys<T, kOneMatrix>& packed, int64_t place, State& state) const {
    constexpr int width = tile_width<T>;
    const Range range = key_range(block);
    const TokenRows<T> rows = call_.tokens.rows(batch_, head_, range, state.copy.get());
    pack_columns<T>(rows.keys, range.count, sizes_.head_dim, packed.columns(place));
    pack_panels<T>(rows.keys, range.count, sizes_.head_dim, width, panel_step<T>(kBackwardKeys), packed.rows(place));
    if (!kOneMatrix) pack_columns<T>(rows.values, range.count, sizes_.head_dim_v, packed.value_columns(place));
  }

  struct QueryBlock {
    const PackedQueries<T>& packed;
    int64_t place;
    Range range;
  };
  struct KeyBlock {
    const PackedKeys<T, kOneMatrix>& packed;
    int64_t place;
    Range range;
  };

  // Adds what a block of queries and a block of keys have in each other's gradients.
  void step(const QueryBlock& queries, const KeyBlock& keys, T* d_queries, T* d_keys, State& state) const {
    T *weights = state.weights.get(), *d_scores = state.d_scores.get();
    const auto store_to = [](T* target) {
      return [target](bool adds, bool) { return StoreTile<T, kStep>{target, adds}; };
    };
    multiply_channels<T>(queries.packed.queries(queries.place), queries.range.count, keys.packed.columns(keys.place),
                         sizes_.head_dim, keys.range.count, store_to(weights));
    multiply_channels<T>(queries.packed.d_outs(queries.place), queries.range.count,
                         keys.packed.value_columns(keys.place), sizes_.head_dim_v, keys.range.count,
                         store_to(d_scores));
    differentiate(queries, keys.range, weights, d_scores);
    if (gradients_.needs_keys()) {
      T* d_values = kOneMatrix ? d_keys : d_keys + kBackwardKeys * step_;
      multiply_block<T, 1, kStep>(weights, keys.range.count, queries.packed.d_out_rows(queries.place),
                                  panel_step<T>(kQueryBlock), queries.range.count, sizes_.head_dim_v,
                                  AddTo<T>{d_values, step_v_});
      multiply_block<T, 1, kStep>(d_scores, keys.range.count, queries.packed.query_rows(queries.place),
                                  panel_step<T>(kQueryBlock), queries.range.count, sizes_.head_dim,
                                  AddTo<T>{d_keys, step_});
    }
    if (gradients_.needs_queries()) {
      multiply_block<T, kStep, 1>(d_scores, queries.range.count, keys.packed.rows(keys.place),
                                  panel_step<T>(kBackwardKeys), keys.range.count, sizes_.head_dim,
                                  AddTo<T>{d_queries, query_step_});
      add_row_sums<T>(d_scores, queries.range.count, keys.range.count, d_queries + sizes_.head_dim, query_step_);
      add_column_sums<T>(weights, queries.range.count, keys.range.count, state.attention);
    }
  }

  void add_attended(const KeyBlock& keys, const T* attention, CommonKey<T>& common_key) const {
    if (!gradients_.needs_queries()) return;
    common_key.add(keys.packed.rows(keys.place), panel_step<T>(kBackwardKeys), keys.range.count, attention);
  }

  // In place: scores become weights (dropped ones zero), gradients of the weights become gradients of the scores.
  void differentiate(const QueryBlock& queries, const Range& keys, T* scores, T* d_weights) const {
    alignas(64) T keep[kBackwardKeys];
    const KeptWeights kept = call_.kept(batch_, head_, queries.range.first, keys.first);
    const PackedQueries<T>& packed = queries.packed;
    for (int64_t i = 0; i < queries.range.count; ++i) {
      T *s = scores + i * kStep, *u = d_weights + i * kStep;
      const Vec<T> reference = broadcast(packed.reference(queries.place)[i]);
      const Vec<T> delta = broadcast(packed.delta(queries.place)[i]);
      const Vec<T> d_total = broadcast(packed.d_total(queries.place)[i]);
      if (kept.drops()) {
        kept.row(i, keys.count, keep);
        for (int64_t j = 0; j < keys.count; j += Simd<T>::lanes) {
          const Vec<T> p = exp2_flushed<T>(load(s + j) - reference), scales = load(keep + j);
          store<T>(s + j, p * scales);
          store<T>(u + j, p * (scales * (load(u + j) + d_total) - delta));
        }
      } else {
        const Vec<T> both = d_total - delta;
        PK_UNROLL
        for (int64_t j = 0; j < keys.count; j += Simd<T>::lanes) {
          const Vec<T> p = exp2_flushed<T>(load(s + j) - reference);
          store<T>(s + j, p);
          store<T>(u + j, p * (load(u + j) + both));
        }
      }
    }
  }

  void write_queries(int64_t block, const CommonKey<T>& common_key, T* rows) const {
    if (!gradients_.needs_queries()) return;
    const Range queries = query_range(block);
    for (int64_t i = 0; i < queries.count; ++i) {
      T* row = rows + i * query_step_;
      common_key.take(row[sizes_.head_dim] - gradients_.d_lse(batch_, queries.first + i), row);
    }
    gradients_.write_queries(batch_, head_, queries, rows, query_step_, static_cast<T>(call_.scale));
  }

  void write_keys(int64_t block, T* d_keys, State& state) const {
    if (!gradients_.needs_keys()) return;
    gradients_.write_keys(batch_, head_, key_range(block), d_keys, step_, d_keys + kBackwardKeys * step_, step_v_,
                          static_cast<T>(call_.scale), state.copy.get());
  }

  const DenseCall<Tokens>& call_;
  const Gradients& gradients_;
  const BackwardPlan& plan_;
  const DenseSizes& sizes_;
  const int64_t query_step_, step_, step_v_, inner_size_;
  int64_t batch_ = 0, head_ = 0, tokens_ = 0;
  PackedQueries<T> queries_;
  PackedKeys<T, kOneMatrix> keys_;
  AlignedBuffer<T> d_inner_;
  std::vector<std::unique_ptr<CommonKey<T>>> common_keys_;  // of each part of the keys
};

template <class T, class Tokens, class Gradients>
void dense_backward(const DenseCall<Tokens>& call, const Gradients& gradients) {
  const BackwardPlan plan(call.sizes);
  using Head = DenseBackwardHead<T, Tokens, Gradients>;
  using State = typename Head::State;
  ScratchPool<Head> heads;
  ScratchPool<State> states;
  const auto new_head = [&](int64_t partial_sums) {
    return std::make_unique<Head>(call, gradients, plan, partial_sums);
  };
  const auto with_state = [&](const auto& body) {
    states.with([&] { return std::make_unique<State>(call, plan); }, body);
  };
  const auto whole = [&](int64_t index) {
    heads.with([&] { return new_head(std::min<int64_t>(plan.parts, 2)); },
               [&](Head& head) {
                 with_state([&](State& state) {
                   head.begin(index);
                   for (int64_t block = 0; block < plan.inner_blocks; ++block) head.pack_inner(block, state);
                   head.part(0, 0, state);
                   for (int64_t part = 1; part < plan.parts; ++part) {
                     head.part(part, 1, state);
                     for (int64_t block = 0; block < plan.inner_blocks; ++block) head.add_partial(block, 1);
                   }
                   for (int64_t block = 0; block < plan.inner_blocks; ++block) head.write_inner(block, state);
                 });
               });
  };
  const auto split = [&](int64_t first, int64_t count) {
    const auto all = begun(first, count, [&] { return new_head(plan.parts); });
    each_block(all, plan.inner_blocks,
               [&](Head& head, int64_t block) { with_state([&](State& state) { head.pack_inner(block, state); }); });
    each_block(all, plan.parts,
               [&](Head& head, int64_t part) { with_state([&](State& state) { head.part(part, part, state); }); });
    each_block(all, plan.inner_blocks, [&](Head& head, int64_t block) {
      for (int64_t part = 1; part < plan.parts; ++part) head.add_partial(block, part);
      with_state([&](State& state) { head.write_inner(block, state); });
    });
  };
  for_each_head(call.sizes.all_heads(), whole, split);
}

}  // namespace
}  // namespace pk
