// Backward of separable attention for the tokens: gradients of x and r, the loops exchanged. Compiled once per
// instruction set.
#include "philox.h"
#include "separable_groups.h"

namespace pk {
namespace {

// Gradients of x and r: the same scores with the loops exchanged, every token summing over all rows. The tile is packed
// without r, so that r = 0 keeps its gradient.
template <class T, bool Indexed>
struct Tokens {
  static constexpr int lanes = Simd<T>::lanes, width = group_rows<T>;
  const SeparableInputs& in;
  const SeparableGradients& out;
  const Geometry& g;
  const Tile<T>& tile;
  int64_t batch_index, o;
  int first, count;  // block of tokens within the tile row

  int64_t column(int k) const {
    return g.strip_begin(tile.strip) + (Indexed ? tile.row_index(o)[first + k] : first + k);
  }

  int64_t offset(const TensorView& view, int k) const {
    int64_t at[kMaxDims];
    g.outer_index(o, false, at);
    int64_t position = batch_index * view.stride(0) + column(k) * view.stride(static_cast<int>(g.axes));
    for (int64_t axis = 0; axis + 1 < g.axes; ++axis) position += at[axis] * view.stride(static_cast<int>(axis) + 1);
    return position;
  }

  // Adds one group's rows to the sums [token][x_1 .. x_c, two parts of r][lane].
  void add_group(const BackwardGroup<T>& group, int64_t first_row, const int64_t* index, const T* r, T* sums) const {
    const Vec<T> zero[kRowVectors] = {};
    Vec<T> outer[kRowVectors], upstream_outer[kRowVectors];
    Vec<T> score[kBlockTokens * kRowVectors + 8], upstream[kBlockTokens * kRowVectors + 8];
    const T* tokens = tile.row_tokens(o) + first * (g.channels + 1);
    const int32_t* token_index = Indexed ? tile.row_index(o) + first : nullptr;
    const int64_t table_offset = (g.strip_begin(tile.strip) + (Indexed ? 0 : first)) * width;
    outer_sum(group.score.form, g, index, outer);
    outer_sum(group.upstream, g, index, upstream_outer);
    evaluate<T, 0, Indexed>(tokens, token_index, count, g.channels, group.score.form.channels,
                            group.score.form.column + table_offset, outer, zero, score);
    evaluate<T, 0, Indexed>(tokens, token_index, count, g.channels, group.upstream.channels,
                            group.upstream.column + table_offset, upstream_outer, zero, upstream);
    const bool dropout = in.dropout.p > 0;
    DropoutScales<T, width> scales(in.dropout, batch_index, first_row);
    for (int k = 0; k < count; ++k) {
      alignas(64) T keep[width];
      if (dropout) scales.of_token(o * g.columns + column(k), keep);
      T* sum = sums + k * (g.channels + 2) * lanes;
      for (int v = 0; v < kRowVectors; ++v) {
        const Vec<T> s = score[kRowVectors * k + v], u = upstream[kRowVectors * k + v];
        const Vec<T> p = exp2_any<T>(s * r[k] - load(group.reference + v * lanes));
        const Vec<T> kept = dropout ? p * load(keep + v * lanes) : p;
        const Vec<T> d_score = kept * (u * r[k] + load(group.total + v * lanes)) - p * load(group.delta + v * lanes);
        const Vec<T> d_form = d_score * T(kLn2);
        for (int64_t c = 0; c < g.channels; ++c) {
          const Vec<T> a = load(group.score.form.channels + c * width + v * lanes);
          const Vec<T> d_acc = load(group.upstream.channels + c * width + v * lanes);
          store<T>(sum + c * lanes, load(sum + c * lanes) + (d_form * a + kept * d_acc));
        }
        T* r_sum = sum + g.channels * lanes;
        store<T>(r_sum, load(r_sum) + d_form * s);
        store<T>(r_sum + lanes, load(r_sum + lanes) + kept * u);
      }
    }
  }

  void run(const T* groups, int64_t group_count) const {
    const int64_t entries = g.channels + 2;
    const AlignedBuffer<T> sums(count * entries * lanes);
    std::memset(sums.get(), 0, sizeof(T) * static_cast<size_t>(count * entries * lanes));
    T r[kBlockTokens];
    for (int k = 0; k < count; ++k) r[k] = in.r.defined() ? in.r.as<const T>()[offset(in.r, k)] : T(1);
    int64_t index[kMaxDims];
    g.outer_index(o, true, index);
    for (int64_t i = 0; i < group_count; ++i) {
      const auto group = BackwardGroup<T>::at(const_cast<T*>(groups) + i * BackwardGroup<T>::entries(g) * width, g);
      add_group(group, i * width, index, r, sums.get());
    }
    for (int k = 0; k < count; ++k) {
      const auto total = [&](int64_t entry) {
        const T* lane_sums = sums.get() + (k * entries + entry) * lanes;
        T value = 0;
        for (int lane = 0; lane < lanes; ++lane) value += lane_sums[lane];
        return value;
      };
      if (out.x.defined()) {
        with_floating_type(out.x.dtype, [&](auto type) {
          using X = decltype(type);
          X* target = out.x.as<X>() + offset(out.x, k);
          for (int64_t c = 0; c < g.channels; ++c) target[c * out.x.stride(-1)] = convert_back<X>(r[k] * total(c));
        });
      }
      if (out.r.defined()) out.r.as<T>()[offset(out.r, k)] = total(g.channels) + total(g.channels + 1);
    }
  }
};

template <class T>
void backward_tokens(const SeparableInputs& in, const SeparableOutputs& saved, const SeparableOutputs& upstream,
                     const SeparableGradients& out) {
  const Geometry g(in);
  const int64_t group_count = ceil_div(g.rows, group_rows<T>),
                group_size = BackwardGroup<T>::entries(g) * group_rows<T>;
  const AlignedBuffer<T> groups(group_count * group_size);
  for (int64_t batch_index = 0; batch_index < g.batch; ++batch_index) {
    parallel_for(group_count, [&](int64_t i) {
      BackwardGroup<T>::at(groups.get() + i * group_size, g)
          .load_rows(in, saved, upstream, g, batch_index, i * group_rows<T>);
    });
    parallel_for(g.strips * g.outer, [&](int64_t unit) {
      const TileMemory<T> memory(g, in.mask.defined(), 1);
      const int64_t o = unit / g.strips;
      const Tile<T> tile = memory.tile(unit % g.strips, o, o + 1);
      with_data_type(in.x.dtype,
                     [&](auto type) { pack_tile<T, decltype(type), 0>(in, TensorView{}, g, batch_index, tile); });
      for (int first = 0; first < tile.row_count(o); first += kBlockTokens) {
        const int count = std::min(kBlockTokens, tile.row_count(o) - first);
        if (in.mask.defined()) {
          Tokens<T, true>{in, out, g, tile, batch_index, o, first, count}.run(groups.get(), group_count);
        } else {
          Tokens<T, false>{in, out, g, tile, batch_index, o, first, count}.run(groups.get(), group_count);
        }
      }
    });
  }
}

}  // namespace

namespace PK_LEVEL {

void separable_attention_bwd_tokens(const SeparableInputs& in, const SeparableOutputs& saved,
                                    const SeparableOutputs& upstream, const SeparableGradients& out) {
  in.a.dtype == DType::float64 ? backward_tokens<double>(in, saved, upstream, out)
                               : backward_tokens<float>(in, saved, upstream, out);
}

}  // namespace PK_LEVEL
}  // namespace pk
