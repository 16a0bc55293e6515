// Fourier features of free positions: fourier_encode.cpp writes them out, absorbed_attention.cpp a block at a time.
#pragma once

#include <cmath>

#include "../ops.h"
#include "simd.h"

namespace pk {
namespace {

// Eight positions stand in the lanes of a vector; angles advance from band to band by recurrences
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

}  // namespace
}  // namespace pk
