// Attention from queries on a grid, block by block of queries and keys: what its forward and backward share. No query
// and no score matrix is stored.
//
// A row of scores is a sum of rows of the tables, which lie key after key, and of a product with the data's channels;
// what is left of the time goes into products with the values. Everything is computed in float (double for double):
// 16-bit values are widened when they are packed (panels.h).
#pragma once

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
        bias_(step_) {}

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
  }

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
  AlignedBuffer<T> columns_, rows_, tables_, bias_;
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

}  // namespace
}  // namespace pk
