// Absorbed attention on the CPU, forward and backward: dense_{forward,backward}.h over tokens that are their own keys
// and values, encoded and normalised block after block. Compiled once per instruction set.
//
// With LayerNorm, what is attended to is y = [r (z - mean(z)) ; r mean(z)] by [a ; sum of a]: s = r a . z without the
// rounding of a mean that is far larger than what it leaves. Of the gradient d_y, whose last element is d_mean, follows
// d_z = r (d_y + (d_mean - sum of d_y) / C - (d_y . y) (z - mean(z)) r / C).
#include "dense_backward.h"
#include "dense_forward.h"
#include "fourier_points.h"

namespace pk {
namespace {

template <class T>
inline T channel_sum(const T* row, int64_t channels) {
  Vec<T> sum = {};
  for (int64_t c = 0; c < channels; c += Simd<T>::lanes) sum += load_channels<T>(row + c, 1, channels - c);
  return lane_sum<T>(sum);
}

// (batch, rows, channels) as one head's (batch, 1, rows, channels).
TensorView as_one_head(const TensorView& view) {
  if (!view.defined()) return view;
  TensorView result = view;
  result.dims = 4;
  result.sizes[1] = 1, result.strides[1] = 0;
  for (int dim = 1; dim < 3; ++dim)
    result.sizes[dim + 1] = view.sizes[dim], result.strides[dim + 1] = view.strides[dim];
  return result;
}

template <class T>
class EncodedTokens {
 public:
  static constexpr bool kOneMatrix = true;
  static constexpr int64_t kFewestQueryBlocks = 12;  // that make encoding a block of tokens worth it

  explicit EncodedTokens(const AbsorbedInputs& in)
      : in_(in),
        x_(as_one_head(in.x)),
        data_channels_(in.x.defined() ? in.x.size(2) : 0),
        width_(in.a.size(2)),
        channels_(width_ - (in.normalises ? 1 : 0)),
        attended_(in.mask, in.a.size(0), in.x.defined() ? in.x.size(1) : in.positions.size(1)) {}

  const AttendedTokens& attended() const { return attended_; }

  // A block's tokens, and r of each.
  int64_t copy_size(int64_t tokens) const { return tokens * (width_ + 1); }

  TokenRows<T> rows(int64_t batch, int64_t, const Range& tokens, T* copy) const {
    const int64_t* listed = attended_.listed(batch, tokens.first);
    if (data_channels_ > 0) copy_rows(x_, batch, 0, tokens, listed, width_, copy);
    if (in_.positions.defined()) encode(batch, tokens, listed, copy + data_channels_);
    T* factors = copy + tokens.count * width_;
    for (int64_t i = 0; in_.normalises && i < tokens.count; ++i) factors[i] = normalise(copy + i * width_);
    return {{copy, width_, 1}, {copy, width_, 1}};
  }

  // d_y of a block becomes the gradient of its x, y being as rows() gives them.
  void differentiate(const Range& tokens, const T* y, T* d_y, int64_t step) const {
    const T* factors = y + tokens.count * width_;
    for (int64_t i = 0; in_.normalises && i < tokens.count; ++i) {
      differentiate_norm(factors[i], y + i * width_, d_y + i * step);
    }
  }

 private:
  void encode(int64_t batch, const Range& tokens, const int64_t* listed, T* features) const {
    const int64_t axes = in_.positions.size(2);
    const AlignedBuffer<double> gathered(tokens.count * axes);
    copy_rows(as_one_head(in_.positions), batch, 0, tokens, listed, axes, gathered.get());
    const TensorView positions{gathered.get(), DType::float64, 2, {tokens.count, axes}, {axes, 1}};
    const TensorView out{features, in_.a.dtype, 2, {tokens.count, channels_ - data_channels_}, {width_, 1}};
    PointWriter<double, T>(in_.bands, positions, out).write(0, tokens.count);
  }

  // z becomes y; returns r.
  T normalise(T* z) const {
    const T mean = channel_sum(z, channels_) / static_cast<T>(channels_);
    Vec<T> squares = {};
    int64_t c = 0;
    for (; c + Simd<T>::lanes <= channels_; c += Simd<T>::lanes) {
      const Vec<T> away = load_unaligned(z + c) - mean;
      squares += away * away;
    }
    T variance = lane_sum<T>(squares);
    for (; c < channels_; ++c) variance += (z[c] - mean) * (z[c] - mean);
    const T r = 1 / std::sqrt(variance / static_cast<T>(channels_) + static_cast<T>(in_.eps));
    for (c = 0; c < channels_; ++c) z[c] = r * (z[c] - mean);
    z[channels_] = r * mean;
    return r;
  }

  // d_y becomes d_z, of the channels of x alone.
  void differentiate_norm(T r, const T* y, T* d_y) const {
    Vec<T> sum = {};
    for (int64_t c = 0; c < width_; c += Simd<T>::lanes) {
      sum += load_channels<T>(y + c, 1, width_ - c) * load_channels<T>(d_y + c, 1, width_ - c);
    }
    const T slope = lane_sum<T>(sum) / static_cast<T>(channels_);
    const T shift = (d_y[channels_] - channel_sum(d_y, channels_)) / static_cast<T>(channels_);
    for (int64_t c = 0; c < data_channels_; ++c) d_y[c] = r * (d_y[c] + shift - slope * y[c]);
  }

  const AbsorbedInputs& in_;
  const TensorView x_;
  const int64_t data_channels_, width_, channels_;
  const AttendedTokens attended_;
};

template <class T>
struct Results {
  const AbsorbedState& state;

  void write(int64_t batch, int64_t, int64_t row, const T* sums, T inverse, double lse, T total) const {
    const int64_t rows = state.acc.size(1), channels = state.acc.size(2), index = batch * rows + row;
    write_row(sums, inverse, channels, state.acc.as<T>() + index * channels);
    state.lse.as<double>()[index] = lse;
    state.total.as<T>()[index] = total;
  }
};

template <class T>
class Gradients {
 public:
  Gradients(const EncodedTokens<T>& tokens, const AbsorbedState& saved, const AbsorbedState& upstream,
            const TensorView& d_a, const TensorView& d_x)
      : tokens_(tokens),
        saved_(saved),
        upstream_(upstream),
        acc_(as_one_head(saved.acc)),
        d_acc_(as_one_head(upstream.acc)),
        d_a_(as_one_head(d_a)),
        d_x_(as_one_head(d_x)) {}

  const TensorView& d_out() const { return d_acc_; }
  bool needs_queries() const { return d_a_.defined(); }
  bool needs_keys() const { return d_x_.defined(); }

  // Of a row with nothing to attend to, nothing depends on it.
  T d_lse(int64_t batch, int64_t row) const {
    const bool empty = element<double>(saved_.lse, batch, row) == -std::numeric_limits<double>::infinity();
    return empty ? T(0) : static_cast<T>(element<double>(upstream_.lse, batch, row));
  }

  // delta = d_acc . acc + d_total total - d_lse
  void statistics(int64_t batch, int64_t, const Range& rows, T* reference, T* delta, T* d_total) const {
    row_products<T>(d_acc_, acc_, batch, 0, rows, delta);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = rows.first + i;
      reference[i] = score_reference<T>(element<double>(saved_.lse, batch, row));
      d_total[i] = element<T>(upstream_.total, batch, row);
      delta[i] += d_total[i] * element<T>(saved_.total, batch, row);
      delta[i] -= d_lse(batch, row);
    }
  }

  void write_queries(int64_t batch, int64_t, const Range& rows, const T* d_rows, int64_t step, T) const {
    write_rows(d_a_, batch, 0, rows, nullptr, d_rows, step, T(1));
  }

  void write_keys(int64_t batch, int64_t head, const Range& tokens, T* d_keys, int64_t step, const T*, int64_t, T,
                  T* copy) const {
    tokens_.rows(batch, head, tokens, copy);
    tokens_.differentiate(tokens, copy, d_keys, step);
    write_rows(d_x_, batch, 0, tokens, tokens_.attended().listed(batch, tokens.first), d_keys, step, T(1));
  }

 private:
  template <class X>
  static X element(const TensorView& view, int64_t batch, int64_t row) {
    return view.as<const X>()[batch * view.stride(0) + row * view.stride(1)];
  }

  const EncodedTokens<T>& tokens_;
  const AbsorbedState &saved_, &upstream_;
  const TensorView acc_, d_acc_, d_a_, d_x_;
};

template <class T, class Run>
void with_call(const AbsorbedInputs& in, const Run& run) {
  const EncodedTokens<T> tokens(in);
  const TensorView a = as_one_head(in.a);
  const int64_t channels = a.size(3);
  run(tokens, DenseCall<EncodedTokens<T>>{
                  a, tokens, 1.0, in.dropout, {a.size(0), 1, a.size(2), tokens.attended().most(), channels, channels}});
}

template <class T>
void forward(const AbsorbedInputs& in, const AbsorbedState& out) {
  with_call<T>(in, [&](const auto& tokens, const auto& call) {
    DenseForward<T, std::decay_t<decltype(tokens)>, Results<T>>(call, Results<T>{out}).run();
  });
}

template <class T>
void backward(const AbsorbedInputs& in, const AbsorbedState& saved, const AbsorbedState& upstream,
              const TensorView& d_a, const TensorView& d_x) {
  with_call<T>(in, [&](const auto& tokens, const auto& call) {
    dense_backward<T>(call, Gradients<T>(tokens, saved, upstream, d_a, d_x));
  });
}

}  // namespace

namespace PK_LEVEL {

void absorbed_attention_fwd(const AbsorbedInputs& in, const AbsorbedState& out) {
  in.a.dtype == DType::float64 ? forward<double>(in, out) : forward<float>(in, out);
}

void absorbed_attention_bwd(const AbsorbedInputs& in, const AbsorbedState& saved, const AbsorbedState& upstream,
                            const TensorView& d_a, const TensorView& d_x) {
  in.a.dtype == DType::float64 ? backward<double>(in, saved, upstream, d_a, d_x)
                               : backward<float>(in, saved, upstream, d_a, d_x);
}

}  // namespace PK_LEVEL
}  // namespace pk
