// Dense attention of any number of queries to any number of tokens, forward and backward: softmax(scale q k^T) v, of
// whatever gives keys and values block after block (`Tokens`) to whatever takes the results (`Results`, `Gradients`).
//
// Everything is computed in float (double for double). What is split among threads, and in which order parts are added
// up, follows from shapes and from the mask alone.
#pragma once

#include <type_traits>

#include "../ops.h"
#include "attention_blocks.h"

namespace pk {
namespace {

// How many tasks a call is split into, where it is large enough, and into how many parts, at most, of one head's
// queries or keys: each part has sums of its own.
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kMostParts = 16;

// The tokens of each input that its mask leaves, in order.
class AttendedTokens {
 public:
  // mask (batch, tokens), or undefined: all.
  AttendedTokens(const TensorView& mask, int64_t batch, int64_t tokens)
      : tokens_(tokens), inputs_(static_cast<size_t>(mask.defined() ? batch : 0)) {
    parallel_for(static_cast<int64_t>(inputs_.size()), [&](int64_t b) { list(mask, b); });
  }

  int64_t most() const { return tokens_; }
  int64_t count(int64_t batch) const { return inputs_.empty() ? tokens_ : input(batch).count; }
  // The places of the tokens from the given one on; null where these are the first ones, one after another.
  const int64_t* listed(int64_t batch, int64_t first) const {
    return inputs_.empty() || input(batch).places.empty() ? nullptr : input(batch).places.data() + first;
  }

 private:
  struct Input {
    int64_t count = 0;
    std::vector<int64_t> places;
  };

  const Input& input(int64_t batch) const { return inputs_[static_cast<size_t>(batch)]; }

  void list(const TensorView& mask, int64_t b) {
    Input& input = inputs_[static_cast<size_t>(b)];
    const uint8_t* attend = mask.as<const uint8_t>() + b * mask.stride(0);
    for (int64_t m = 0; m < tokens_; ++m) {
      if (attend[m * mask.stride(1)]) input.places.push_back(m);
    }
    input.count = static_cast<int64_t>(input.places.size());
    if (input.count == 0 || input.places.back() == input.count - 1) input.places.clear();
  }

  int64_t tokens_;
  std::vector<Input> inputs_;
};

template <class T, class X>
constexpr bool computes_in = std::is_same_v<T, X> || (sizeof(T) == 4 && sizeof(X) == 2);

template <class T, class X>
inline void copy_row(const X* source, int64_t step, int64_t channels, T* target) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t c = 0;
  if constexpr (computes_in<T, X>) {
    for (; step == 1 && c + lanes <= channels; c += lanes) {
      store_unaligned<T>(target + c, load_channels<T>(source + c, 1, lanes));
    }
  }
  for (; c < channels; ++c) target[c] = convert<T>(source[c * step]);
}

// Rows of one head of a (batch, heads, rows, channels) tensor as T, row_step apart: those of the range, or the listed
// ones.
template <class T>
void copy_rows(const TensorView& view, int64_t batch, int64_t head, const Range& range, const int64_t* listed,
               int64_t row_step, T* target) {
  with_floating_type(view.dtype, [&](auto x) {
    const auto source = matrix_of<const decltype(x)>(view, batch, head);
    for (int64_t i = 0; i < range.count; ++i) {
      copy_row(source.row(listed ? listed[i] : range.first + i), source.channel_step, view.size(3),
               target + i * row_step);
    }
  });
}

// The same where they stand, if that can be; else copied.
template <class T>
Matrix<const T> rows_of(const TensorView& view, int64_t batch, int64_t head, const Range& range, const int64_t* listed,
                        T* copy) {
  if (!listed && view.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32)) {
    const auto rows = matrix_of<const T>(view, batch, head);
    return {rows.row(range.first), rows.row_step, rows.channel_step};
  }
  copy_rows(view, batch, head, range, listed, view.size(3), copy);
  return {copy, view.size(3), 1};
}

template <class T>
inline void write_row_as(DType dtype, const T* source, T factor, int64_t channels, void* target, int64_t offset) {
  with_floating_type(dtype,
                     [&](auto x) { write_row(source, factor, channels, static_cast<decltype(x)*>(target) + offset); });
}

// Writes rows, row_step apart, to the range's or the listed rows of a head, whose channels are contiguous.
template <class T>
void write_rows(const TensorView& view, int64_t batch, int64_t head, const Range& range, const int64_t* listed,
                const T* rows, int64_t row_step, T factor) {
  for (int64_t i = 0; i < range.count; ++i) {
    const int64_t row = listed ? listed[i] : range.first + i;
    write_row_as(view.dtype, rows + i * row_step, factor, view.size(3), view.data,
                 batch * view.stride(0) + head * view.stride(1) + row * view.stride(2));
  }
}

// products[i] = left[i] . right[i], in T, over the channels of rows of two tensors.
template <class T>
void row_products(const TensorView& left, const TensorView& right, int64_t batch, int64_t head, const Range& range,
                  T* products) {
  with_floating_type(right.dtype, [&](auto x) {
    using X = decltype(x);
    if constexpr (computes_in<T, X>) {
      const auto a = matrix_of<const X>(left, batch, head), b = matrix_of<const X>(right, batch, head);
      for (int64_t i = 0; i < range.count; ++i) {
        Vec<T> sum = {};
        for (int64_t c = 0; c < right.size(3); c += Simd<T>::lanes) {
          const int64_t count = right.size(3) - c;
          const X *first = a.row(range.first + i), *second = b.row(range.first + i);
          sum += load_channels<T>(first + c * a.channel_step, a.channel_step, count) *
                 load_channels<T>(second + c * b.channel_step, b.channel_step, count);
        }
        products[i] = lane_sum<T>(sum);
      }
    }
  });
}

// What scores are relative to, in powers of two: nothing weighs anything where all of them are -inf.
template <class T>
inline T score_reference(double lse) {
  const bool empty = lse == -std::numeric_limits<double>::infinity();
  return empty ? std::numeric_limits<T>::infinity() : static_cast<T>(kLog2E * lse);
}

// Keys and values of some tokens; one and the same matrix where Tokens::kOneMatrix.
template <class T>
struct TokenRows {
  Matrix<const T> keys, values;
};

struct DenseSizes {
  int64_t batch, heads, queries, tokens, head_dim, head_dim_v;

  int64_t all_heads() const { return batch * heads; }
  int64_t query_blocks() const { return blocks(queries, kQueryBlock); }
};

// What both directions are given.
template <class Tokens>
struct DenseCall {
  const TensorView& q;  // (batch, heads, queries, head_dim)
  const Tokens& tokens;
  double scale;
  const Dropout& dropout;
  DenseSizes sizes;

  KeptWeights kept(int64_t batch, int64_t head, int64_t query, int64_t token) const {
    return {dropout, batch, head * sizes.queries + query, token, tokens.attended().listed(batch, token)};
  }
};

// ---- Forward. A task has a group of query blocks and a part of the keys: it packs a block of keys once for all
// queries of the group. Parts of the keys are merged in order.

template <class T, class Tokens, class Results>
class DenseForward {
 public:
  // Both must outlive the object.
  DenseForward(const DenseCall<Tokens>& call, const Results& results)
      : call_(call), results_(results), sizes_(call.sizes), out_step_(row_step<T>(sizes_.head_dim_v)) {
    constexpr int64_t most_blocks = 12, good_blocks = 8, few_tasks = 16;
    const int64_t heads = std::max<int64_t>(sizes_.all_heads(), 1), query_blocks = sizes_.query_blocks();
    const auto groups_of = [&](int64_t size) { return std::max<int64_t>(blocks(query_blocks, size), 1); };
    const int64_t fewest = groups_of(most_blocks);
    // Long parts of the keys cost nothing; groups of fewer queries pack more often; short parts are merged for long.
    parts_ = parts_of(kWantedTasks, heads * fewest, 2048);
    groups_ = std::max(
        std::clamp(blocks(kWantedTasks, heads * parts_), fewest, groups_of(good_blocks)),
        std::clamp(blocks(few_tasks, heads * parts_), fewest, std::max(fewest, groups_of(Tokens::kFewestQueryBlocks))));
    parts_ = std::max(parts_, parts_of(few_tasks, heads * groups_, 256));
  }

  void run() {
    const int64_t tasks = sizes_.all_heads() * groups_ * parts_;
    std::vector<std::unique_ptr<Group>> partial(static_cast<size_t>(parts_ > 1 ? tasks : 0));
    ScratchPool<Scratch> scratches;
    ScratchPool<Group> groups;
    const int64_t query_blocks = blocks(sizes_.query_blocks(), groups_);
    const auto new_scratch = [&] { return std::make_unique<Scratch>(call_, query_blocks); };
    const auto new_group = [&] { return std::make_unique<Group>(query_blocks, out_step_); };
    parallel_for(tasks, [&](int64_t index) {
      const Task task = task_of(index);
      scratches.with(new_scratch, [&](Scratch& scratch) {
        if (parts_ > 1) {
          auto& group = partial[static_cast<size_t>(index)];
          group = new_group();
          attend(task, *group, scratch);
          return;
        }
        groups.with(new_group, [&](Group& group) {
          attend(task, group, scratch);
          for (int64_t block = task.first_block; block < task.last_block; ++block) finish(task, group, block);
        });
      });
    });
    if (parts_ == 1) return;
    parallel_for(sizes_.all_heads() * groups_, [&](int64_t index) {
      const Task task = task_of(index * parts_);
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        merge(partial.data() + index * parts_, block - task.first_block);
        finish(task, *partial[static_cast<size_t>(index * parts_)], block);
      }
    });
  }

 private:
  struct Task {
    int64_t batch, head, first_block, last_block, part;

    Range queries(int64_t block, int64_t all) const { return Range::block(block, kQueryBlock, all); }
  };

  // Softmax and weighted sums of a group's queries.
  struct Group {
    AlignedBuffer<T> out;
    std::vector<SoftmaxState<T>> softmax;

    Group(int64_t query_blocks, int64_t out_step)
        : out(query_blocks * kQueryBlock * out_step), softmax(static_cast<size_t>(query_blocks)) {}
  };

  struct Scratch {
    AlignedBuffer<T> queries, columns, values, copy;
    ScoreBlock<T> scores;

    Scratch(const DenseCall<Tokens>& call, int64_t query_blocks)
        : queries(query_blocks * kQueryBlock * call.sizes.head_dim),
          columns(kForwardKeys * call.sizes.head_dim),
          values(panel_step<T>(kForwardKeys) * blocks(call.sizes.head_dim_v, tile_width<T>)),
          copy(std::max(kQueryBlock * call.sizes.head_dim, call.tokens.copy_size(kForwardKeys))) {}
  };

  int64_t parts_of(int64_t wanted_tasks, int64_t tasks, int64_t shortest) const {
    return std::clamp<int64_t>(blocks(wanted_tasks, tasks), 1,
                               std::clamp<int64_t>(blocks(sizes_.tokens, shortest), 1, kMostParts));
  }

  Task task_of(int64_t index) const {
    const int64_t part = index % parts_, group = index / parts_ % groups_, head = index / (parts_ * groups_);
    const int64_t all = sizes_.query_blocks();
    return {head / sizes_.heads, head % sizes_.heads, group * all / groups_, (group + 1) * all / groups_, part};
  }

  void attend(const Task& task, Group& group, Scratch& scratch) const {
    begin(task, group, scratch);
    const int64_t tokens = call_.tokens.attended().count(task.batch);
    const int64_t size = rounded_up(blocks(tokens, parts_), 16), end = std::min(tokens, (task.part + 1) * size);
    for (int64_t first = task.part * size; first < end; first += kForwardKeys) {
      const Range keys{first, std::min<int64_t>(kForwardKeys, end - first)};
      pack(task, keys, scratch);
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        attend_to_block(task, block, keys, group, scratch);
      }
    }
  }

  void begin(const Task& task, Group& group, Scratch& scratch) const {
    for (int64_t block = task.first_block; block < task.last_block; ++block) {
      const int64_t local = block - task.first_block;
      const Range queries = task.queries(block, sizes_.queries);
      const auto rows = rows_of<T>(call_.q, task.batch, task.head, queries, nullptr, scratch.copy.get());
      pack_queries<T>(rows, queries.count, sizes_.head_dim, static_cast<T>(call_.scale * kLog2E),
                      scratch.queries.get() + local * kQueryBlock * sizes_.head_dim);
      group.softmax[static_cast<size_t>(local)].clear();
      std::fill_n(group.out.get() + local * kQueryBlock * out_step_, kQueryBlock * out_step_, T(0));
    }
  }

  void pack(const Task& task, const Range& keys, Scratch& scratch) const {
    constexpr int width = tile_width<T>;
    const TokenRows<T> rows = call_.tokens.rows(task.batch, task.head, keys, scratch.copy.get());
    pack_columns<T>(rows.keys, keys.count, sizes_.head_dim, scratch.columns.get());
    pack_panels<T>(rows.values, keys.count, sizes_.head_dim_v, width, panel_step<T>(keys.count), scratch.values.get());
  }

  void attend_to_block(const Task& task, int64_t block, const Range& keys, Group& group, Scratch& scratch) const {
    const int64_t local = block - task.first_block;
    const Range queries = task.queries(block, sizes_.queries);
    scratch.scores.score(scratch.queries.get() + local * kQueryBlock * sizes_.head_dim, queries.count,
                         scratch.columns.get(), sizes_.head_dim, keys.count);
    scratch.scores.softmax_step(group.softmax[static_cast<size_t>(local)], queries.count, keys.count,
                                call_.kept(task.batch, task.head, queries.first, keys.first));
    scratch.scores.accumulate(group.out.get() + local * kQueryBlock * out_step_, out_step_, queries.count,
                              scratch.values.get(), panel_step<T>(keys.count), keys.count, sizes_.head_dim_v);
  }

  // One block of queries of all parts of the keys, into the first part.
  void merge(std::unique_ptr<Group>* partial, int64_t local) const {
    SoftmaxState<T>& merged = partial[0]->softmax[static_cast<size_t>(local)];
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      T maximum = merged.maximum[i];
      for (int64_t part = 1; part < parts_; ++part) {
        const T other = partial[part]->softmax[static_cast<size_t>(local)].maximum[i];
        maximum = maximum > other ? maximum : other;  // a NaN of the last part to have one stays
      }
      for (int64_t part = 0; part < parts_; ++part) {
        add_part(partial[0].get(), partial[part].get(), part == 0, local, i, maximum);
      }
      merged.maximum[i] = maximum;
    }
  }

  void add_part(Group* sums, const Group* addend, bool first, int64_t local, int64_t i, T maximum) const {
    SoftmaxState<T>& to = sums->softmax[static_cast<size_t>(local)];
    const SoftmaxState<T>& from = addend->softmax[static_cast<size_t>(local)];
    const T reference = maximum == -std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::lowest() : maximum;
    const Vec<T> factor = exp2_flushed<T>(broadcast(from.maximum[i] - reference));
    to.sum[i] = (first ? Vec<T>{} : to.sum[i]) + from.sum[i] * factor;
    to.kept[i] = (first ? Vec<T>{} : to.kept[i]) + from.kept[i] * factor;
    T* target = sums->out.get() + (local * kQueryBlock + i) * out_step_;
    const T* source = addend->out.get() + (local * kQueryBlock + i) * out_step_;
    for (int64_t c = 0; c < out_step_; c += Simd<T>::lanes) {
      const Vec<T> value = load(source + c) * factor;
      store<T>(target + c, first ? value : load(target + c) + value);
    }
  }

  void finish(const Task& task, const Group& group, int64_t block) const {
    const Range queries = task.queries(block, sizes_.queries);
    const int64_t local = block - task.first_block;
    const SoftmaxState<T>& state = group.softmax[static_cast<size_t>(local)];
    for (int64_t i = 0; i < queries.count; ++i) {
      const T sum = lane_sum<T>(state.sum[i]);  // zero where all scores are -inf: such a query gets zeros
      const T inverse = sum == 0 ? T(0) : 1 / sum;
      const T kept = call_.dropout.p > 0 ? lane_sum<T>(state.kept[i]) : sum;
      const double lse = kLn2 * (static_cast<double>(state.maximum[i]) + std::log2(static_cast<double>(sum)));
      results_.write(task.batch, task.head, queries.first + i, group.out.get() + (local * kQueryBlock + i) * out_step_,
                     inverse, lse, kept * inverse);
    }
  }

  const DenseCall<Tokens>& call_;
  const Results& results_;
  const DenseSizes& sizes_;
  const int64_t out_step_;
  int64_t parts_, groups_;
};

// ---- Backward. With p = 2^(s - lse) recomputed, u = d_out v^T + d_total and delta as Gradients gives it: d_s = p
// (keep u - delta), d_v = (keep p)^T d_out, d_k = scale d_s^T q, d_q = scale d_s k.
//
// Of queries and keys the more numerous ones are taken in parts, a task each: their gradients are a part's own, and
// each part has sums for the gradients of all the others, which are added up in order.

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

    State(const DenseCall<Tokens>& call, const BackwardPlan& plan)
        : queries(call.sizes, plan.keys_outer ? 0 : BackwardPlan::kQueryGroup),
          keys(call.sizes, plan.keys_outer ? 1 : 0),
          weights(kQueryBlock * kStep),
          d_scores(kQueryBlock * kStep),
          d_outer(std::max(kBackwardKeys * key_width(call.sizes),
                           BackwardPlan::kQueryGroup * kQueryBlock * query_width(call.sizes))),
          copy(copy_size(call)) {}
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
        d_inner_(partial_sums * inner_size_),
        key_sums_(blocks(sizes_.tokens, kBackwardKeys) * step_) {}

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
    for (int64_t outer = index * all / plan_.parts; outer < (index + 1) * all / plan_.parts; ++outer) {
      if (plan_.keys_outer) {
        key_block(outer, d_inner, state);
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
      write_queries(block, d_inner_.get() + block * kQueryBlock * query_step_);
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

  void key_block(int64_t block, T* d_queries, State& state) {
    pack_keys_of(block, state.keys, 0, state);
    T* d_keys = state.d_outer.get();
    std::fill_n(d_keys, kBackwardKeys * key_width(sizes_), T(0));
    for (int64_t query_block = 0; query_block < plan_.inner_blocks; ++query_block) {
      step({queries_, query_block, query_range(query_block)}, {state.keys, 0, key_range(block)},
           d_queries + query_block * kQueryBlock * query_step_, d_keys, state);
    }
    write_keys(block, d_keys, state);
  }

  void query_group(int64_t group, T* d_keys, State& state) {
    const int64_t first = group * BackwardPlan::kQueryGroup;
    const int64_t count = std::min(BackwardPlan::kQueryGroup, sizes_.query_blocks() - first);
    T* d_queries = state.d_outer.get();
    std::fill_n(d_queries, count * kQueryBlock * query_step_, T(0));
    for (int64_t i = 0; i < count; ++i) pack_queries_of(first + i, state.queries, i, state);
    for (int64_t block = 0; block < key_blocks(); ++block) {
      for (int64_t i = 0; i < count; ++i) {
        step({state.queries, i, query_range(first + i)}, {keys_, block, key_range(block)},
             d_queries + i * kQueryBlock * query_step_, d_keys + block * kBackwardKeys * key_width(sizes_), state);
      }
    }
    for (int64_t i = 0; i < count; ++i) write_queries(first + i, d_queries + i * kQueryBlock * query_step_);
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

  void pack_keys_of(int64_t block, PackedKeys<T, kOneMatrix>& packed, int64_t place, State& state) {
    constexpr int width = tile_width<T>;
    const Range range = key_range(block);
    const TokenRows<T> rows = call_.tokens.rows(batch_, head_, range, state.copy.get());
    pack_columns<T>(rows.keys, range.count, sizes_.head_dim, packed.columns(place));
    pack_panels<T>(rows.keys, range.count, sizes_.head_dim, width, panel_step<T>(kBackwardKeys), packed.rows(place));
    sum_rows(rows.keys, range.count, sizes_.head_dim, key_sums_.get() + block * step_);
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
    }
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

  void write_queries(int64_t block, T* rows) const {
    if (!gradients_.needs_queries()) return;
    const Range queries = query_range(block);
    const MeanRow<T> mean_key(key_sums_.get(), key_blocks(), step_, tokens_, sizes_.head_dim);
    for (int64_t i = 0; i < queries.count; ++i) {
      T* row = rows + i * query_step_;
      mean_key.take(row[sizes_.head_dim] - gradients_.d_lse(batch_, queries.first + i), row);
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
  AlignedBuffer<T> key_sums_;  // of each block of keys
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
