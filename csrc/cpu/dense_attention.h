// Dense attention of any number of queries to any number of tokens, softmax(scale q k^T) v: what dense_forward.h and
// dense_backward.h share. `Tokens` give keys and values block after block, `Results` and `Gradients` take what comes
// out.
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

}  // namespace
}  // namespace pk
