// Separable cross-attention on the CPU: the core operator of docs/separable_attention.md, and the gradients of its
// rows. Compiled once per instruction set.
#include "philox.h"
#include "separable_groups.h"

namespace pk {
namespace {

// The reference point of a row's exponentials may lag behind its largest score by this much (in powers of two): sums of
// 2^32 times the data stay far from overflow, and nothing is lost at the lower end that plain softmax would keep.
constexpr double kLazyMargin = 32.0;

// State of the online softmax for one group of rows: sums of 2^(score - reference).
template <class T>
struct SoftmaxState {
  FormSums<T> weighted;  // acc and marginals
  T* sum;                // of 2^(score - reference)
  T* kept;               // the same after dropout
  T* reference;          // in powers of two

  static int64_t sums(const Geometry& g) { return FormSums<T>::entries(g) + 2; }
  static int64_t entries(const Geometry& g) { return sums(g) + 1; }
  static SoftmaxState at(T* memory, const Geometry& g) {
    T* tail = memory + FormSums<T>::entries(g) * group_rows<T>;
    return {FormSums<T>::at(memory, g), tail, tail + group_rows<T>, tail + 2 * group_rows<T>};
  }
  void clear(T* memory, const Geometry& g) {
    std::memset(memory, 0, sizeof(T) * static_cast<size_t>(entries(g) * group_rows<T>));
    for (int i = 0; i < group_rows<T>; ++i) reference[i] = -std::numeric_limits<T>::infinity();
  }
  void scale(const Geometry& g, const Vec<T>* factor) {
    T* memory = weighted.form.channels;
    for (int64_t e = 0; e < sums(g); ++e) {
      for (int v = 0; v < kRowVectors; ++v) {
        T* entry = memory + e * group_rows<T> + v * Simd<T>::lanes;
        store<T>(entry, load(entry) * factor[v]);
      }
    }
  }
};

template <class T>
inline void add_outer(const Form<T>& form, const Geometry& g, const int64_t* index, const Vec<T>* value) {
  for (int v = 0; v < kRowVectors; ++v) {
    for (int64_t k = 0; k + 1 < g.axes; ++k) {
      T* entry = form.outer + index[k] * group_rows<T> + v * Simd<T>::lanes;
      store<T>(entry, load(entry) + value[v]);
    }
  }
}

// Bounds of the score over one tile row, by interval arithmetic. NaN wherever anything is not finite.
template <class T>
inline void score_bounds(const ScoreForm<T>& score, const Tile<T>& tile, int64_t o, const Vec<T>* outer, Vec<T>* low,
                         Vec<T>* high) {
  const T* smallest = tile.row_extent(o);
  const T* largest = smallest + tile.channels + 1;
  for (int v = 0; v < kRowVectors; ++v) {
    const int64_t at = tile.strip * group_rows<T> + v * Simd<T>::lanes;
    const Vec<T> from = load(score.low + at) + outer[v], to = load(score.high + at) + outer[v];
    const T r_low = smallest[tile.channels], r_high = largest[tile.channels];
    const Vec<T> p = from * r_low, q = from * r_high, r = to * r_low, s = to * r_high;
    low[v] = smaller<T>(smaller<T>(p, q), smaller<T>(r, s));
    high[v] = larger<T>(larger<T>(p, q), larger<T>(r, s));
    Vec<T> not_finite = (p + q + r + s) * T(0);
    for (int64_t c = 0; c < tile.channels; ++c) {
      const Vec<T> a = load(score.form.channels + c * group_rows<T> + v * Simd<T>::lanes);
      const Vec<T> first = a * smallest[c], second = a * largest[c];
      low[v] += smaller<T>(first, second);
      high[v] += larger<T>(first, second);
      not_finite += (first + second) * T(0);
    }
    low[v] += not_finite;
    high[v] += not_finite;
  }
}

// Whether some lane fails value >= bound; NaN fails.
template <class T>
inline bool any_below(const Vec<T>* value, const Vec<T>* bound) {
  typename Simd<T>::Int below = {};
  for (int v = 0; v < kRowVectors; ++v) below |= ~(value[v] >= bound[v]);
  return any(below);
}
template <class T>
inline bool all_below(const Vec<T>* value, const Vec<T>* bound) {
  typename Simd<T>::Int not_below = {};
  for (int v = 0; v < kRowVectors; ++v) not_below |= ~(value[v] < bound[v]);
  return !any(not_below);
}

template <class T>
inline void exp2_block(Vec<T>* values, int count, bool in_range) {
  constexpr int step = 4;
  if (in_range) {
    for (int k = 0; k < count; k += step) exp2_in_range<T, step>(values + k);
  } else {
    for (int k = 0; k < count; ++k) values[k] = exp2_any<T>(values[k]);
  }
}

// What is done with one outer position of a tile for one group of rows; C is the channel count where it is small, else
// 0.
template <class T, int C, bool Indexed>
struct Rows {
  static constexpr int kChannels = C, lanes = Simd<T>::lanes, width = group_rows<T>;
  const SeparableInputs& in;
  const Geometry& g;
  int64_t batch_index, first_row;

  struct Block {  // up to kBlockTokens tokens of a tile row
    const T* tokens;
    const int32_t* index;
    int count;
    int64_t column_offset, strip_offset;  // of the first token's entry in a table and in a strip of it
  };

  template <class F>
  void for_each_block(const Tile<T>& tile, int64_t o, const F& f) const {
    const int count = tile.row_count(o);
    for (int k = 0; k < count; k += kBlockTokens) {
      const int64_t column = g.strip_begin(tile.strip) + (Indexed ? 0 : k);
      f(Block{tile.row_tokens(o) + k * (g.channels + 1), Indexed ? tile.row_index(o) + k : nullptr,
              std::min(kBlockTokens, count - k), column * width, (Indexed ? 0 : k) * width},
        o * g.columns + column);
    }
  }

  template <bool Multiply = false>
  void evaluate_block(const Block& b, const Form<T>& form, const Vec<T>* outer, const Vec<T>* constant,
                      Vec<T>* out) const {
    evaluate<T, C, Indexed, Multiply>(b.tokens, b.index, b.count, g.channels, form.channels,
                                      form.column + b.column_offset, outer, constant, out);
  }

  void dropout_block(const Block& b, int64_t first_token, T* keep) const {
    DropoutScales<T, width> scales(in.dropout, batch_index, first_row);
    for (int k = 0; k < b.count; ++k) scales.of_token(first_token + (Indexed ? b.index[k] : k), keep + k * width);
  }

  // Raises the reference to the exact maximum of this tile row where that is larger; everything summed so far follows.
  void raise_reference(const ScoreForm<T>& score, SoftmaxState<T>& state, const Tile<T>& tile, int64_t o,
                       const Vec<T>* outer) const {
    Vec<T> scores[kBlockTokens * kRowVectors + 8], factor[kRowVectors];
    const Vec<T> zero[kRowVectors] = {};
    Vec<T> reference[kRowVectors] = {load(state.reference), load(state.reference + lanes)};
    const Vec<T> before[kRowVectors] = {reference[0], reference[1]};
    for_each_block(tile, o, [&](const Block& b, int64_t) {
      evaluate_block(b, score.form, outer, zero, scores);
      for (int k = 0; k < b.count * kRowVectors; ++k)
        reference[k % kRowVectors] = larger<T>(scores[k], reference[k % kRowVectors]);
    });
    for (int v = 0; v < kRowVectors; ++v) {
      // A row that has seen nothing yet has sums of zero; -inf - -inf would make them NaN.
      const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
      factor[v] = before[v] > nothing ? exp2_any<T>(before[v] - reference[v]) : Vec<T>{};
      store<T>(state.reference + v * lanes, reference[v]);
    }
    state.scale(g, factor);
  }

  void forward(const ScoreForm<T>& score, SoftmaxState<T>& state, const Tile<T>& tile, int64_t o) const {
    if (tile.row_count(o) == 0) return;
    int64_t index[kMaxDims];
    g.outer_index(o, true, index);
    Vec<T> outer[kRowVectors], low[kRowVectors], high[kRowVectors], limit[kRowVectors], constant[kRowVectors];
    outer_sum(score.form, g, index, outer);
    score_bounds(score, tile, o, outer, low, high);

    for (int v = 0; v < kRowVectors; ++v) limit[v] = load(state.reference + v * lanes) + T(kLazyMargin);
    if (any_below<T>(limit, high)) raise_reference(score, state, tile, o, outer);
    for (int v = 0; v < kRowVectors; ++v) {
      // A row that has seen nothing but -inf has no reference yet: its weights are 2^-inf = 0, not 2^(-inf + inf).
      const Vec<T> reference = load(state.reference + v * lanes);
      constant[v] = reference == -std::numeric_limits<T>::infinity() ? Vec<T>{} : -reference;
      limit[v] = Simd<T>::min_exponent - constant[v];
    }
    if (all_below<T>(high, limit)) return;  // every weight would round to zero
    const bool in_range = !any_below<T>(low, limit);

    Vec<T> weights[kBlockTokens * kRowVectors + 8];
    Vec<T> outer_weight[kRowVectors] = {}, sum[kRowVectors] = {}, kept[kRowVectors] = {};
    AlignedChannels sums(g.channels);
    for_each_block(tile, o, [&](const Block& b, int64_t first_token) {
      evaluate_block(b, score.form, outer, constant, weights);
      exp2_block<T>(weights, b.count * kRowVectors, in_range);
      if (in.dropout.p > 0) {
        alignas(64) T keep[kBlockTokens * width];
        dropout_block(b, first_token, keep);
        for (int k = 0; k < b.count * kRowVectors; ++k) {
          sum[k % kRowVectors] += weights[k];
          weights[k] *= load(keep + k * lanes);
        }
      }
      Vec<T> block_outer[kRowVectors] = {}, block_kept[kRowVectors] = {};
      accumulate<T, C, Indexed, true>(b.tokens, b.index, b.count, g.channels, weights, sums.data,
                                      state.weighted.recent + b.strip_offset, block_outer, block_kept);
      for (int v = 0; v < kRowVectors; ++v) outer_weight[v] += block_outer[v], kept[v] += block_kept[v];
    });
    add_outer(state.weighted.form, g, index, outer_weight);
    sums.add_to(state.weighted.form.channels);
    for (int v = 0; v < kRowVectors; ++v) {
      store<T>(state.kept + v * lanes, load(state.kept + v * lanes) + kept[v]);
      store<T>(state.sum + v * lanes, load(state.sum + v * lanes) + (in.dropout.p > 0 ? sum[v] : kept[v]));
    }
  }

  void backward(const BackwardGroup<T>& row, const FormSums<T>& gradient, const Tile<T>& tile, int64_t o) const {
    if (tile.row_count(o) == 0) return;
    int64_t index[kMaxDims];
    g.outer_index(o, true, index);
    Vec<T> outer[kRowVectors], upstream_outer[kRowVectors], low[kRowVectors], high[kRowVectors], limit[kRowVectors];
    Vec<T> reference[kRowVectors], upstream_constant[kRowVectors], delta[kRowVectors];
    outer_sum(row.score.form, g, index, outer);
    outer_sum(row.upstream, g, index, upstream_outer);
    score_bounds(row.score, tile, o, outer, low, high);
    const bool dropout = in.dropout.p > 0;
    for (int v = 0; v < kRowVectors; ++v) {
      reference[v] = -load(row.reference + v * lanes);
      limit[v] = Simd<T>::min_exponent - reference[v];
      delta[v] = load(row.delta + v * lanes);
      upstream_constant[v] = dropout ? load(row.total + v * lanes) : -delta[v];
    }
    if (all_below<T>(high, limit)) return;
    const bool in_range = !any_below<T>(low, limit);

    Vec<T> p[kBlockTokens * kRowVectors + 8];
    Vec<T> outer_gradient[kRowVectors] = {}, unused[kRowVectors] = {};
    AlignedChannels sums(g.channels);
    for_each_block(tile, o, [&](const Block& b, int64_t first_token) {
      evaluate_block(b, row.score.form, outer, reference, p);
      exp2_block<T>(p, b.count * kRowVectors, in_range);
      if (dropout) {
        Vec<T> u[kBlockTokens * kRowVectors + 8];
        alignas(64) T keep[kBlockTokens * width];
        evaluate_block(b, row.upstream, upstream_outer, upstream_constant, u);
        dropout_block(b, first_token, keep);
        for (int k = 0; k < b.count * kRowVectors; ++k) p[k] *= load(keep + k * lanes) * u[k] - delta[k % kRowVectors];
      } else {
        evaluate_block<true>(b, row.upstream, upstream_outer, upstream_constant, p);
      }
      Vec<T> block_outer[kRowVectors] = {};
      accumulate<T, C, Indexed, false>(b.tokens, b.index, b.count, g.channels, p, sums.data,
                                       gradient.recent + b.strip_offset, block_outer, unused);
      for (int v = 0; v < kRowVectors; ++v) outer_gradient[v] += block_outer[v];
    });
    add_outer(gradient.form, g, index, outer_gradient);
    sums.add_to(gradient.form.channels);
  }

  // Sums over one tile row, added to the long-running sums at its end: short sums lose less to rounding.
  struct AlignedChannels {
    static constexpr int inline_channels = C ? C : 128;
    alignas(64) T data[inline_channels * width];
    int64_t channels;
    explicit AlignedChannels(int64_t c) : channels(c) {
      std::memset(data, 0, sizeof(T) * static_cast<size_t>(c * width));
    }
    void add_to(T* target) const {
      for (int64_t e = 0; e < channels * width; e += lanes) store<T>(target + e, load(target + e) + load(data + e));
    }
  };
};

// Calls f(std::integral_constant-like tag) with the compile-time channel count, mask and data type of a call.
template <int N>
struct Int {
  static constexpr int value = N;
};
template <class F>
inline void with_channels(int64_t channels, bool indexed, const F& f) {
  const auto with_index = [&](auto c) { indexed ? f(c, Int<1>{}) : f(c, Int<0>{}); };
  switch (channels) {
    case 1:
      return with_index(Int<1>{});
    case 2:
      return with_index(Int<2>{});
    case 3:
      return with_index(Int<3>{});
    case 4:
      return with_index(Int<4>{});
    default:
      return with_index(Int<0>{});
  }
}

// One share of the work: some groups of rows of one batch entry over a part of the tokens. The division into parts
// follows from the shapes alone, so results do not depend on the number of threads.
struct WorkPlan {
  int64_t groups, groups_per_unit, group_units, splits;

  WorkPlan(const Geometry& g, int64_t rows_per_group) {
    constexpr int64_t enough_units = 16, least_tokens = 8192;
    groups = ceil_div(g.rows, rows_per_group);
    const int64_t all = std::max<int64_t>(1, g.batch * groups);
    const int64_t divisible = g.outer > 1 ? g.outer : g.strips;
    splits = std::min({ceil_div(enough_units, all), std::max<int64_t>(1, g.tokens() / least_tokens),
                       std::max<int64_t>(1, divisible)});
    // Packing tokens is shared by the groups of a unit; results do not depend on this number.
    const int64_t units = g.batch * splits == 1 ? num_threads() : 4 * num_threads();
    groups_per_unit = std::max<int64_t>(1, ceil_div(groups, ceil_div(units, std::max<int64_t>(1, g.batch * splits))));
    group_units = ceil_div(groups, groups_per_unit);
  }
};

// Walks the tiles of split `split`, calling f(tile) with packed tokens.
template <class T, int C, class F>
void for_each_tile(const SeparableInputs& in, const Geometry& g, const WorkPlan& plan, int64_t batch_index,
                   int64_t split, const F& f) {
  const TileMemory<T> memory(g, in.mask.defined());
  const bool by_outer = g.outer > 1;
  const auto part = [&](int64_t count, int64_t i) { return count * i / plan.splits; };
  const int64_t o_begin = by_outer ? part(g.outer, split) : 0, o_end = by_outer ? part(g.outer, split + 1) : g.outer;
  const int64_t s_begin = by_outer ? 0 : part(g.strips, split), s_end = by_outer ? g.strips : part(g.strips, split + 1);
  for (int64_t strip = s_begin; strip < s_end; ++strip) {
    for (int64_t o = o_begin; o < o_end; o += memory.rows()) {
      const Tile<T> tile = memory.tile(strip, o, std::min(o + memory.rows(), o_end));
      with_data_type(in.x.dtype, [&](auto type) { pack_tile<T, decltype(type), C>(in, in.r, g, batch_index, tile); });
      f(tile);
    }
  }
}

template <class T>
void merge(SoftmaxState<T>& into, SoftmaxState<T>& from, const Geometry& g) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> scale_into[kRowVectors], scale_from[kRowVectors];
  for (int v = 0; v < kRowVectors; ++v) {
    const Vec<T> a = load(into.reference + v * lanes), b = load(from.reference + v * lanes);
    const Vec<T> nothing = broadcast<T>(-std::numeric_limits<T>::infinity());
    const Vec<T> both = larger<T>(a, b);
    scale_into[v] = a > nothing ? exp2_any<T>(a - both) : Vec<T>{} + T(1);
    scale_from[v] = b > nothing ? exp2_any<T>(b - both) : Vec<T>{} + T(1);
    store<T>(into.reference + v * lanes, both);
  }
  into.scale(g, scale_into);
  from.scale(g, scale_from);
  for (int64_t e = 0; e < SoftmaxState<T>::sums(g) * group_rows<T>; ++e)
    into.weighted.form.channels[e] += from.weighted.form.channels[e];
}

template <class T>
void write_outputs(const SoftmaxState<T>& state, const SeparableOutputs& out, int64_t batch_index, int64_t first_row,
                   int64_t rows, bool dropout) {
  T factor[group_rows<T>];
  for (int64_t i = 0; i < group_rows<T>; ++i) factor[i] = state.sum[i] == 0 ? T(0) : T(1) / state.sum[i];
  for_each_part(state.weighted.form, out.acc, out.marginals, batch_index, first_row,
                [&](const T* packed, const RowsView<T>& view) { unpack(view, packed, rows, factor); });
  double* lse = out.lse.as<double>() + batch_index * out.lse.stride(0) + first_row * out.lse.stride(1);
  T* total = out.total.as<T>() + batch_index * out.total.stride(0) + first_row * out.total.stride(1);
  for (int64_t i = 0; i < rows; ++i) {
    const T sum = state.sum[i];
    lse[i * out.lse.stride(1)] =
        sum == 0 ? -std::numeric_limits<double>::infinity()
                 : kLn2 * static_cast<double>(state.reference[i]) + std::log(static_cast<double>(sum));
    total[i * out.total.stride(1)] = dropout ? state.kept[i] * factor[i] : (sum == 0 ? T(0) : T(1) + sum * 0);
  }
}

template <class T>
void forward(const SeparableInputs& in, const SeparableOutputs& out) {
  const Geometry g(in);
  const WorkPlan plan(g, group_rows<T>);
  const int64_t state_size = SoftmaxState<T>::entries(g) * group_rows<T>,
                score_size = ScoreForm<T>::entries(g) * group_rows<T>;
  const bool shared = plan.splits > 1;
  const AlignedBuffer<T> shared_states(shared ? g.batch * plan.groups * plan.splits * state_size : 0);

  with_channels(g.channels, in.mask.defined(), [&](auto c, auto indexed) {
    using Task = Rows<T, decltype(c)::value, decltype(indexed)::value != 0>;
    parallel_for(g.batch * plan.group_units * plan.splits, [&](int64_t unit) {
      const int64_t split = unit % plan.splits, group_unit = unit / plan.splits % plan.group_units;
      const int64_t batch_index = unit / plan.splits / plan.group_units;
      const int64_t first = group_unit * plan.groups_per_unit,
                    count = std::min(plan.groups_per_unit, plan.groups - first);
      const AlignedBuffer<T> scores(count * score_size), states(shared ? 0 : count * state_size);
      const auto state_memory = [&](int64_t i) {
        return shared
                   ? shared_states.get() + ((batch_index * plan.groups + first + i) * plan.splits + split) * state_size
                   : states.get() + i * state_size;
      };
      for (int64_t i = 0; i < count; ++i) {
        ScoreForm<T>::at(scores.get() + i * score_size, g).load_rows(in, g, batch_index, (first + i) * group_rows<T>);
        SoftmaxState<T>::at(state_memory(i), g).clear(state_memory(i), g);
      }
      for_each_tile<T, Task::kChannels>(in, g, plan, batch_index, split, [&](const Tile<T>& tile) {
        for (int64_t i = 0; i < count; ++i) {
          const Task task{in, g, batch_index, (first + i) * group_rows<T>};
          const auto score = ScoreForm<T>::at(scores.get() + i * score_size, g);
          auto state = SoftmaxState<T>::at(state_memory(i), g);
          for (int64_t o = tile.outer_begin; o < tile.outer_end; ++o) task.forward(score, state, tile, o);
          state.weighted.settle(g, tile.strip);
        }
      });
      for (int64_t i = 0; i < count && !shared; ++i) {
        const int64_t first_row = (first + i) * group_rows<T>;
        write_outputs(SoftmaxState<T>::at(state_memory(i), g), out, batch_index, first_row,
                      std::min<int64_t>(group_rows<T>, g.rows - first_row), in.dropout.p > 0);
      }
    });
  });
  if (!shared) return;
  parallel_for(g.batch * plan.groups, [&](int64_t i) {
    T* memory = shared_states.get() + i * plan.splits * state_size;
    auto state = SoftmaxState<T>::at(memory, g);
    for (int64_t split = 1; split < plan.splits; ++split) {
      auto other = SoftmaxState<T>::at(memory + split * state_size, g);
      merge(state, other, g);
    }
    const int64_t first_row = i % plan.groups * group_rows<T>;
    write_outputs(state, out, i / plan.groups, first_row, std::min<int64_t>(group_rows<T>, g.rows - first_row),
                  in.dropout.p > 0);
  });
}

template <class T>
void backward_rows(const SeparableInputs& in, const SeparableOutputs& saved, const SeparableOutputs& upstream,
                   const SeparableGradients& out) {
  const Geometry g(in);
  const WorkPlan plan(g, group_rows<T>);
  const int64_t group_size = BackwardGroup<T>::entries(g) * group_rows<T>,
                sum_size = FormSums<T>::entries(g) * group_rows<T>;
  const bool shared = plan.splits > 1;
  const AlignedBuffer<T> shared_sums(shared ? g.batch * plan.groups * plan.splits * sum_size : 0);
  T one[group_rows<T>];
  for (T& factor : one) factor = 1;
  const auto write = [&](const Form<T>& sums, int64_t batch_index, int64_t first_row) {
    const int64_t rows = std::min<int64_t>(group_rows<T>, g.rows - first_row);
    for_each_part(sums, out.a, out.tables, batch_index, first_row,
                  [&](const T* packed, const RowsView<T>& view) { unpack(view, packed, rows, one); });
  };

  with_channels(g.channels, in.mask.defined(), [&](auto c, auto indexed) {
    using Task = Rows<T, decltype(c)::value, decltype(indexed)::value != 0>;
    parallel_for(g.batch * plan.group_units * plan.splits, [&](int64_t unit) {
      const int64_t split = unit % plan.splits, group_unit = unit / plan.splits % plan.group_units;
      const int64_t batch_index = unit / plan.splits / plan.group_units;
      const int64_t first = group_unit * plan.groups_per_unit,
                    count = std::min(plan.groups_per_unit, plan.groups - first);
      const AlignedBuffer<T> groups(count * group_size), sums(shared ? 0 : count * sum_size);
      const auto sum_memory = [&](int64_t i) {
        return shared ? shared_sums.get() + ((batch_index * plan.groups + first + i) * plan.splits + split) * sum_size
                      : sums.get() + i * sum_size;
      };
      for (int64_t i = 0; i < count; ++i) {
        BackwardGroup<T>::at(groups.get() + i * group_size, g)
            .load_rows(in, saved, upstream, g, batch_index, (first + i) * group_rows<T>);
        std::memset(sum_memory(i), 0, sizeof(T) * static_cast<size_t>(sum_size));
      }
      for_each_tile<T, Task::kChannels>(in, g, plan, batch_index, split, [&](const Tile<T>& tile) {
        for (int64_t i = 0; i < count; ++i) {
          const Task task{in, g, batch_index, (first + i) * group_rows<T>};
          const auto group = BackwardGroup<T>::at(groups.get() + i * group_size, g);
          const auto gradient = FormSums<T>::at(sum_memory(i), g);
          for (int64_t o = tile.outer_begin; o < tile.outer_end; ++o) task.backward(group, gradient, tile, o);
          gradient.settle(g, tile.strip);
        }
      });
      for (int64_t i = 0; i < count && !shared; ++i)
        write(Form<T>::at(sum_memory(i), g), batch_index, (first + i) * group_rows<T>);
    });
  });
  if (!shared) return;
  parallel_for(g.batch * plan.groups, [&](int64_t i) {
    T* memory = shared_sums.get() + i * plan.splits * sum_size;
    for (int64_t e = sum_size; e < plan.splits * sum_size; ++e) memory[e % sum_size] += memory[e];
    write(Form<T>::at(memory, g), i / plan.groups, i % plan.groups * group_rows<T>);
  });
}

}  // namespace

namespace PK_LEVEL {

void separable_attention_bwd_tokens(const SeparableInputs&, const SeparableOutputs& saved,
                                    const SeparableOutputs& upstream, const SeparableGradients&);

void separable_attention_fwd(const SeparableInputs& in, const SeparableOutputs& out) {
  in.a.dtype == DType::float64 ? forward<double>(in, out) : forward<float>(in, out);
}

void separable_attention_bwd(const SeparableInputs& in, const SeparableOutputs& saved, const SeparableOutputs& upstream,
                             const SeparableGradients& out) {
  if (out.a.defined()) {
    in.a.dtype == DType::float64 ? backward_rows<double>(in, saved, upstream, out)
                                 : backward_rows<float>(in, saved, upstream, out);
  }
  if (out.x.defined() || out.r.defined()) {
    separable_attention_bwd_tokens(in, saved, upstream, out);
  }
}

}  // namespace PK_LEVEL
}  // namespace pk
