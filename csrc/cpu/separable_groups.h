// A group of rows as the kernels of separable attention work on it: its score, and what backward needs besides.
#pragma once

#include "separable_forms.h"

namespace pk {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The score of a group of rows, in powers of two, and the range of its column table in each strip (NaN if not finite).
template <class T>
struct ScoreForm {
  Form<T> form;
  T* low;   // [strips]
  T* high;  // [strips]

  static int64_t entries(const Geometry& g) { return Form<T>::entries(g) + 2 * g.strips; }
  static ScoreForm at(T* memory, const Geometry& g) {
    T* tail = memory + Form<T>::entries(g) * group_rows<T>;
    return {Form<T>::at(memory, g), tail, tail + g.strips * group_rows<T>};
  }
  void load_rows(const SeparableInputs& in, const Geometry& g, int64_t batch_index, int64_t first_row) {
    T factor[group_rows<T>];
    for (T& f : factor) f = static_cast<T>(kLog2E);
    const int64_t rows = std::min<int64_t>(group_rows<T>, g.rows - first_row);
    for_each_part(form, in.a, in.tables, batch_index, first_row,
                  [&](T* packed, const RowsView<T>& view) { pack(packed, view, rows, factor); });
    for (int64_t s = 0; s < g.strips; ++s) {
      for (int v = 0; v < kRowVectors; ++v) {
        const T* first = form.column + g.strip_begin(s) * group_rows<T> + v * Simd<T>::lanes;
        Vec<T> lowest = load(first), highest = lowest, not_finite = {};
        for (int64_t j = 0; j < g.strip_size(s); ++j) {
          const Vec<T> value = load(first + j * group_rows<T>);
          lowest = smaller<T>(value, lowest);
          highest = larger<T>(value, highest);
          not_finite += value * T(0);
        }
        const int64_t at = s * group_rows<T> + v * Simd<T>::lanes;
        store<T>(low + at, lowest + not_finite);
        store<T>(high + at, highest + not_finite);
      }
    }
  }
};

// Everything backward needs of one group of rows.
//
// The weights are recomputed as 2^(score - reference), where reference is log2(e) * lse rounded to T; the rest of lse,
// a factor near 1 per row, goes into the upstream form and delta ("correction"), so that rounding a large lse costs no
// accuracy.
template <class T>
struct BackwardGroup {
  ScoreForm<T> score;
  Form<T> upstream;
  T *reference, *delta, *total;

  static int64_t entries(const Geometry& g) { return ScoreForm<T>::entries(g) + Form<T>::entries(g) + 3; }
  static BackwardGroup at(T* memory, const Geometry& g) {
    T* upstream = memory + ScoreForm<T>::entries(g) * group_rows<T>;
    T* tail = upstream + Form<T>::entries(g) * group_rows<T>;
    return {ScoreForm<T>::at(memory, g), Form<T>::at(upstream, g), tail, tail + group_rows<T>,
            tail + 2 * group_rows<T>};
  }

  void load_rows(const SeparableInputs& in, const SeparableOutputs& saved, const SeparableOutputs& gradient,
                 const Geometry& g, int64_t batch_index, int64_t first_row) {
    const int64_t rows = std::min<int64_t>(group_rows<T>, g.rows - first_row);
    score.load_rows(in, g, batch_index, first_row);
    const auto scalar = [&](const TensorView& view, int64_t i, auto type) {
      return static_cast<double>(
          view.as<decltype(type)>()[batch_index * view.stride(0) + (first_row + i) * view.stride(1)]);
    };
    double sums[group_rows<T>] = {};
    row_dots<T>(sums, RowsView<T>(gradient.acc, batch_index, first_row), RowsView<T>(saved.acc, batch_index, first_row),
                rows);
    for (size_t k = 0; k < saved.marginals.size(); ++k) {
      row_dots<T>(sums, RowsView<T>(gradient.marginals[k], batch_index, first_row),
                  RowsView<T>(saved.marginals[k], batch_index, first_row), rows);
    }
    T correction[group_rows<T>];
    for (int64_t i = 0; i < group_rows<T>; ++i) {
      reference[i] = delta[i] = total[i] = correction[i] = 0;
      if (i >= rows) continue;
      const double exact = kLog2E * scalar(saved.lse, i, double{});
      const bool empty = exact == -std::numeric_limits<double>::infinity();
      reference[i] = empty ? T(0) : static_cast<T>(exact);
      const double factor = empty ? 0.0 : std::exp2(static_cast<double>(reference[i]) - exact);
      const double total_gradient = in.dropout.p > 0 ? scalar(gradient.total, i, T{}) : 0.0;
      sums[i] += total_gradient * scalar(saved.total, i, T{}) - scalar(gradient.lse, i, double{});
      correction[i] = static_cast<T>(factor);
      delta[i] = empty ? T(0) : static_cast<T>(factor * sums[i]);
      total[i] = empty ? T(0) : static_cast<T>(factor * total_gradient);
    }
    for_each_part(upstream, gradient.acc, gradient.marginals, batch_index, first_row,
                  [&](T* packed, const RowsView<T>& view) { pack(packed, view, rows, correction); });
  }
};

// Sum of the outer tables at one outer position.
template <class T>
inline void outer_sum(const Form<T>& form, const Geometry& g, const int64_t* index, Vec<T>* sum) {
  for (int v = 0; v < kRowVectors; ++v) {
    sum[v] = Vec<T>{};
    for (int64_t k = 0; k + 1 < g.axes; ++k) sum[v] += load(form.outer + index[k] * group_rows<T> + v * Simd<T>::lanes);
  }
}

}  // namespace
}  // namespace pk
