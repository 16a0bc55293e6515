// Dense attention, forward. A task has a group of query blocks and a part of the keys: it packs a block of keys once
// for all queries of the group. Parts of the keys are merged in order.
#pragma once

#include "dense_attention.h"

namespace pk {
namespace {

template <class T, class Tokens, class Results>
class DenseForward {
 public:
  // Both must outlive the object.
  DenseForward(const DenseCall<Tokens>& call, const Results& results)
      : call_(call), results_(results), sizes_(call.sizes), out_step_(row_step<T>(sizes_.head_dim_v)) {
    constexpr int64_t most_blocks = 12, good_blocks = 8, few_tasks = 16;
    const int64_t heads = std::max<int64_t>(sizes_.all_heads(), 1), query_blocks = sizes_.query_blocks();
    const auto groups_of = [&](int64_t size) { return std::max<int64_t>(blocks(query_blocks, size), 1); };
    const int64_t fewest = groups_of(most_blocks);
    // Long parts of the keys cost nothing; groups of fewer queries pack more often; short parts are merged for long.
    parts_ = parts_of(kWantedTasks, heads * fewest, 2048);
    groups_ = std::max(
        std::clamp(blocks(kWantedTasks, heads * parts_), fewest, groups_of(good_blocks)),
        std::clamp(blocks(few_tasks, heads * parts_), fewest, std::max(fewest, groups_of(Tokens::kFewestQueryBlocks))));
    parts_ = std::max(parts_, parts_of(few_tasks, heads * groups_, 256));
  }

  void run() {
    const int64_t tasks = sizes_.all_heads() * groups_ * parts_;
    std::vector<std::unique_ptr<Group>> partial(static_cast<size_t>(parts_ > 1 ? tasks : 0));
    ScratchPool<Scratch> scratches;
    ScratchPool<Group> groups;
    const int64_t query_blocks = blocks(sizes_.query_blocks(), groups_);
    const auto new_scratch = [&] { return std::make_unique<Scratch>(call_, query_blocks); };
    const auto new_group = [&] { return std::make_unique<Group>(query_blocks, out_step_); };
    parallel_for(tasks, [&](int64_t index) {
      const Task task = task_of(index);
      scratches.with(new_scratch, [&](Scratch& scratch) {
        if (parts_ > 1) {
          auto& group = partial[static_cast<size_t>(index)];
          group = new_group();
          attend(task, *group, scratch);
          return;
        }
        groups.with(new_group, [&](Group& group) {
          attend(task, group, scratch);
          for (int64_t block = task.first_block; block < task.last_block; ++block) finish(task, group, block);
        });
      });
    });
    if (parts_ == 1) return;
    parallel_for(sizes_.all_heads() * groups_, [&](int64_t index) {
      const Task task = task_of(index * parts_);
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        merge(partial.data() + index * parts_, block - task.first_block);
        finish(task, *partial[static_cast<size_t>(index * parts_)], block);
      }
    });
  }

 private:
  struct Task {
    int64_t batch, head, first_block, last_block, part;

    Range queries(int64_t block, int64_t all) const { return Range::block(block, kQueryBlock, all); }
  };

  // Softmax and weighted sums of a group's queries.
  struct Group {
    AlignedBuffer<T> out;
    std::vector<SoftmaxState<T>> softmax;

    Group(int64_t query_blocks, int64_t out_step)
        : out(query_blocks * kQueryBlock * out_step), softmax(static_cast<size_t>(query_blocks)) {}
  };

  struct Scratch {
    AlignedBuffer<T> queries, columns, values, copy;
    ScoreBlock<T> scores;

    Scratch(const DenseCall<Tokens>& call, int64_t query_blocks)
        : queries(query_blocks * kQueryBlock * call.sizes.head_dim),
          columns(kForwardKeys * call.sizes.head_dim),
          values(panel_step<T>(kForwardKeys) * blocks(call.sizes.head_dim_v, tile_width<T>)),
          copy(std::max(kQueryBlock * call.sizes.head_dim, call.tokens.copy_size(kForwardKeys))) {}
  };

  int64_t parts_of(int64_t wanted_tasks, int64_t tasks, int64_t shortest) const {
    return std::clamp<int64_t>(blocks(wanted_tasks, tasks), 1,
                               std::clamp<int64_t>(blocks(sizes_.tokens, shortest), 1, kMostParts));
  }

  Task task_of(int64_t index) const {
    const int64_t part = index % parts_, group = index / parts_ % groups_, head = index / (parts_ * groups_);
    const int64_t all = sizes_.query_blocks();
    return {head / sizes_.heads, head % sizes_.heads, group * all / groups_, (group + 1) * all / groups_, part};
  }

  void attend(const Task& task, Group& group, Scratch& scratch) const {
    begin(task, group, scratch);
    const int64_t tokens = call_.tokens.attended().count(task.batch);
    const int64_t size = rounded_up(blocks(tokens, parts_), 16), end = std::min(tokens, (task.part + 1) * size);
    for (int64_t first = task.part * size; first < end; first += kForwardKeys) {
      const Range keys{first, std::min<int64_t>(kForwardKeys, end - first)};
      pack(task, keys, scratch);
      for (int64_t block = task.first_block; block < task.last_block; ++block) {
        attend_to_block(task, block, keys, group, scratch);
      }
    }
  }

  void begin(const Task& task, Group& group, Scratch& scratch) const {
    for (int64_t block = task.first_block; block < task.last_block; ++block) {
      const int64_t local = block - task.first_block;
      const Range queries = task.queries(block, sizes_.queries);
      const auto rows = rows_of<T>(call_.q, task.batch, task.head, queries, nullptr, scratch.copy.get());
      pack_queries<T>(rows, queries.count, sizes_.head_dim, static_cast<T>(call_.scale * kLog2E),
                      scratch.queries.get() + local * kQueryBlock * sizes_.head_dim);
      group.softmax[static_cast<size_t>(local)].clear();
      std::fill_n(group.out.get() + local * kQueryBlock * out_step_, kQueryBlock * out_step_, T(0));
    }
  }

  void pack(const Task& task, const Range& keys, Scratch& scratch) const {
    constexpr int width = tile_width<T>;
    const TokenRows<T> rows = call_.tokens.rows(task.batch, task.head, keys, scratch.copy.get());
    pack_columns<T>(rows.keys, keys.count, sizes_.head_dim, scratch.columns.get());
    pack_panels<T>(rows.values, keys.count, sizes_.head_dim_v, width, panel_step<T>(keys.count), scratch.values.get());
  }

  void attend_to_block(const Task& task, int64_t block, const Range& keys, Group& group, Scratch& scratch) const {
    const int64_t local = block - task.first_block;
    const Range queries = task.queries(block, sizes_.queries);
    scratch.scores.score(scratch.queries.get() + local * kQueryBlock * sizes_.head_dim, queries.count,
                         scratch.columns.get(), sizes_.head_dim, keys.count);
    scratch.scores.softmax_step(group.softmax[static_cast<size_t>(local)], queries.count, keys.count,
                                call_.kept(task.batch, task.head, queries.first, keys.first));
    scratch.scores.accumulate(group.out.get() + local * kQueryBlock * out_step_, out_step_, queries.count,
                              scratch.values.get(), panel_step<T>(keys.count), keys.count, sizes_.head_dim_v);
  }

  // One block of queries of all parts of the keys, into the first part.
  void merge(std::unique_ptr<Group>* partial, int64_t local) const {
    SoftmaxState<T>& merged = partial[0]->softmax[static_cast<size_t>(local)];
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      T maximum = merged.maximum[i];
      for (int64_t part = 1; part < parts_; ++part) {
        const T other = partial[part]->softmax[static_cast<size_t>(local)].maximum[i];
        maximum = maximum > other ? maximum : other;  // a NaN of the last part to have one stays
      }
      for (int64_t part = 0; part < parts_; ++part) {
        add_part(partial[0].get(), partial[part].get(), part == 0, local, i, maximum);
      }
      merged.maximum[i] = maximum;
    }
  }

  void add_part(Group* sums, const Group* addend, bool first, int64_t local, int64_t i, T maximum) const {
    SoftmaxState<T>& to = sums->softmax[static_cast<size_t>(local)];
    const SoftmaxState<T>& from = addend->softmax[static_cast<size_t>(local)];
    const T reference = maximum == -std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::lowest() : maximum;
    const Vec<T> factor = exp2_flushed<T>(broadcast(from.maximum[i] - reference));
    to.sum[i] = (first ? Vec<T>{} : to.sum[i]) + from.sum[i] * factor;
    to.kept[i] = (first ? Vec<T>{} : to.kept[i]) + from.kept[i] * factor;
    T* target = sums->out.get() + (local * kQueryBlock + i) * out_step_;
    const T* source = addend->out.get() + (local * kQueryBlock + i) * out_step_;
    for (int64_t c = 0; c < out_step_; c += Simd<T>::lanes) {
      const Vec<T> value = load(source + c) * factor;
      store<T>(target + c, first ? value : load(target + c) + value);
    }
  }

  void finish(const Task& task, const Group& group, int64_t block) const {
    const Range queries = task.queries(block, sizes_.queries);
    const int64_t local = block - task.first_block;
    const SoftmaxState<T>& state = group.softmax[static_cast<size_t>(local)];
    for (int64_t i = 0; i < queries.count; ++i) {
      const T sum = lane_sum<T>(state.sum[i]);  // zero where all scores are -inf: such a query gets zeros
      const T inverse = sum == 0 ? T(0) : 1 / sum;
      const T kept = call_.dropout.p > 0 ? lane_sum<T>(state.kept[i]) : sum;
      const double lse = kLn2 * (static_cast<double>(state.maximum[i]) + std::log2(static_cast<double>(sum)));
      results_.write(task.batch, task.head, queries.first + i, group.out.get() + (local * kQueryBlock + i) * out_step_,
                     inverse, lse, kept * inverse);
    }
  }

  const DenseCall<Tokens>& call_;
  const Results& results_;
  const DenseSizes& sizes_;
  const int64_t out_step_;
  int64_t parts_, groups_;
};

}  // namespace
}  // namespace pk
