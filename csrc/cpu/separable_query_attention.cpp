// Attention from queries on a grid on the CPU, forward (queries_on_grid.h). Compiled once per instruction set.
#include "queries_on_grid.h"

namespace pk {
namespace {

// The values of one head as the right operand of products that sum over keys.
template <class T, class X>
class ValueRows {
 public:
  ValueRows(const TensorView& v, const QuerySizes& sizes)
      : v_(v), sizes_(sizes), panels_(sizes.keys * rounded_up(sizes.head_dim_v, tile_width<T>)) {}

  void pack(int64_t batch, int64_t head) {
    constexpr int width = tile_width<T>;
    pack_panels<T>(matrix_of<const X>(v_, batch, head), sizes_.keys, sizes_.head_dim_v, width, sizes_.keys * width,
                   panels_.get());
  }

  const T* from(int64_t key) const { return panels_.get() + key * tile_width<T>; }

 private:
  const TensorView& v_;
  const QuerySizes& sizes_;
  AlignedBuffer<T> panels_;
};

template <class T, class X>
class Forward {
 public:
  // Of one query block, out not yet divided by the sums.
  struct State {
    const int64_t out_step;
    PackedQueries<T> queries;
    OuterSums<T, kForwardKeys> outer;
    ScoreBlock<T> scores;
    SoftmaxState<T> softmax;
    AlignedBuffer<T> out;

    explicit State(const QuerySizes& sizes)
        : out_step(rounded_up(sizes.head_dim_v, tile_width<T>)), queries(sizes), out(kQueryBlock * out_step) {}
  };

  Forward(const SeparableQueryInputs& in, const LatentOutputs& out, const QuerySizes& sizes)
      : in_(in),
        out_(out),
        sizes_(sizes),
        keys_(in, sizes, false),
        values_(packed_heads<ValueRows<T, X>>(sizes.batch, sizes.heads,
                                              [&] { return std::make_unique<ValueRows<T, X>>(in.v, sizes); })) {}

  void attend(int64_t batch, int64_t head, int64_t index, State& state) const {
    const QueryBlock block(sizes_, index);
    const ValueRows<T, X>& values = *values_[static_cast<size_t>(batch * sizes_.heads + head)];
    state.queries.pack(in_, batch, block);
    state.softmax.clear();
    std::fill_n(state.out.get(), rounded_up(block.count(), kLowTileRows) * state.out_step, T(0));
    for (int64_t key_block = 0; key_block < blocks(sizes_.keys, kForwardKeys); ++key_block) {
      const Range keys = Range::block(key_block, kForwardKeys, sizes_.keys);
      score(block, keys_.of(batch, head), keys, state);
      state.scores.softmax_step(state.softmax, block.count(), keys.count,
                                {in_.dropout, batch, head * sizes_.queries() + block.queries.first, keys.first});
      state.scores.accumulate(state.out.get(), state.out_step, block.count(), values.from(keys.first),
                              sizes_.keys * tile_width<T>, keys.count, sizes_.head_dim_v);
    }
    finish(batch, head, block.queries, state);
  }

 private:
  void score(const QueryBlock& block, const PackedKeys<T>& packed, const Range& keys, State& state) const {
    const int64_t count = block.count();
    state.outer.add_up(sizes_, block, packed, keys);
    if (sizes_.channels > 0)
      state.scores.multiply(state.queries.channels(), count, packed.columns(keys.first), sizes_.channels, keys.count);
    state.scores.forget_largest(count);
    for (int64_t i = 0; i < count; ++i) {
      const T* column = packed.table(block.column_row(i), keys.first);
      const Row row{column, state.outer.row(block.outer(i)), packed.bias(keys.first), log2_factor(state.queries.r(i))};
      if (sizes_.channels > 0) {
        state.scores.set_largest(i, add_tables<true>(row, rounded_up(keys.count, tile_width<T>), state.scores.row(i)));
      } else {
        state.scores.set_largest(i, add_tables<false>(row, rounded_up(keys.count, tile_width<T>), state.scores.row(i)));
      }
    }
  }

  static Vec<T> log2_factor(T r) { return broadcast(static_cast<T>(kLog2E * r)); }

  struct Row {
    const T *column, *outer, *bias;
    Vec<T> factor;
  };

  // scores = factor * (data's part, if it is there + tables) + bias; returns the largest, lane by lane.
  template <bool Data>
  static Vec<T> add_tables(const Row& row, int64_t count, T* scores) {
    constexpr int lanes = Simd<T>::lanes;
    Vec<T> largest[kTileVectors];
    for (Vec<T>& lane : largest) lane = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < count; j += tile_width<T>) {
      PK_UNROLL
      for (int q = 0; q < kTileVectors; ++q) {
        const int64_t at = j + q * lanes;
        Vec<T> sum = load(row.column + at) + load(row.outer + at);
        if constexpr (Data) sum += load(scores + at);
        sum = sum * row.factor + load(row.bias + at);
        store<T>(scores + at, sum);
        largest[q] = larger<T>(largest[q], sum);
      }
    }
    return larger<T>(largest[0], largest[1]);
  }

  void finish(int64_t batch, int64_t head, const Range& queries, const State& state) const {
    const Matrix<X> out = matrix_of<X>(out_.out, batch, head);
    T* lse = out_.lse.template as<T>() + (batch * sizes_.heads + head) * sizes_.queries() + queries.first;
    for (int64_t i = 0; i < queries.count; ++i) {
      const T sum = lane_sum<T>(state.softmax.sum[i]);  // zero where all scores are -inf: such a query gets zeros
      write_row(state.out.get() + i * state.out_step, sum == 0 ? T(0) : 1 / sum, sizes_.head_dim_v,
                out.row(queries.first + i));
      lse[i] =
          static_cast<T>(kLn2 * (static_cast<double>(state.softmax.maximum[i]) + std::log2(static_cast<double>(sum))));
    }
  }

  const SeparableQueryInputs& in_;
  const LatentOutputs& out_;
  const QuerySizes& sizes_;
  const AllKeys<T> keys_;
  const std::vector<std::unique_ptr<ValueRows<T, X>>> values_;
};

template <class T, class X>
void forward(const SeparableQueryInputs& in, const LatentOutputs& out) {
  const QuerySizes sizes(in);
  const Forward<T, X> call(in, out, sizes);
  using State = typename Forward<T, X>::State;
  ScratchPool<State> states;
  const int64_t per_head = sizes.query_blocks();
  parallel_for(sizes.all_heads() * per_head, [&](int64_t task) {
    states.with([&] { return std::make_unique<State>(sizes); },
                [&](State& state) {
                  const int64_t index = task / per_head;
                  call.attend(index / sizes.heads, index % sizes.heads, task % per_head, state);
                });
  });
}

}  // namespace

namespace PK_LEVEL {

void separable_query_attention_fwd(const SeparableQueryInputs& in, const LatentOutputs& out) {
  with_types(in.v.dtype, [&](auto compute, auto data) { forward<decltype(compute), decltype(data)>(in, out); });
}

}  // namespace PK_LEVEL
}  // namespace pk
