// Self-attention over latents on the CPU, forward and backward: softmax(scale q k^T) v, block by block, so that no
// score matrix is stored. Compiled once per instruction set.
//
// Everything is computed in float (double for double): 16-bit inputs are widened when they are packed (panels.h).
#include "../ops.h"
#include "attention_blocks.h"

namespace pk {
namespace {

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

// Rows of a matrix from a range's first one on.
template <class X>
inline Matrix<X> from(const Matrix<X>& source, const Range& range) {
  return {source.row(range.first), source.row_step, source.channel_step};
}

// Rows as the right operand of a product that sums over all_rows of them.
template <class T, class X>
void pack_rows(const Matrix<const X>& source, const Range& range, int64_t channels, int64_t all_rows, T* panels) {
  constexpr int width = tile_width<T>;
  pack_panels<T>(from(source, range), range.count, channels, width, all_rows * width, panels + range.first * width);
}

// ---- Forward

template <class T, class X>
class ForwardHead {
 public:
  // Of one query block, out not yet divided by the sums.
  struct State {
    int64_t out_step;
    AlignedBuffer<T> queries, out;
    ScoreBlock<T> scores;
    SoftmaxState<T> softmax;

    explicit State(const Sizes& sizes)
        : out_step(rounded_up(sizes.head_dim_v, tile_width<T>)),
          queries(sizes.head_dim * kQueryBlock),
          out(kQueryBlock * out_step) {}

    void clear(int64_t rows) {
      std::fill_n(out.get(), rows * out_step, T(0));
      softmax.clear();
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
    pack_columns<T>(from(matrix_of<const X>(in_.k, batch_, head_), keys), keys.count, sizes_.head_dim, columns(keys));
    pack_rows<T>(matrix_of<const X>(in_.v, batch_, head_), keys, sizes_.head_dim_v, sizes_.keys, values_.get());
  }

  void attend(int64_t query_block, State& state) const {
    constexpr int width = tile_width<T>;
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    const int64_t count = queries.count;
    state.clear(touched_rows<T>(count));
    pack_queries<T>(from(matrix_of<const X>(in_.q, batch_, head_), queries), count, sizes_.head_dim,
                    static_cast<T>(in_.scale * kLog2E), state.queries.get());
    for (int64_t block = 0; block < blocks(sizes_.keys, kForwardKeys); ++block) {
      const Range keys = Range::block(block, kForwardKeys, sizes_.keys);
      state.scores.score(state.queries.get(), count, columns(keys), sizes_.head_dim, keys.count);
      state.scores.softmax_step(state.softmax, count, keys.count,
                                {in_.dropout, batch_, head_ * sizes_.queries + queries.first, keys.first});
      state.scores.accumulate(state.out.get(), state.out_step, count, values_.get() + keys.first * width,
                              sizes_.keys * width, keys.count, sizes_.head_dim_v);
    }
    finish(state, queries);
  }

 private:
  T* columns(const Range& keys) const { return keys_.get() + keys.first * sizes_.head_dim; }

  void finish(const State& state, const Range& queries) const {
    const Matrix<X> out = matrix_of<X>(out_.out, batch_, head_);
    T* lse = out_.lse.template as<T>() + (batch_ * sizes_.heads + head_) * sizes_.queries + queries.first;
    for (int64_t i = 0; i < queries.count; ++i) {
      const T sum = lane_sum<T>(state.softmax.sum[i]);  // zero where all scores are -inf: such a query gets zeros
      write_row(state.out.get() + i * state.out_step, sum == 0 ? T(0) : 1 / sum, sizes_.head_dim_v,
                out.row(queries.first + i));
      lse[i] =
          static_cast<T>(kLn2 * (static_cast<double>(state.softmax.maximum[i]) + std::log2(static_cast<double>(sum))));
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
    alignas(64) T attention[kBackwardKeys];  // that each key of a block gets from all queries

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
        query_step_(rounded_up(sizes_.head_dim + 1, tile_width<T>)),
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
        d_queries_(partial_sums * padded_queries_ * query_step_) {
    for (int64_t part = 0; part < key_parts(sizes_); ++part) {
      common_keys_.push_back(std::make_unique<CommonKey<T>>(sizes_.head_dim));
    }
  }

  void begin(int64_t index) {
    batch_ = index / sizes_.heads;
    head_ = index % sizes_.heads;
  }

  void pack_keys(int64_t key_block) {
    const Range keys = Range::block(key_block, kBackwardKeys, sizes_.keys);
    const auto k = matrix_of<const X>(in_.k, batch_, head_), v = matrix_of<const X>(in_.v, batch_, head_);
    pack_columns<T>(from(k, keys), keys.count, sizes_.head_dim, key_columns_.get() + keys.first * sizes_.head_dim);
    pack_columns<T>(from(v, keys), keys.count, sizes_.head_dim_v,
                    value_columns_.get() + keys.first * sizes_.head_dim_v);
    pack_rows<T>(k, keys, sizes_.head_dim, sizes_.keys, key_rows_.get());
  }

  void pack_queries(int64_t query_block) {
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    const auto q = matrix_of<const X>(in_.q, batch_, head_), d_out = matrix_of<const X>(d_out_, batch_, head_);
    pk::pack_queries<T>(from(q, queries), queries.count, sizes_.head_dim, static_cast<T>(in_.scale * kLog2E),
                        queries_.get() + queries.first * sizes_.head_dim);
    pk::pack_queries<T>(from(d_out, queries), queries.count, sizes_.head_dim_v, T(1),
                        d_outs_.get() + queries.first * sizes_.head_dim_v);
    pack_rows<T>(q, queries, sizes_.head_dim, sizes_.queries, query_rows_.get());
    pack_rows<T>(d_out, queries, sizes_.head_dim_v, sizes_.queries, d_out_rows_.get());
    load_statistics(queries);
  }

  // Gradients of one part of the keys and values, whole, and that part's share in the gradient of the queries.
  void part(int64_t index, int64_t partial_sum, State& state) {
    const int64_t all = blocks(sizes_.keys, kBackwardKeys), parts = key_parts(sizes_);
    T* d_queries = partial(partial_sum);
    std::fill_n(d_queries, rounded_up(sizes_.queries, kLowTileRows) * query_step_, T(0));
    T *weights = state.weights.get(), *d_scores = state.d_scores.get();
    T *d_keys = state.d_keys.get(), *d_values = state.d_values.get();
    CommonKey<T>& common_key = *common_keys_[static_cast<size_t>(index)];
    common_key.clear();
    for (int64_t key_block = index * all / parts; key_block < (index + 1) * all / parts; ++key_block) {
      const Range keys = Range::block(key_block, kBackwardKeys, sizes_.keys);
      const int64_t rows = rounded_up(keys.count, kLowTileRows);
      std::fill_n(d_keys, rows * step_, T(0));
      std::fill_n(d_values, rows * step_v_, T(0));
      std::fill_n(state.attention, kBackwardKeys, T(0));
      for (int64_t query_block = 0; query_block < sizes_.query_blocks(); ++query_block) {
        const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
        score(queries, keys, weights, d_scores);
        differentiate(queries, keys, weights, d_scores);
        add_column_sums(weights, queries.count, keys.count, state.attention);
        accumulate(queries, keys, weights, d_scores, d_keys, d_values, d_queries);
      }
      common_key.add(key_rows_.get() + keys.first * tile_width<T>, sizes_.keys * tile_width<T>, keys.count,
                     state.attention);
      write(gradients_.k, keys, d_keys, step_, sizes_.head_dim, static_cast<T>(in_.scale));
      write(gradients_.v, keys, d_values, step_v_, sizes_.head_dim_v, T(1));
    }
  }

  // First partial sum += the given one.
  void add_partial(int64_t query_block, int64_t partial_sum) {
    const int64_t first = query_block * kQueryBlock * query_step_;
    T* sum = partial(0) + first;
    const T* addend = partial(partial_sum) + first;
    const int64_t rows = Range::block(query_block, kQueryBlock, sizes_.queries).count;
    for (int64_t i = 0; i < rows * query_step_; ++i) sum[i] += addend[i];
  }

  void write_queries(int64_t query_block) const {
    const Range queries = Range::block(query_block, kQueryBlock, sizes_.queries);
    T* rows = partial(0) + queries.first * query_step_;
    CommonKey<T> common_key(sizes_.head_dim);
    for (const auto& part : common_keys_) common_key.add(*part);
    common_key.finish();
    for (int64_t i = 0; i < queries.count; ++i) {
      T* row = rows + i * query_step_;
      common_key.take(row[sizes_.head_dim], row);
    }
    write(gradients_.q, queries, rows, query_step_, sizes_.head_dim, static_cast<T>(in_.scale));
  }

 private:
  // Gradients of the queries, and behind each the sum of its d_s.
  T* partial(int64_t index) const { return d_queries_.get() + index * padded_queries_ * query_step_; }

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

  // scores = scale log2(e) q k^T, d_weights = d_out v^T
  void score(const Range& queries, const Range& keys, T* scores, T* d_weights) const {
    const auto store_to = [](T* target) {
      return [target](bool adds, bool) { return StoreTile<T, score_step<T, kBackwardKeys>>{target, adds}; };
    };
    multiply_channels<T>(queries_.get() + queries.first * sizes_.head_dim, queries.count,
                         key_columns_.get() + keys.first * sizes_.head_dim, sizes_.head_dim, keys.count,
                         store_to(scores));
    multiply_channels<T>(d_outs_.get() + queries.first * sizes_.head_dim_v, queries.count,
                         value_columns_.get() + keys.first * sizes_.head_dim_v, sizes_.head_dim_v, keys.count,
                         store_to(d_weights));
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
                                                       AddTo<T>{d_queries + queries.first * query_step_, query_step_});
    add_row_sums<T>(d_scores, queries.count, keys.count, d_queries + queries.first * query_step_ + sizes_.head_dim,
                    query_step_);
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
  const int64_t query_step_, step_, step_v_, padded_queries_;
  // The operands with channels as depth (k, v, q, d_out), and those with channels as columns (k, q, d_out).
  AlignedBuffer<T> key_columns_, value_columns_, key_rows_, queries_, d_outs_, query_rows_, d_out_rows_;
  AlignedBuffer<T> reference_, delta_;
  std::vector<std::unique_ptr<CommonKey<T>>> common_keys_;  // of each part of the keys
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
