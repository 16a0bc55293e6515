// LayerNorm's reciprocal standard deviation of tokens [x ; features] that are never built: r of separable attention.
#include <cmath>

#include "../ops.h"
#include "aligned_buffer.h"
#include "parallel.h"
#include "simd.h"

namespace pk {
namespace {

// planes[c][j] = source[j * step + c * channel_step]
template <class T, class X>
void to_planes(const X* source, int64_t step, int64_t channel_step, int64_t channels, int64_t count, T* planes,
               int64_t plane_step) {
  if (channels == 3 && step == 3 && channel_step == 1) {  // pixels: the compiler makes shuffles of this
    T *red = planes, *green = planes + plane_step, *blue = planes + 2 * plane_step;
    for (int64_t j = 0; j < count; ++j) {
      red[j] = convert<T>(source[3 * j]);
      green[j] = convert<T>(source[3 * j + 1]);
      blue[j] = convert<T>(source[3 * j + 2]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    T* plane = planes + c * plane_step;
    for (int64_t j = 0; j < count; ++j) plane[j] = convert<T>(source[j * step + c * channel_step]);
  }
}

template <class T>
struct Statistics {
  const TensorView& x;
  const TensorList& sums;
  const TensorList& squares;
  const TensorView& scale;
  const TensorView& shift;
  int64_t feature_channels;
  T eps;
  const TensorView& r;

  // One stretch of the last axis: channels are brought into planes first, so that the arithmetic runs over columns.
  template <class X>
  void row(int64_t batch_index, int64_t outer) const {
    const int axes = static_cast<int>(sums.size());
    const int64_t columns = x.size(axes), channels = x.size(-1), step = x.stride(axes), r_step = r.stride(axes);
    const X* source = x.as<const X>() + batch_index * x.stride(0);
    T* target = r.as<T>() + batch_index * r.stride(0);
    T outer_sum = 0, outer_squares = 0;
    for (int k = axes - 2; k >= 0; --k) {
      const int64_t at = outer % x.size(k + 1);
      outer /= x.size(k + 1);
      source += at * x.stride(k + 1);
      target += at * r.stride(k + 1);
      outer_sum += sums[k].as<const T>()[at];
      outer_squares += squares[k].as<const T>()[at];
    }
    const T* column_sums = sums[axes - 1].as<const T>();
    const T* column_squares = squares[axes - 1].as<const T>();
    const T width = static_cast<T>(channels + feature_channels), features = static_cast<T>(feature_channels);

    constexpr int64_t block = 256;
    alignas(64) T mean[block], variance[block];
    const AlignedBuffer<T> planes(channels * block);
    for (int64_t first = 0; first < columns; first += block) {
      const int64_t count = columns - first < block ? columns - first : block;
      for (int64_t j = 0; j < count; ++j) mean[j] = outer_sum + column_sums[first + j];
      to_planes(source + first * step, step, x.stride(-1), channels, count, planes.get(), block);
      for (int64_t c = 0; c < channels; ++c) {
        T* plane = planes.get() + c * block;
        const T factor = scale.defined() ? scale.as<const T>()[c * scale.stride(0)] : T(1);
        const T offset = shift.defined() ? shift.as<const T>()[c * shift.stride(0)] : T(0);
        for (int64_t j = 0; j < count; ++j) {
          plane[j] = plane[j] * factor + offset;
          mean[j] += plane[j];
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        mean[j] /= width;
        variance[j] = outer_squares + column_squares[first + j] - 2 * mean[j] * (outer_sum + column_sums[first + j]) +
                      features * mean[j] * mean[j];
      }
      for (int64_t c = 0; c < channels; ++c) {
        const T* plane = planes.get() + c * block;
        for (int64_t j = 0; j < count; ++j) variance[j] += (plane[j] - mean[j]) * (plane[j] - mean[j]);
      }
      for (int64_t j = 0; j < count; ++j) variance[j] = T(1) / std::sqrt(variance[j] / width + eps);
      for (int64_t j = 0; j < count; ++j) target[(first + j) * r_step] = variance[j];
    }
  }
};

template <class T>
void run(const Statistics<T>& statistics) {
  const TensorView& x = statistics.x;
  int64_t outer = 1;
  for (size_t k = 0; k + 1 < statistics.sums.size(); ++k) outer *= x.size(static_cast<int>(k) + 1);
  constexpr int64_t rows_per_task = 16;
  const int64_t tasks = (outer + rows_per_task - 1) / rows_per_task;
  parallel_for(x.size(0) * tasks, [&](int64_t task) {
    const int64_t first = task % tasks * rows_per_task;
    const int64_t last = first + rows_per_task < outer ? first + rows_per_task : outer;
    with_data_type(x.dtype, [&](auto type) {
      for (int64_t o = first; o < last; ++o) statistics.template row<decltype(type)>(task / tasks, o);
    });
  });
}

}  // namespace

namespace PK_LEVEL {

void separable_layer_norm(const TensorView& x, const TensorList& sums, const TensorList& squares,
                          const TensorView& scale, const TensorView& shift, int64_t feature_channels, double eps,
                          const TensorView& r) {
  if (r.dtype == DType::float64) {
    run(Statistics<double>{x, sums, squares, scale, shift, feature_channels, eps, r});
  } else {
    run(Statistics<float>{x, sums, squares, scale, shift, feature_channels, static_cast<float>(eps), r});
  }
}

}  // namespace PK_LEVEL
}  // namespace pk
