// fourier_encode on a GPU. A grid's features are rows of tables: bits that are copied, 16 bytes to a store. Those of
// free positions are sines and cosines of reduced angles, laid out in shared memory and stored as widely.
#include <cmath>
#include <numeric>

#include "elements.h"
#include "launch.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kMaxAxes = 4, kMaxSections = 4, kVectorBytes = 16, kThreads = 128;
constexpr int64_t kSteps = 16;       // stores of a thread
constexpr int64_t kBatchToStep = 8;  // from this batch on a thread's stores are of one place in several inputs

// --- division by numbers that the host knows: a product and a shift, for dividends below 2^31 ---

struct Divisor {
  uint32_t value = 1, magic = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while (uint64_t{1} << shift < value) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }
};

struct Division {
  uint32_t quotient, rest;
};

__device__ __forceinline__ Division divide(uint32_t dividend, const Divisor& by) {
  const uint32_t quotient = (__umulhi(dividend, by.magic) + dividend) >> by.shift;
  return {quotient, dividend - quotient * by.value};
}

// --- grids ---

// Channels of a token that stand next to each other in their source: in the data (axis kMaxAxes) or an axis's table.
struct Run {
  int first, axis, column;
};

// The grid with its axes at the end of four, and the layout of an output's channels.
struct GridCopy {
  void* out;
  const void* data;
  const void* tables[kMaxAxes];
  int64_t out_strides[kMaxAxes], data_strides[kMaxAxes];
  int64_t out_batch, data_batch, data_channel;
  int64_t last;  // tokens of the last axis
  int columns, channels;
  Run runs[1 + kMaxAxes * kMaxSections + 1];  // closed by one that begins where the channels end
  // Work is counted by chunks of a group, strips of the last axis, positions of the other axes, parts of the batch.
  Divisor chunks, strips, outer[kMaxAxes - 1], by_channels;
  int group;          // tokens whose channels together are whole vectors
  int span;           // tokens of a strip, whole groups
  int batch, inputs;  // in all and of a part
  bool packed;        // tokens of the last axis follow each other without gaps, whole vectors of them
  // A thread's steps, from group to group of a strip or from input to input, and how sources and target move.
  bool over_batch;
  int64_t data_step, table_step, out_step;
};

// Writes a strip of the last axis a group at a time, or a group for several inputs. A thread has the same channels at
// every step, so that nothing is divided or chosen in the loop, and what does not move from step to step is kept.
template <class Word, int vector>
__global__ void __launch_bounds__(kThreads) fourier_encode_grid_kernel(const __grid_constant__ GridCopy copy) {
  struct alignas(sizeof(Word) * vector) Vector {
    Word words[vector];
  };
  Division place = divide(blockIdx.x, copy.chunks);
  const int element = static_cast<int>(place.rest * kThreads + threadIdx.x) * vector;
  place = divide(place.quotient, copy.strips);
  const int64_t start = int64_t{place.rest} * copy.span;
  int64_t at[kMaxAxes];
  at[kMaxAxes - 1] = start;
  for (int axis = kMaxAxes - 2; axis >= 0; --axis) {
    place = divide(place.quotient, copy.outer[axis]);
    at[axis] = place.rest;
  }
  const int input = static_cast<int>(place.quotient) * copy.inputs;

  const int group_elements = copy.group * copy.channels;
  const int elements = static_cast<int>(min(copy.last - start, int64_t{copy.span})) * copy.channels;
  if (element >= min(group_elements, elements)) return;
  Division begin = divide(static_cast<uint32_t>(element), copy.by_channels);
  int token = static_cast<int>(begin.quotient), channel = static_cast<int>(begin.rest), run = 0;

  Word* target = static_cast<Word*>(copy.out) + input * copy.out_batch;
  const Word* data = static_cast<const Word*>(copy.data) + input * copy.data_batch;
#pragma unroll
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    target += at[axis] * copy.out_strides[axis];
    data += at[axis] * copy.data_strides[axis];
  }
  target += copy.packed ? element : token * copy.out_strides[kMaxAxes - 1] + channel;

  const Word* sources[vector];
  int64_t steps[vector];
  Vector value;
  bool moves = false;
  while (channel >= copy.runs[run + 1].first) ++run;
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    const int axis = copy.runs[run].axis;
    if (axis == kMaxAxes) {
      sources[i] = data + token * copy.data_strides[kMaxAxes - 1] + channel * copy.data_channel;
      steps[i] = copy.data_step;
    } else {
      const bool last = axis == kMaxAxes - 1;
      const int64_t row = last ? at[3] + token : axis == 2 ? at[2] : axis == 1 ? at[1] : at[0];
      const int column = copy.runs[run].column + channel - copy.runs[run].first;
      sources[i] = static_cast<const Word*>(copy.tables[axis]) + row * copy.columns + column;
      steps[i] = last ? copy.table_step : 0;
    }
    value.words[i] = __ldg(sources[i]);
    moves |= steps[i] != 0;
    if (++channel == copy.runs[run + 1].first) ++run;
    if (channel == copy.channels) channel = run = 0, ++token;
  }

  int left = copy.over_batch ? min(copy.batch - input, copy.inputs) : elements - element;
  const int taken = copy.over_batch ? 1 : group_elements;
  while (true) {
    *reinterpret_cast<Vector*>(target) = value;
    left -= taken;
    if (left <= 0) break;
    target += copy.out_step;
    if (!moves) continue;
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      sources[i] += steps[i];
      value.words[i] = __ldg(sources[i]);
    }
  }
}

template <class Word, int vector>
Status run_grid(const GridCopy& copy, int64_t blocks, Stream stream) {
  return launch(fourier_encode_grid_kernel<Word, vector>, blocks, kThreads, 0, stream, copy);
}

// How many times so many vectors fill blocks of threads best.
int fullest(int64_t vectors) {
  int best = 1;
  double most = 0.0;
  for (int times = 1; times <= 4 || times * vectors <= kThreads; ++times) {
    const double filled =
        static_cast<double>(times * vectors) / static_cast<double>(ceil_div(times * vectors, kThreads));
    if (filled > most) best = times, most = filled;
  }
  return best;
}

// --- free positions ---

constexpr int kPointThreads = 256;
constexpr int64_t kTileBytes = 16 << 10;
constexpr double kSmallQuarters = 1 << 17;  // what a frequency's rounding leaves over is still small then

struct Points {
  void* out;
  const void* positions;
  const float* frequencies;  // [2, pairs]: of 2 f the float32 and what its rounding left over
  DType positions_dtype;
  int64_t count, out_stride, stride, axis_stride;
  int axes, bands, pairs, channels;
  int span;     // positions of a block
  int tile_at;  // where their rows begin in shared memory, after the positions
  int slots;    // positions at a time, each by `width` threads: one a pair of axis and frequency, or every width-th
  int width;
  float near;  // |x| of small angles
  Divisor by_axes, by_bands, by_width;
  // First channels of axis 0, and the steps from axis to axis; -1: not a feature.
  int position_channel, position_step, sine_channel, wave_step, cosine_after;
};

struct Wave {
  float sine, cosine;
};

__device__ __forceinline__ float with_sign(float x, uint32_t sign) {
  return __uint_as_float(__float_as_uint(x) ^ (sign & 0x80000000u));
}

// sin(pi f x) and cos(pi f x), 2 f = high + low, off by about 1e-7: f x is reduced by quarter turns before it is
// rounded, in float64 where it is large. Nowhere far: |x| <= near is known.
template <bool far>
__device__ __forceinline__ Wave wave(float x, float high, float low, float near) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded, its last bits are the integer's
  const float rounded = __fmaf_rn(x, high, kToInteger);
  uint32_t quarters = __float_as_uint(rounded);
  float t = __fmaf_rn(x, low, __fmaf_rn(x, high, kToInteger - rounded));  // -1/2 to 1/2
  if (far && fabsf(x) > near) {
    const double product = double{x} * high + double{x} * low, turn = product - 4 * rint(product / 4);
    quarters = static_cast<uint32_t>(static_cast<int>(rint(turn)));
    t = static_cast<float>(turn - rint(turn));
  }
  const float s = __fmul_rn(t, t);
  // Interpolations of sin(pi/2 t) and cos(pi/2 t) in Chebyshev's nodes; errors of 1.1e-8 and 0.9e-8.
  const float cubic = __fmaf_rn(s, __fmaf_rn(s, -0.00462196674f, 0.0796870291f), -0.645964026f);
  const float sine = __fmaf_rn(__fmul_rn(t, s), cubic, __fmul_rn(t, 1.57079637f));
  const float quartic = __fmaf_rn(s, __fmaf_rn(s, 0.000906739906f, -0.0208615288f), 0.253669411f);
  const float cosine = __fmaf_rn(s, __fmaf_rn(s, quartic, -1.23370051f), 1.0f);
  const bool odd = quarters & 1;
  return {with_sign(odd ? cosine : sine, quarters << 30),
          with_sign(odd ? sine : cosine, (quarters << 30) + 0x40000000u)};
}

__device__ __forceinline__ float load_position(const Points& points, int64_t index) {
  switch (points.positions_dtype) {
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(points.positions)[index]);
    case DType::float16:
      return to_float(static_cast<const Float16*>(points.positions)[index]);
    default:
      return static_cast<const float*>(points.positions)[index];
  }
}

// The waves of this thread's axes and frequencies at the block's positions x, into rows of channels.
template <bool far, class Out>
__device__ __forceinline__ void write_waves(const Points& points, const float* x, int count, Out* rows,
                                            int64_t stride) {
  const Division own = divide(threadIdx.x, points.by_width);
  const int slot = static_cast<int>(own.quotient), cosine_after = points.cosine_after;
  if (slot >= points.slots) return;
  for (int pair = static_cast<int>(own.rest); pair < points.pairs; pair += points.width) {
    const Division at = divide(static_cast<uint32_t>(pair), points.by_bands);  // axis and band
    const float high = __ldg(points.frequencies + pair), low = __ldg(points.frequencies + points.pairs + pair);
    const float* source = x + slot * points.axes + at.quotient;
    Out* sine = rows + slot * stride + points.sine_channel + static_cast<int>(at.quotient) * points.wave_step + at.rest;
#pragma unroll 2
    for (int position = slot; position < count; position += points.slots) {
      const Wave both = wave<far>(*source, high, low, points.near);
      sine[0] = from_float<Out>(both.sine);
      if (cosine_after >= 0) sine[cosine_after] = from_float<Out>(both.cosine);
      source += points.slots * points.axes;
      sine += points.slots * stride;
    }
  }
}

// Writes the features of `span` positions. Staged: rows without gaps, laid out in shared memory first.
template <class Out, bool staged>
__global__ void __launch_bounds__(kPointThreads) fourier_encode_points_kernel(const __grid_constant__ Points points) {
  const int64_t start = int64_t{blockIdx.x} * points.span;
  const int count = static_cast<int>(min(points.count - start, int64_t{points.span}));
  float* const x = shared_memory<float>();
  Out* const rows =
      staged ? reinterpret_cast<Out*>(x + points.tile_at) : static_cast<Out*>(points.out) + start * points.out_stride;
  const int64_t stride = staged ? points.channels : points.out_stride;

  bool far = false;
  for (int i = static_cast<int>(threadIdx.x); i < count * points.axes; i += static_cast<int>(blockDim.x)) {
    const Division at = divide(static_cast<uint32_t>(i), points.by_axes);  // position and axis
    const float own = load_position(points, (start + at.quotient) * points.stride + at.rest * points.axis_stride);
    x[i] = own;
    far |= fabsf(own) > points.near;
    if (points.position_channel < 0) continue;
    const int channel = points.position_channel + static_cast<int>(at.rest) * points.position_step;
    rows[at.quotient * stride + channel] = from_float<Out>(own);
  }
  if (__syncthreads_or(far)) {
    write_waves<true>(points, x, count, rows, stride);
  } else {
    write_waves<false>(points, x, count, rows, stride);
  }
  if (!staged) return;
  __syncthreads();

  constexpr int vector = kVectorBytes / sizeof(Out);
  const int elements = count * points.channels, whole = elements / vector;
  Out* const out = static_cast<Out*>(points.out) + start * points.channels;
  for (int i = static_cast<int>(threadIdx.x); i < whole; i += static_cast<int>(blockDim.x))
    reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(rows)[i];
  const int rest = whole * vector + static_cast<int>(threadIdx.x);
  if (rest < elements) out[rest] = rows[rest];
}

}  // namespace

Status fourier_encode_grid(const FourierTables& features, const TensorView& data, const TensorView& out,
                           Stream stream) {
  GridCopy copy{};
  const int axes = static_cast<int>(features.tables.size()), first_axis = kMaxAxes - axes;
  const int64_t word = element_size(out.dtype), batch = out.size(0), last = out.size(axes);
  copy.out = out.data;
  copy.out_batch = out.stride(0);
  copy.channels = static_cast<int>(out.size(-1));
  copy.columns = static_cast<int>(std::accumulate(features.sections.begin(), features.sections.end(), int64_t{0}));
  int64_t positions = 1;  // of all axes but the last
  for (int own = 0; own < axes; ++own) {
    const int axis = first_axis + own;
    copy.tables[axis] = features.tables[static_cast<size_t>(own)].data;
    copy.out_strides[axis] = out.stride(1 + own);
    if (data.defined()) copy.data_strides[axis] = data.stride(1 + own);
    if (own == axes - 1) continue;
    copy.outer[axis] = Divisor(out.size(1 + own));
    positions *= out.size(1 + own);
  }

  Run* run = copy.runs;
  int channel = 0, column = 0;
  if (data.defined()) {
    copy.data = data.data;
    copy.data_batch = data.stride(0);
    copy.data_channel = data.stride(-1);
    channel = static_cast<int>(data.size(-1));
    if (channel > 0) *run++ = {0, kMaxAxes, 0};
  }
  for (const int64_t width : features.sections) {
    for (int axis = first_axis; axis < kMaxAxes; ++axis, channel += static_cast<int>(width))
      *run++ = {channel, axis, column};
    column += static_cast<int>(width);
  }
  *run = {channel, 0, 0};

  const int64_t vector = kVectorBytes / word, whole = vector / std::gcd(out.size(-1), vector);  // tokens
  bool aligned = reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0 && last % whole == 0;
  for (int dim = 0; dim < axes; ++dim) aligned &= out.size(dim) == 1 || out.stride(dim) % vector == 0;
  copy.packed = aligned && out.stride(axes) == out.size(-1);
  const int64_t least = copy.packed ? whole : 1, step = copy.packed ? vector : 1;
  copy.group = static_cast<int>(least * fullest(least * copy.channels / step));
  const int64_t chunks = ceil_div(int64_t{copy.group} * copy.channels / step, kThreads);
  copy.over_batch = batch >= kBatchToStep;
  copy.span = copy.group * static_cast<int>(copy.over_batch ? 1 : kSteps);
  const int64_t strips = ceil_div(last, copy.span);
  const int64_t parts = copy.over_batch ? ceil_div(batch, kSteps) : batch;
  copy.batch = static_cast<int>(batch);
  copy.inputs = static_cast<int>(ceil_div(batch, parts));
  copy.last = last;
  copy.chunks = Divisor(chunks);
  copy.strips = Divisor(strips);
  copy.by_channels = Divisor(copy.channels);
  copy.data_step = copy.over_batch ? copy.data_batch : copy.group * copy.data_strides[kMaxAxes - 1];
  copy.table_step = copy.over_batch ? 0 : int64_t{copy.group} * copy.columns;
  copy.out_step = copy.over_batch ? copy.out_batch : copy.group * copy.out_strides[kMaxAxes - 1];
  const int64_t blocks = chunks * strips * positions * ceil_div(batch, copy.inputs);
  if (word == 4)
    return copy.packed ? run_grid<uint32_t, 4>(copy, blocks, stream) : run_grid<uint32_t, 1>(copy, blocks, stream);
  return copy.packed ? run_grid<uint16_t, 8>(copy, blocks, stream) : run_grid<uint16_t, 1>(copy, blocks, stream);
}

Status fourier_encode_points(const FourierBands& bands, const TensorView& frequencies, double largest,
                             const TensorView& positions, const TensorView& out, Stream stream) {
  Points points{};
  points.out = out.data;
  points.positions = positions.data;
  points.frequencies = frequencies.as<float>();
  points.positions_dtype = positions.dtype;
  points.count = positions.size(0);
  points.out_stride = out.stride(0);
  points.stride = positions.stride(0);
  points.axis_stride = positions.stride(1);
  points.axes = static_cast<int>(positions.size(1));
  points.pairs = static_cast<int>(frequencies.size(1));
  points.bands = points.pairs / points.axes;
  points.channels = static_cast<int>(out.size(1));
  points.near = static_cast<float>(kSmallQuarters / (2 * largest));
  const int waves = (bands.sine_only ? 1 : 2) * points.bands, position = bands.concat_pos ? 1 : 0;
  points.sine_channel = bands.grouped ? points.axes * position : 0;
  points.wave_step = bands.grouped ? points.bands : waves + position;
  points.cosine_after = bands.sine_only ? -1 : bands.grouped ? points.pairs : points.bands;
  points.position_channel = !bands.concat_pos ? -1 : bands.grouped ? 0 : waves;
  points.position_step = bands.grouped ? 1 : points.wave_step;

  points.width = static_cast<int>(ceil_div(points.pairs, ceil_div(points.pairs, kPointThreads)));
  points.slots = kPointThreads / points.width;
  const int64_t word = element_size(out.dtype), vector = kVectorBytes / word, row = word * points.channels;
  const int64_t whole = std::lcm(int64_t{points.slots}, vector / std::gcd(out.size(1), vector));  // positions
  const bool staged = whole * row <= kTileBytes && (out.stride(0) == out.size(1) || points.count == 1) &&
                      reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0;
  const int64_t together = staged ? whole : points.slots;
  const int64_t room = kTileBytes / (points.axes * sizeof(float) + (staged ? row : 0));
  points.span = static_cast<int>(std::max<int64_t>(1, room / together) * together);
  points.by_axes = Divisor(points.axes);
  points.by_bands = Divisor(points.bands);
  points.by_width = Divisor(points.width);
  const int threads = static_cast<int>(ceil_div(points.width * points.slots, 32) * 32);
  points.tile_at = static_cast<int>(ceil_div(points.span * points.axes, 4) * 4);
  const size_t shared = points.tile_at * sizeof(float) + static_cast<size_t>(staged ? points.span * row : 0);
  return with_floating(out.dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    const auto kernel = staged ? fourier_encode_points_kernel<Out, true> : fourier_encode_points_kernel<Out, false>;
    return launch(kernel, ceil_div(points.count, points.span), threads, shared, stream, points);
  });
}

}  // namespace cuda
}  // namespace pk
