// Cross-attention on the CPU, forward and backward: dense_{forward,backward}.h over the keys and values of one head at
// a time, less those that are masked. Compiled once per instruction set.
#include "dense_backward.h"
#include "dense_forward.h"

namespace pk {
namespace {

template <class T>
class KeysAndValues {
 public:
  static constexpr bool kOneMatrix = false;
  static constexpr int64_t kFewestQueryBlocks = 4;  // that make packing a block of keys worth it

  explicit KeysAndValues(const CrossInputs& in) : in_(in), attended_(in.mask, in.k.size(0), in.k.size(2)) {}

  const AttendedTokens& attended() const { return attended_; }

  int64_t copy_size(int64_t tokens) const { return tokens * (in_.k.size(3) + in_.v.size(3)); }

  TokenRows<T> rows(int64_t batch, int64_t head, const Range& tokens, T* copy) const {
    const int64_t* listed = attended_.listed(batch, tokens.first);
    return {rows_of<T>(in_.k, batch, head, tokens, listed, copy),
            rows_of<T>(in_.v, batch, head, tokens, listed, copy + tokens.count * in_.k.size(3))};
  }

 private:
  const CrossInputs& in_;
  const AttendedTokens attended_;
};

DenseSizes sizes_of(const CrossInputs& in) {
  return {in.q.size(0), in.q.size(1), in.q.size(2), in.k.size(2), in.q.size(3), in.v.size(3)};
}

template <class T>
struct Results {
  const LatentOutputs& outputs;

  void write(int64_t batch, int64_t head, int64_t query, const T* sums, T inverse, double lse, T) const {
    const TensorView &out = outputs.out, &all_lse = outputs.lse;
    write_row_as(out.dtype, sums, inverse, out.size(3), out.data,
                 batch * out.stride(0) + head * out.stride(1) + query * out.stride(2));
    all_lse.as<T>()[batch * all_lse.stride(0) + head * all_lse.stride(1) + query] = static_cast<T>(lse);
  }
};

template <class T>
class Gradients {
 public:
  Gradients(const KeysAndValues<T>& tokens, const LatentOutputs& saved, const TensorView& d_out,
            const LatentGradients& gradients)
      : tokens_(tokens), saved_(saved), d_out_(d_out), gradients_(gradients) {}

  const TensorView& d_out() const { return d_out_; }
  bool needs_queries() const { return true; }
  bool needs_keys() const { return true; }
  T d_lse(int64_t, int64_t) const { return T(0); }

  // delta = d_out . out
  void statistics(int64_t batch, int64_t head, const Range& queries, T* reference, T* delta, T* d_total) const {
    const TensorView& lse = saved_.lse;
    const T* row_lse = lse.as<const T>() + batch * lse.stride(0) + head * lse.stride(1) + queries.first;
    row_products<T>(d_out_, saved_.out, batch, head, queries, delta);
    for (int64_t i = 0; i < queries.count; ++i) {
      reference[i] = score_reference<T>(row_lse[i]);
      d_total[i] = T(0);
    }
  }

  void write_queries(int64_t batch, int64_t head, const Range& queries, const T* rows, int64_t step, T scale) const {
    write_rows(gradients_.q, batch, head, queries, nullptr, rows, step, scale);
  }

  void write_keys(int64_t batch, int64_t head, const Range& keys, T* d_keys, int64_t step, const T* d_values,
                  int64_t step_v, T scale, T*) const {
    const int64_t* listed = tokens_.attended().listed(batch, keys.first);
    write_rows(gradients_.k, batch, head, keys, listed, d_keys, step, scale);
    write_rows(gradients_.v, batch, head, keys, listed, d_values, step_v, T(1));
  }

 private:
  const KeysAndValues<T>& tokens_;
  const LatentOutputs& saved_;
  const TensorView& d_out_;
  const LatentGradients& gradients_;
};

template <class T>
void forward(const CrossInputs& in, const LatentOutputs& out) {
  const KeysAndValues<T> tokens(in);
  const DenseCall<KeysAndValues<T>> call{in.q, tokens, in.scale, in.dropout, sizes_of(in)};
  const Results<T> results{out};
  DenseForward<T, KeysAndValues<T>, Results<T>>(call, results).run();
}

template <class T>
void backward(const CrossInputs& in, const LatentOutputs& saved, const TensorView& d_out,
              const LatentGradients& gradients) {
  const KeysAndValues<T> tokens(in);
  const DenseCall<KeysAndValues<T>> call{in.q, tokens, in.scale, in.dropout, sizes_of(in)};
  dense_backward<T>(call, Gradients<T>(tokens, saved, d_out, gradients));
}

}  // namespace

namespace PK_LEVEL {

void cross_attention_fwd(const CrossInputs& in, const LatentOutputs& out) {
  in.q.dtype == DType::float64 ? forward<double>(in, out) : forward<float>(in, out);
}

void cross_attention_bwd(const CrossInputs& in, const LatentOutputs& saved, const TensorView& d_out,
                         const LatentGradients& gradients) {
  in.q.dtype == DType::float64 ? backward<double>(in, saved, d_out, gradients)
                               : backward<float>(in, saved, d_out, gradients);
}

}  // namespace PK_LEVEL
}  // namespace pk
