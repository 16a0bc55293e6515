// Fourier features written out at memory speed: of a grid by copying table rows, of free positions by recurrences.
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "huge_pages.h"
#include "parallel.h"
#include "simd.h"

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

// ---- Free positions. Eight positions stand in the lanes of a vector; angles advance from band to band by recurrences
// in double, whose rounding stays that of the angle itself.

constexpr int kLanes = 8;
constexpr double kPi = 3.14159265358979323846;
typedef double Lanes __attribute__((vector_size(8 * kLanes), may_alias));

struct Phase {
  Lanes sine, cosine;
};

inline Phase phase(const Lanes& x, double frequency) {
  Phase result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const double angle = x[lane] * (kPi * frequency);
    result.sine[lane] = std::sin(angle);
    result.cosine[lane] = std::cos(angle);
  }
  return result;
}

// sin(u + v), cos(u + v)
inline Phase advance(const Phase& u, const Phase& v) {
  return {u.sine * v.cosine + u.cosine * v.sine, u.cosine * v.cosine - u.sine * v.sine};
}

// How the frequencies of one axis follow each other.
struct Progression {
  enum Kind { arithmetic, octaves, free } kind = free;
  double step = 0;     // of an arithmetic one
  int64_t reseed = 1;  // bands after which sine and cosine are computed anew

  Progression(const double* frequencies, int64_t count) {
    if (count < 3) return;
    step = (frequencies[count - 1] - frequencies[0]) / static_cast<double>(count - 1);
    double largest = 0;
    bool even = true, doubling = true;
    for (int64_t k = 0; k < count; ++k) largest = std::fmax(largest, std::fabs(frequencies[k]));
    for (int64_t k = 0; k < count; ++k) {
      // A few units in the last place, as they come from rounding the frequencies themselves.
      even = even && std::fabs(frequencies[0] + step * static_cast<double>(k) - frequencies[k]) <= 1e-15 * largest;
      doubling = doubling && (k == 0 || frequencies[k] == 2 * frequencies[k - 1]);
    }
    kind = doubling ? octaves : even ? arithmetic : free;
    reseed = doubling ? 8 : even ? 64 : 1;
  }
};

template <class X, class Y>
struct PointWriter {
  const FourierBands& bands;
  const TensorView& positions;
  const TensorView& out;
  int64_t axes, count;  // count: frequencies per axis
  // First channels of axis 0, and the steps from axis to axis.
  int64_t position_channel, position_step, sine_channel, cosine_channel, wave_step;

  PointWriter(const FourierBands& options, const TensorView& positions_view, const TensorView& out_view)
      : bands(options), positions(positions_view), out(out_view) {
    axes = positions.size(1);
    count = static_cast<int64_t>(bands.frequencies.size()) / axes;
    const int64_t waves = bands.sine_only ? count : 2 * count, position = bands.concat_pos ? 1 : 0;
    sine_channel = bands.grouped ? axes * position : 0;
    cosine_channel = sine_channel + (bands.grouped ? axes * count : count);
    wave_step = bands.grouped ? count : waves + position;
    position_channel = bands.grouped ? 0 : waves;
    position_step = bands.grouped ? 1 : wave_step;
  }

  // Positions [first, last).
  void write(int64_t first, int64_t last) const {
    for (int64_t axis = 0; axis < axes; ++axis) {
      const double* frequencies = bands.frequencies.data() + axis * count;
      const Progression progression(frequencies, count);
      for (int64_t row = first; row < last; row += kLanes) {
        const int64_t rows = last - row < kLanes ? last - row : kLanes;
        const Lanes x = coordinates(axis, row, rows);
        for (int64_t lane = 0; bands.concat_pos && lane < rows; ++lane) {
          target(row + lane)[position_channel + axis * position_step] = convert_back<Y>(x[lane]);
        }
        write_waves(x, frequencies, progression, axis * wave_step, row, rows);
      }
    }
  }

 private:
  Lanes coordinates(int64_t axis, int64_t row, int64_t rows) const {
    Lanes x = {};
    for (int64_t lane = 0; lane < rows; ++lane) {
      x[lane] =
          convert<double>(positions.as<const X>()[(row + lane) * positions.stride(0) + axis * positions.stride(1)]);
    }
    return x;
  }

  Y* target(int64_t row) const { return out.as<Y>() + row * out.stride(0); }

  void write_waves(const Lanes& x, const double* frequencies, const Progression& progression, int64_t first_channel,
                   int64_t row, int64_t rows) const {
    constexpr int64_t block = 8;
    const Phase step = progression.kind == Progression::arithmetic ? phase(x, progression.step) : Phase{};
    Phase current{};
    Y sines[block][kLanes], cosines[block][kLanes];
    for (int64_t start = 0; start < count; start += block) {
      const int64_t end = count - start < block ? count : start + block;
      for (int64_t k = start; k < end; ++k) {
        if (k % progression.reseed == 0) {
          current = phase(x, frequencies[k]);
        } else {
          current = advance(current, progression.kind == Progression::octaves ? current : step);
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          sines[k - start][lane] = convert_back<Y>(current.sine[lane]);
          cosines[k - start][lane] = convert_back<Y>(current.cosine[lane]);
        }
      }
      for (int64_t lane = 0; lane < rows; ++lane) {
        Y* channels = target(row + lane) + first_channel;
        for (int64_t k = start; k < end; ++k) channels[sine_channel + k] = sines[k - start][lane];
        if (bands.sine_only) continue;
        for (int64_t k = start; k < end; ++k) channels[cosine_channel + k] = cosines[k - start][lane];
      }
    }
  }
};

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
