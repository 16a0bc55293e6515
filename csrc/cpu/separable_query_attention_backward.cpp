// Attention from queries on a grid on the CPU, backward (queries_on_grid.h). Compiled once per instruction set.
//
// With p recomputed, u = d_out . v and delta = d_out . out: dS = p (keep u - delta), d_v = sum of p keep d_out, and the
// gradients of h, the tables, k, x and r are sums of dS as docs/separable_attention.md has them.
#include "queries_on_grid.h"

namespace pk {
namespace {

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
    alignas(64) T attention[kBackwardKeys];  // that each key of a block gets
    CommonKey<T> common_key;

    explicit State(const QuerySizes& sizes)
        : data_step(rounded_up(sizes.channels, tile_width<T>)),
          queries(sizes),
          weights(kQueryBlock * kStep),
          d_scores(kQueryBlock * kStep),
          d_out_columns(sizes.head_dim_v * kQueryBlock),
          d_out_rows(kQueryBlock * rounded_up(sizes.head_dim_v, tile_width<T>)),
          data_rows(kQueryBlock * data_step),
          d_data(kQueryBlock * data_step),
          d_outer(kQueryBlock * kBackwardKeys),
          common_key(sizes.channels) {}
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
          std::fill_n(state.attention, kBackwardKeys, T(0));
          add_column_sums<T>(state.weights.get(), block.count(), keys.count, state.attention);
          state.common_key.add(packed.rows(keys.first), sizes_.keys * tile_width<T>, keys.count, state.attention);
        }
      }
      if (needs_queries()) take_rests(block, state);
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
    state.common_key.clear();
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
  void take_rests(const QueryBlock& block, State& state) const {
    for (int64_t i = 0; i < block.count(); ++i) state.d_factors[i] -= state.rests[i] * state.mean_sums[i];
    if (!gradients_.x.defined()) return;
    state.common_key.finish();
    for (int64_t i = 0; i < block.count(); ++i) {
      state.common_key.take(state.rests[i], state.d_data.get() + i * state.data_step);
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

}  // namespace

namespace PK_LEVEL {

void separable_query_attention_bwd(const SeparableQueryInputs& in, const LatentOutputs& saved, const TensorView& d_out,
                                   const SeparableQueryGradients& gradients) {
  with_types(in.v.dtype, [&](auto compute, auto data) {
    backward<decltype(compute), decltype(data)>(in, saved, d_out, gradients);
  });
}

}  // namespace PK_LEVEL
}  // namespace pk
