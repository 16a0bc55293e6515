// Fourier features written out at memory speed: of a grid by copying table rows, of free positions by recurrences.
#include <cstring>

#include "../ops.h"
#include "fourier_points.h"
#include "huge_pages.h"
#include "parallel.h"

namespace pk {
namespace {

// ---- Grids. The tables have the dtype of the output, so that a token is a few runs of bytes, whatever they mean.

struct GridWriter {
  static constexpr int kMaxRuns = 64;
  // Columns of one axis's table that stand next to each other in the output; in bytes.
  struct Run {
    int axis;
    int64_t column, channel, length;
  };

  const TensorView& data;
  const TensorView& out;
  const TensorList& tables;
  int axes = 0;
  int64_t element = 0, tokens = 1;
  int runs = 0;
  Run run[kMaxRuns];

  GridWriter(const FourierTables& features, const TensorView& data_view, const TensorView& out_view)
      : data(data_view), out(out_view), tables(features.tables) {
    axes = static_cast<int>(tables.size());
    element = element_size(out.dtype);
    for (int k = 0; k < axes; ++k) tokens *= out.size(k + 1);
    int64_t channel = data.defined() ? data.size(-1) * element : 0, column = 0;
    for (size_t section = 0; section < features.sections.size(); ++section) {
      const int64_t length = features.sections[section] * element;
      for (int k = 0; k < axes; ++k) {
        if (runs == kMaxRuns) throw std::invalid_argument("fourier_encode: too many sections");
        run[runs++] = {k, column, channel, length};
        channel += length;
      }
      column += length;
    }
  }

  // Tokens [first, last) of one input. The coordinates count like an odometer; only table rows that change are looked
  // up.
  void write(int64_t batch_index, int64_t first, int64_t last) const {
    int64_t at[kMaxDims];
    const char* row[kMaxDims];
    int64_t rest = first;
    for (int k = axes - 1; k >= 0; --k) {
      at[k] = rest % out.size(k + 1);
      rest /= out.size(k + 1);
    }
    int changed = 0;  // the outermost axis that moved
    for (int64_t token = first; token < last; ++token) {
      char* target = address(out, batch_index, at);
      for (int k = changed; k < axes; ++k) row[k] = tables[k].as<const char>() + at[k] * tables[k].stride(0) * element;
      if (data.defined()) copy_channels(address(data, batch_index, at), target);
      for (int i = 0; i < runs; ++i) {
        std::memcpy(target + run[i].channel, row[run[i].axis] + run[i].column, static_cast<size_t>(run[i].length));
      }
      for (changed = axes - 1; ++at[changed] == out.size(changed + 1) && changed > 0; --changed) at[changed] = 0;
    }
  }

 private:
  char* address(const TensorView& view, int64_t batch_index, const int64_t* at) const {
    int64_t offset = batch_index * view.stride(0);
    for (int k = 0; k < axes; ++k) offset += at[k] * view.stride(k + 1);
    return view.as<char>() + offset * element;
  }

  void copy_channels(const char* source, char* target) const {
    const int64_t step = data.stride(-1) * element;
    for (int64_t c = 0; c < data.size(-1); ++c, source += step, target += element) {
      if (element == 4) {
        std::memcpy(target, source, 4);
      } else if (element == 2) {
        std::memcpy(target, source, 2);
      } else {
        std::memcpy(target, source, 8);
      }
    }
  }
};

// ---- Free positions

template <class X, class Y>
void write_points(const PointWriter<X, Y>& writer) {
  constexpr int64_t rows_per_task = 256;
  const int64_t rows = writer.positions.size(0);
  parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t first = task * rows_per_task;
    writer.write(first, rows - first < rows_per_task ? rows : first + rows_per_task);
  });
}

}  // namespace

namespace PK_LEVEL {

void fourier_encode_grid(const FourierTables& features, const TensorView& data, const TensorView& out) {
  const GridWriter writer(features, data, out);
  if (out.size(0) > 0) prefer_huge_pages(out.data, writer.element * out.size(0) * writer.tokens * out.size(-1));
  const int64_t bytes_per_token = out.size(-1) * writer.element + 1;
  const int64_t wanted = (int64_t{1} << 18) / bytes_per_token;  // a quarter megabyte per task
  const int64_t tokens_per_task = wanted < 1 ? 1 : wanted;
  const int64_t tasks = (writer.tokens + tokens_per_task - 1) / tokens_per_task;
  parallel_for(out.size(0) * tasks, [&](int64_t task) {
    const int64_t first = task % tasks * tokens_per_task;
    const int64_t last = writer.tokens - first < tokens_per_task ? writer.tokens : first + tokens_per_task;
    writer.write(task / tasks, first, last);
  });
}

void fourier_encode_points(const FourierBands& bands, const TensorView& positions, const TensorView& out) {
  if (out.size(0) > 0) prefer_huge_pages(out.data, element_size(out.dtype) * out.size(0) * out.size(1));
  with_floating_type(positions.dtype, [&](auto x) {
    with_floating_type(out.dtype,
                       [&](auto y) { write_points(PointWriter<decltype(x), decltype(y)>(bands, positions, out)); });
  });
}

}  // namespace PK_LEVEL
}  // namespace pk
