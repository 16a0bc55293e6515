// Attention from queries on a grid on the CPU, forward and backward, block by block of queries and keys: no query and
// no score matrix is stored. Compiled once per instruction set.
//
// A row of scores is a sum of rows of the tables, which lie key after key, and of a product with the data's channels;
// what is left of the time goes into products with the values. Everything is computed in float (double for double):
// 16-bit values are widened when they are packed (panels.h).
#include "../ops.h"
#include "attention_blocks.h"

namespace pk {
namespace {

// Backward's queries are split into parts, by shape alone, so that few inputs keep many threads busy. Each part has its
// own gradients of keys and values; they are added in order, whatever the number of threads.
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kMostParts = 16;

struct QuerySizes {
  int64_t batch, heads, keys, channels, head_dim_v, columns, outer, positions;
  std::vector<int64_t> outer_grid;

  explicit QuerySizes(const SeparableQueryInputs& in)
      : batch(in.v.size(0)),
        heads(in.v.size(1)),
        keys(in.v.size(2)),
        channels(in.x.defined() ? in.x.size(2) : 0),
        head_dim_v(in.v.size(3)),
        columns(in.grid.back()),
        outer(1),
        positions(in.form.size(2) - channels),
        outer_grid(in.grid.begin(), in.grid.end() - 1) {
    for (int64_t size : outer_grid) outer *= size;
  }

  int64_t all_heads() const { return batch * heads; }
  int64_t queries() const { return outer * columns; }
  int64_t query_blocks() const { return blocks(queries(), kQueryBlock); }
  int64_t parts() const {
    const int64_t wanted = blocks(kWantedTasks, std::max<int64_t>(batch, 1));
    return std::max<int64_t>(1, std::min({wanted, kMostParts, query_blocks()}));
  }

  // The tables' rows of an outer position: one for each axis but the last.
  template <class Visit>
  void each_outer_row(int64_t position, const Visit& visit) const {
    int64_t first = positions - columns;
    for (size_t axis = outer_grid.size(); axis-- > 0; position /= outer_grid[axis]) {
      first -= outer_grid[axis];
      visit(first + position % outer_grid[axis]);
    }
  }
};

// A block of queries: where each stands on the grid.
struct QueryBlock {
  Range queries;
  int64_t first_outer, outers, first_column, columns, last_axis;

  QueryBlock(const QuerySizes& sizes, int64_t index)
      : queries(Range::block(index, kQueryBlock, sizes.queries())),
        first_outer(queries.first / sizes.columns),
        outers((queries.first + queries.count - 1) / sizes.columns - first_outer + 1),
        first_column(queries.first % sizes.columns),
        columns(sizes.columns),
        last_axis(sizes.positions - sizes.columns) {}

  int64_t count() const { return queries.count; }
  int64_t outer(int64_t query) const { return (first_column + query) / columns; }  // counted from first_outer
  int64_t column_row(int64_t query) const { return last_axis + (first_column + query) % columns; }
};

// The form of one head, as products and rows of scores read it. Keys are rounded up to whole tiles: those that are none
// have a bias of -inf.
template <class T>
class PackedKeys {
 public:
  // by_rows: also the operand of products that sum over keys.
  PackedKeys(const SeparableQueryInputs& in, const QuerySizes& sizes, bool by_rows)
      : in_(in),
        sizes_(sizes),
        by_rows_(by_rows),
        step_(rounded_up(sizes.keys, tile_width<T>)),
        columns_(sizes.channels * step_),
        rows_(by_rows ? sizes.keys * rounded_up(sizes.channels, tile_width<T>) : 0),
        tables_(sizes.positions * step_),
        bias_(step_),
        row_sums_(rounded_up(sizes.channels, tile_width<T>)) {}

  void pack(int64_t batch, int64_t head) {
    constexpr int width = tile_width<T>;
    const int64_t keys = sizes_.keys, channels = sizes_.channels;
    const T* form = of_head(in_.form, batch, head);
    pack_panels<T>(Matrix<const T>{form, keys, 1}, channels, keys, width, channels * width, columns_.get());
    if (by_rows_) pack_panels<T>(Matrix<const T>{form, 1, keys}, keys, channels, width, keys * width, rows_.get());
    for (int64_t row = 0; row < sizes_.positions; ++row) {
      T* table = tables_.get() + row * step_;
      std::copy_n(form + (channels + row) * keys, keys, table);
      std::fill_n(table + keys, step_ - keys, T(0));
    }
    if (in_.bias.defined()) {
      std::copy_n(of_head(in_.bias, batch, head), keys, bias_.get());
    } else {
      std::fill_n(bias_.get(), keys, T(0));
    }
    std::fill_n(bias_.get() + keys, step_ - keys, -std::numeric_limits<T>::infinity());
    attended_ = keys - std::count(bias_.get(), bias_.get() + keys, -std::numeric_limits<T>::infinity());
    sum_rows(Matrix<const T>{form, 1, keys}, keys, channels, row_sums_.get());
  }

  // Of the keys' data channels, over those that are attended to: the others have zeros.
  MeanRow<T> mean_row() const { return {row_sums_.get(), 1, 0, attended_, sizes_.channels}; }

  const T* columns(int64_t key) const { return columns_.get() + key * sizes_.channels; }
  const T* rows(int64_t key) const { return rows_.get() + key * tile_width<T>; }
  const T* table(int64_t row, int64_t key) const { return tables_.get() + row * step_ + key; }
  const T* bias(int64_t key) const { return bias_.get() + key; }

 private:
  static const T* of_head(const TensorView& view, int64_t batch, int64_t head) {
    return view.as<const T>() + (view.size(0) > 1 ? batch * view.stride(0) : 0) + head * view.stride(1);
  }

  const SeparableQueryInputs& in_;
  const QuerySizes& sizes_;
  const bool by_rows_;
  const int64_t step_;
  int64_t attended_ = 0;
  AlignedBuffer<T> columns_, rows_, tables_, bias_, row_sums_;
};

// The sums of the outer axes' tables for each outer position of a block of queries, of a block of up to Keys keys.
template <class T, int Keys>
class OuterSums {
 public:
  OuterSums() : sums_(kQueryBlock * Keys) {}

  void add_up(const QuerySizes& sizes, const QueryBlock& block, const PackedKeys<T>& packed, const Range& keys) {
    const int64_t count = rounded_up(keys.count, tile_width<T>);
    for (int64_t outer = 0; outer < block.outers; ++outer) {
      T* sum = sums_.get() + outer * Keys;
      std::fill_n(sum, count, T(0));
      sizes.each_outer_row(block.first_outer + outer, [&](int64_t row) {
        const T* table = packed.table(row, keys.first);
        for (int64_t j = 0; j < count; j += Simd<T>::lanes) store<T>(sum + j, load(sum + j) + load(table + j));
      });
    }
  }

  const T* row(int64_t outer) const { return sums_.get() + outer * Keys; }

 private:
  AlignedBuffer<T> sums_;
};

// The data and the factors of a block of queries, which all heads share.
template <class T>
class PackedQueries {
 public:
  explicit PackedQueries(const QuerySizes& sizes) : sizes_(sizes), data_(sizes.channels * kQueryBlock) {}

  void pack(const SeparableQueryInputs& in, int64_t batch, const QueryBlock& block) {
    if (sizes_.channels > 0) pack_queries<T>(data(in, batch, block), block.count(), sizes_.channels, T(1), data_.get());
    for (int64_t i = 0; i < block.count(); ++i) factors_[i] = T(1);
    if (!in.r.defined()) return;
    const T* r = in.r.as<const T>() + (in.r.size(0) > 1 ? batch * in.r.stride(0) : 0);
    for (int64_t i = 0; i < block.count(); ++i) factors_[i] = r[(block.queries.first + i) * in.r.stride(1)];
  }

  static Matrix<const T> data(const SeparableQueryInputs& in, int64_t batch, const QueryBlock& block) {
    const T* first = in.x.as<const T>() + (in.x.size(0) > 1 ? batch * in.x.stride(0) : 0);
    return {first + block.queries.first * in.x.stride(1), in.x.stride(1), in.x.stride(2)};
  }

  const T* channels() const { return data_.get(); }
  T r(int64_t query) const { return factors_[query]; }

 private:
  const QuerySizes& sizes_;
  AlignedBuffer<T> data_;
  T factors_[kQueryBlock];
};

// A new Item for each head, packed on all threads.
template <class Item, class New>
std::vector<std::unique_ptr<Item>> packed_heads(int64_t batch, int64_t heads, const New& make) {
  std::vector<std::unique_ptr<Item>> all(static_cast<size_t>(batch * heads));
  parallel_for(batch * heads, [&](int64_t index) {
    auto item = make();
    item->pack(index / heads, index % heads);
    all[static_cast<size_t>(index)] = std::move(item);
  });
  return all;
}

// The keys of all heads; inputs that share them have one set.
template <class T>
class AllKeys {
 public:
  AllKeys(const SeparableQueryInputs& in, const QuerySizes& sizes, bool by_rows)
      : heads_(sizes.heads),
        batch_(std::max(in.form.size(0), in.bias.defined() ? in.bias.size(0) : 1)),
        packed_(packed_heads<PackedKeys<T>>(std::min(batch_, sizes.batch), sizes.heads,
                                            [&] { return std::make_unique<PackedKeys<T>>(in, sizes, by_rows); })) {}

  const PackedKeys<T>& of(int64_t batch, int64_t head) const {
    return *packed_[static_cast<size_t>((batch_ > 1 ? batch * heads_ : 0) + head)];
  }

 private:
  const int64_t heads_, batch_;
  std::vector<std::unique_ptr<PackedKeys<T>>> packed_;
};

// ---- Forward

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

// ---- Backward

// With p recomputed, u = d_out . v and delta = d_out . out: dS = p (keep u - delta), d_v = sum of p keep d_out, and the
// gradients of h, the tables, k, x and r are sums of dS as docs/separable_attention.md has them.

// A part of the queries of one input: what it adds to the gradients of one head's keys and values.
template <class T>
struct KeyGradients {
  const int64_t step, data_step, values_step;
  const int64_t first_axis;  // its size
  const Range reached;       // positions of the first axis that the part reaches: rows of others are not kept
  AlignedBuffer<T> tables, bias, data, values;

  KeyGradients(const QuerySizes& sizes, int64_t first_axis, const Range& reached, bool keys, bool values)
      : step(rounded_up(sizes.keys, tile_width<T>)),
        data_step(rounded_up(sizes.channels, tile_width<T>)),
        values_step(rounded_up(sizes.head_dim_v, tile_width<T>)),
        first_axis(first_axis),
        reached(reached),
        tables(keys ? (sizes.positions - first_axis + reached.count) * step : 0),
        bias(keys ? step : 0),
        data(keys ? step * data_step : 0),
        values(values ? step * values_step : 0) {
    if (keys) {
      std::fill_n(tables.get(), (sizes.positions - first_axis + reached.count) * step, T(0));
      std::fill_n(bias.get(), step, T(0));
      std::fill_n(data.get(), step * data_step, T(0));
    }
    if (values) std::fill_n(this->values.get(), step * values_step, T(0));
  }

  bool reaches(int64_t row) const {
    return row >= first_axis || (row >= reached.first && row < reached.first + reached.count);
  }
  T* table(int64_t row) const {
    return tables.get() + (row < first_axis ? row - reached.first : row - first_axis + reached.count) * step;
  }
};

// The values of one head as the right operand of products that sum over channels.
template <class T, class X>
class ValueColumns {
 public:
  ValueColumns(const TensorView& v, const QuerySizes& sizes)
      : v_(v), sizes_(sizes), panels_(rounded_up(sizes.keys, tile_width<T>) * sizes.head_dim_v) {}

  void pack(int64_t batch, int64_t head) {
    pack_columns<T>(matrix_of<const X>(v_, batch, head), sizes_.keys, sizes_.head_dim_v, panels_.get());
  }

  const T* from(int64_t key) const { return panels_.get() + key * sizes_.head_dim_v; }

 private:
  const TensorView& v_;
  const QuerySizes& sizes_;
  AlignedBuffer<T> panels_;
};

template <class T, class X>
class Backward {
 public:
  // Of one query block.
  struct State {
    const int64_t data_step;
    PackedQueries<T> queries;
    OuterSums<T, kBackwardKeys> outer;
    // The block's keys against its queries: p keep, and dS.
    AlignedBuffer<T> weights, d_scores;
    // d_out with channels as depth and as columns, r x with channels as columns.
    AlignedBuffer<T> d_out_columns, d_out_rows, data_rows;
    AlignedBuffer<T> d_data, d_outer;
    alignas(64) T reference[kQueryBlock], delta[kQueryBlock], d_factors[kQueryBlock];
    // Of one head: the sums of d_s, and the means of what the factors multiply.
    T rests[kQueryBlock], mean_sums[kQueryBlock];

    explicit State(const QuerySizes& sizes)
        : data_step(rounded_up(sizes.channels, tile_width<T>)),
          queries(sizes),
          weights(kQueryBlock * kStep),
          d_scores(kQueryBlock * kStep),
          d_out_columns(sizes.head_dim_v * kQueryBlock),
          d_out_rows(kQueryBlock * rounded_up(sizes.head_dim_v, tile_width<T>)),
          data_rows(kQueryBlock * data_step),
          d_data(kQueryBlock * data_step),
          d_outer(kQueryBlock * kBackwardKeys) {}
  };

  Backward(const SeparableQueryInputs& in, const LatentOutputs& saved, const TensorView& d_out,
           const SeparableQueryGradients& gradients, const QuerySizes& sizes)
      : in_(in),
        saved_(saved),
        d_out_(d_out),
        gradients_(gradients),
        sizes_(sizes),
        keys_(in, sizes, gradients.x.defined()),
        values_(packed_heads<ValueColumns<T, X>>(sizes.batch, sizes.heads,
                                                 [&] { return std::make_unique<ValueColumns<T, X>>(in.v, sizes); })),
        sums_(static_cast<size_t>(sizes.batch * sizes.parts() * sizes.heads)) {}

  // One part of the queries of one input.
  void part(int64_t batch, int64_t index, State& state) {
    const int64_t all = sizes_.query_blocks(), parts = sizes_.parts();
    const Range range{index * all / parts, (index + 1) * all / parts - index * all / parts};
    for (int64_t head = 0; head < sizes_.heads; ++head) sums_[place(batch, index, head)] = new_sums(range);
    for (int64_t block = range.first; block < range.first + range.count; ++block) {
      attend(batch, QueryBlock(sizes_, block), index, state);
    }
  }

  // One row of the gradient of one head's form, or after them that of h; or some rows of that of the values.
  int64_t results() const { return sizes_.channels + sizes_.positions + 1 + blocks(sizes_.keys, kBackwardKeys); }
  void write(int64_t batch, int64_t head, int64_t result) const {
    const int64_t rows = sizes_.channels + sizes_.positions;
    if (result > rows) return write_values(batch, head, Range::block(result - rows - 1, kBackwardKeys, sizes_.keys));
    if (result == rows)
      return write_row_of(gradients_.h, batch, head, 0, [](const Sums& part) { return Strided{part.bias.get(), 1}; });
    if (result < sizes_.channels)
      return write_row_of(gradients_.form, batch, head, result,
                          [&](const Sums& part) { return Strided{part.data.get() + result, part.data_step}; });
    const int64_t row = result - sizes_.channels;
    write_row_of(gradients_.form, batch, head, result,
                 [&](const Sums& part) { return Strided{part.reaches(row) ? part.table(row) : nullptr, 1}; });
  }

 private:
  using Sums = KeyGradients<T>;
  static constexpr int kStep = score_step<T, kBackwardKeys>;

  struct Strided {
    const T* first;
    int64_t step;
  };

  bool needs_keys() const { return gradients_.form.defined() || gradients_.h.defined(); }
  bool needs_queries() const { return gradients_.x.defined() || gradients_.r.defined(); }

  size_t place(int64_t batch, int64_t part, int64_t head) const {
    return static_cast<size_t>((batch * sizes_.parts() + part) * sizes_.heads + head);
  }
  const Sums& sums(int64_t batch, int64_t part, int64_t head) const { return *sums_[place(batch, part, head)]; }

  std::unique_ptr<Sums> new_sums(const Range& query_blocks) const {
    Range reached{0, 0};
    if (query_blocks.count > 0) {
      const int64_t of_position = sizes_.queries() / in_.grid.front(), first = query_blocks.first * kQueryBlock;
      const int64_t end = std::min(first + query_blocks.count * kQueryBlock, sizes_.queries());
      reached.first = first / of_position;
      reached.count = (end - 1) / of_position + 1 - reached.first;
    }
    return std::make_unique<Sums>(sizes_, in_.grid.front(), reached, needs_keys(), gradients_.v.defined());
  }

  void attend(int64_t batch, const QueryBlock& block, int64_t part, State& state) {
    begin(batch, block, state);
    for (int64_t head = 0; head < sizes_.heads; ++head) {
      load_rows(batch, head, block.queries, state);
      const PackedKeys<T>& packed = keys_.of(batch, head);
      const Sums& gradients = sums(batch, part, head);
      const int64_t first_row = head * sizes_.queries() + block.queries.first;
      for (int64_t key_block = 0; key_block < blocks(sizes_.keys, kBackwardKeys); ++key_block) {
        const Range keys = Range::block(key_block, kBackwardKeys, sizes_.keys);
        multiply(batch, head, block, keys, state);
        differentiate(block, packed, keys, {in_.dropout, batch, first_row, keys.first}, state);
        if (gradients_.v.defined()) add_values(block, keys, gradients, state);
        if (needs_keys()) add_keys(block, keys, gradients, state);
        if (gradients_.x.defined()) {
          multiply_block<T, kStep, 1>(state.d_scores.get(), block.count(), packed.rows(keys.first),
                                      sizes_.keys * tile_width<T>, keys.count, sizes_.channels,
                                      AddTo<T>{state.d_data.get(), state.data_step});
        }
      }
      if (needs_queries()) take_rests(block, packed.mean_row(), state);
    }
    if (needs_queries()) write_queries(batch, block, state);
  }

  void begin(int64_t batch, const QueryBlock& block, State& state) const {
    constexpr int width = tile_width<T>;
    state.queries.pack(in_, batch, block);
    std::fill_n(state.d_data.get(), kQueryBlock * state.data_step, T(0));
    std::fill_n(state.d_factors, kQueryBlock, T(0));
    if (sizes_.channels == 0) return;
    pack_panels<T>(PackedQueries<T>::data(in_, batch, block), block.count(), sizes_.channels, width,
                   kQueryBlock * width, state.data_rows.get());
    for (int64_t c = 0; c < sizes_.channels; c += width) {
      for (int64_t i = 0; i < block.count(); ++i) {
        T* row = state.data_rows.get() + (c / width * kQueryBlock + i) * width;
        for (int k = 0; k < width; ++k) row[k] *= state.queries.r(i);
      }
    }
  }

  void load_rows(int64_t batch, int64_t head, const Range& queries, State& state) const {
    constexpr int width = tile_width<T>;
    const auto all = matrix_of<const X>(d_out_, batch, head), out = matrix_of<const X>(saved_.out, batch, head);
    const Matrix<const X> d_out{all.row(queries.first), all.row_step, all.channel_step};
    pack_queries<T>(d_out, queries.count, sizes_.head_dim_v, T(1), state.d_out_columns.get());
    pack_panels<T>(d_out, queries.count, sizes_.head_dim_v, width, kQueryBlock * width, state.d_out_rows.get());
    const T* lse = saved_.lse.template as<const T>() + (batch * sizes_.heads + head) * sizes_.queries() + queries.first;
    std::fill_n(state.rests, kQueryBlock, T(0));
    std::fill_n(state.mean_sums, kQueryBlock, T(0));
    for (int64_t i = 0; i < queries.count; ++i) {
      Vec<T> sum = {};
      for (int64_t c = 0; c < sizes_.head_dim_v; c += Simd<T>::lanes) {
        const int64_t count = sizes_.head_dim_v - c;
        sum += load_channels<T>(d_out.row(i) + c * d_out.channel_step, d_out.channel_step, count) *
               load_channels<T>(out.row(queries.first + i) + c * out.channel_step, out.channel_step, count);
      }
      state.delta[i] = lane_sum<T>(sum);
      // Nothing weighs anything where all scores are -inf.
      const bool empty = lse[i] == -std::numeric_limits<T>::infinity();
      state.reference[i] =
          empty ? std::numeric_limits<T>::infinity() : static_cast<T>(kLog2E * static_cast<double>(lse[i]));
    }
  }

  // The products that scores and their gradients begin with: x k^T where there are data, d_out v^T.
  void multiply(int64_t batch, int64_t head, const QueryBlock& block, const Range& keys, State& state) const {
    const ValueColumns<T, X>& values = *values_[static_cast<size_t>(batch * sizes_.heads + head)];
    if (sizes_.channels > 0) {
      multiply_channels<T>(state.queries.channels(), block.count(), keys_.of(batch, head).columns(keys.first),
                           sizes_.channels, keys.count,
                           [&](bool adds, bool) { return StoreTile<T, kStep>{state.weights.get(), adds}; });
    }
    multiply_channels<T>(state.d_out_columns.get(), block.count(), values.from(keys.first), sizes_.head_dim_v,
                         keys.count, [&](bool adds, bool) { return StoreTile<T, kStep>{state.d_scores.get(), adds}; });
  }

  void differentiate(const QueryBlock& block, const PackedKeys<T>& packed, const Range& keys, const KeptWeights& kept,
                     State& state) const {
    alignas(64) T keep[kBackwardKeys + tile_width<T>];
    const int64_t count = rounded_up(keys.count, tile_width<T>);
    std::fill_n(keep, count, T(1));
    state.outer.add_up(sizes_, block, packed, keys);
    for (int64_t i = 0; i < block.count(); ++i) {
      if (kept.drops()) kept.row(i, keys.count, keep);
      const T *column = packed.table(block.column_row(i), keys.first), *outer = state.outer.row(block.outer(i));
      const T* bias = packed.bias(keys.first);
      T *weights = state.weights.get() + i * kStep, *d_scores = state.d_scores.get() + i * kStep;
      const Vec<T> factor = broadcast(static_cast<T>(kLog2E * state.queries.r(i)));
      const Vec<T> reference = broadcast(state.reference[i]), delta = broadcast(state.delta[i]);
      Vec<T> d_factor = {}, rest = {}, mean_sum = {};
      PK_UNROLL
      for (int64_t j = 0; j < count; j += Simd<T>::lanes) {
        Vec<T> sum = load(column + j) + load(outer + j);
        if (sizes_.channels > 0) sum += load(weights + j);
        const Vec<T> p = exp2_flushed<T>(sum * factor + load(bias + j) - reference), keeps = load(keep + j);
        const Vec<T> d_score = p * (keeps * load(d_scores + j) - delta);
        store<T>(weights + j, p * keeps);
        store<T>(d_scores + j, d_score);
        // A score of -inf weighs nothing, whatever it is multiplied with.
        sum = p == Vec<T>{} ? Vec<T>{} : sum;
        d_factor += d_score * sum;
        rest += d_score;
        mean_sum += p * sum;
      }
      state.d_factors[i] += lane_sum<T>(d_factor);
      state.rests[i] += lane_sum<T>(rest);
      state.mean_sums[i] += lane_sum<T>(mean_sum);
    }
  }

  // Takes off what rounding left of the sums of a head's d_s (attention_blocks.h), times what its keys have in common.
  static void take_rests(const QueryBlock& block, const MeanRow<T>& mean_key, State& state) {
    for (int64_t i = 0; i < block.count(); ++i) {
      state.d_factors[i] -= state.rests[i] * state.mean_sums[i];
      mean_key.take(state.rests[i], state.d_data.get() + i * state.data_step);
    }
  }

  void add_values(const QueryBlock& block, const Range& keys, const Sums& gradients, const State& state) const {
    multiply_block<T, 1, kStep>(
        state.weights.get(), keys.count, state.d_out_rows.get(), kQueryBlock * tile_width<T>, block.count(),
        sizes_.head_dim_v,
        AddTo<T>{gradients.values.get() + keys.first * gradients.values_step, gradients.values_step});
  }

  void add_keys(const QueryBlock& block, const Range& keys, const Sums& gradients, State& state) const {
    alignas(64) T d_bias[kBackwardKeys + tile_width<T>] = {};
    const int64_t count = rounded_up(keys.count, tile_width<T>);
    std::fill_n(state.d_outer.get(), block.outers * kBackwardKeys, T(0));
    for (int64_t i = 0; i < block.count(); ++i) {
      const T* d_scores = state.d_scores.get() + i * kStep;
      T* column = gradients.table(block.column_row(i)) + keys.first;
      T* outer = state.d_outer.get() + block.outer(i) * kBackwardKeys;
      const Vec<T> r = broadcast(state.queries.r(i));
      for (int64_t j = 0; j < count; j += Simd<T>::lanes) {
        const Vec<T> d_score = load(d_scores + j), d_sum = d_score * r;
        store<T>(d_bias + j, load(d_bias + j) + d_score);
        store<T>(column + j, load(column + j) + d_sum);
        store<T>(outer + j, load(outer + j) + d_sum);
      }
    }
    add_to(gradients.bias.get() + keys.first, d_bias, count);
    for (int64_t outer = 0; outer < block.outers; ++outer) {
      sizes_.each_outer_row(block.first_outer + outer, [&](int64_t row) {
        add_to(gradients.table(row) + keys.first, state.d_outer.get() + outer * kBackwardKeys, count);
      });
    }
    multiply_block<T, 1, kStep>(state.d_scores.get(), keys.count, state.data_rows.get(), kQueryBlock * tile_width<T>,
                                block.count(), sizes_.channels,
                                AddTo<T>{gradients.data.get() + keys.first * gradients.data_step, gradients.data_step});
  }

  static void add_to(T* target, const T* addend, int64_t count) {
    for (int64_t j = 0; j < count; ++j) target[j] += addend[j];
  }

  void write_queries(int64_t batch, const QueryBlock& block, const State& state) const {
    const int64_t first = batch * sizes_.queries() + block.queries.first, channels = sizes_.channels;
    for (int64_t i = 0; i < block.count(); ++i) {
      if (gradients_.r.defined()) gradients_.r.template as<T>()[first + i] = state.d_factors[i];
      if (gradients_.x.defined())
        write_row(state.d_data.get() + i * state.data_step, state.queries.r(i), channels,
                  gradients_.x.template as<T>() + (first + i) * channels);
    }
  }

  // The sum over parts of one number per key.
  template <class Source>
  void write_row_of(const TensorView& gradient, int64_t batch, int64_t head, int64_t row, const Source& source) const {
    if (!gradient.defined()) return;
    const int64_t rows = gradient.dims == 4 ? gradient.size(2) : 1;
    T* target = gradient.template as<T>() + ((batch * sizes_.heads + head) * rows + row) * sizes_.keys;
    std::fill_n(target, sizes_.keys, T(0));
    for (int64_t part = 0; part < sizes_.parts(); ++part) {
      const Strided addend = source(sums(batch, part, head));
      if (!addend.first) continue;
      for (int64_t n = 0; n < sizes_.keys; ++n) target[n] += addend.first[n * addend.step];
    }
  }

  void write_values(int64_t batch, int64_t head, const Range& keys) const {
    if (!gradients_.v.defined()) return;
    const Sums& total = sums(batch, 0, head);
    const int64_t first = keys.first * total.values_step;
    for (int64_t part = 1; part < sizes_.parts(); ++part) {
      add_to(total.values.get() + first, sums(batch, part, head).values.get() + first, keys.count * total.values_step);
    }
    const Matrix<X> target = matrix_of<X>(gradients_.v, batch, head);
    for (int64_t n = 0; n < keys.count; ++n) {
      write_row(total.values.get() + first + n * total.values_step, T(1), sizes_.head_dim_v,
                target.row(keys.first + n));
    }
  }

  const SeparableQueryInputs& in_;
  const LatentOutputs& saved_;
  const TensorView& d_out_;
  const SeparableQueryGradients& gradients_;
  const QuerySizes& sizes_;
  const AllKeys<T> keys_;
  const std::vector<std::unique_ptr<ValueColumns<T, X>>> values_;
  std::vector<std::unique_ptr<Sums>> sums_;
};

template <class T, class X>
void backward(const SeparableQueryInputs& in, const LatentOutputs& saved, const TensorView& d_out,
              const SeparableQueryGradients& gradients) {
  const QuerySizes sizes(in);
  Backward<T, X> call(in, saved, d_out, gradients, sizes);
  using State = typename Backward<T, X>::State;
  ScratchPool<State> states;
  const int64_t parts = sizes.parts(), results = call.results();
  parallel_for(sizes.batch * parts, [&](int64_t task) {
    states.with([&] { return std::make_unique<State>(sizes); },
                [&](State& state) { call.part(task / parts, task % parts, state); });
  });
  parallel_for(sizes.all_heads() * results, [&](int64_t task) {
    const int64_t index = task / results;
    call.write(index / sizes.heads, index % sizes.heads, task % results);
  });
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

void separable_query_attention_fwd(const SeparableQueryInputs& in, const LatentOutputs& out) {
  with_types(in.v.dtype, [&](auto compute, auto data) { forward<decltype(compute), decltype(data)>(in, out); });
}

void separable_query_attention_bwd(const SeparableQueryInputs& in, const LatentOutputs& saved, const TensorView& d_out,
                                   const SeparableQueryGradients& gradients) {
  with_types(in.v.dtype, [&](auto compute, auto data) {
    backward<decltype(compute), decltype(data)>(in, saved, d_out, gradients);
  });
}

}  // namespace PK_LEVEL
}  // namespace pk
