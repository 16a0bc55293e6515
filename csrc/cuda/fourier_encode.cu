// fourier_encode on a GPU. A grid's features are rows of tables: bits that are copied, 16 bytes to a store.
#include <numeric>

#include "launch.h"
#include "primitives.h"

namespace pk {
namespace cuda {
namespace {

constexpr int kMaxAxes = 4, kMaxSections = 4, kVectorBytes = 16, kThreads = 128;
constexpr int64_t kGroupsPerBlock = 16;

// The grid with its axes at the end of four, and the layout of an output's channels.
struct GridCopy {
  void* out;
  const void* data;
  const void* tables[kMaxAxes];
  int64_t sizes[kMaxAxes], out_strides[kMaxAxes], data_strides[kMaxAxes];
  int64_t out_batch, data_batch, data_channel;
  int first_axis, data_channels, channels, columns, section_count;
  int sections[kMaxSections];
  int group;        // tokens whose channels together are whole vectors
  int64_t span;     // tokens of a block, a multiple of group
  int64_t strips;   // spans of the last axis
  int chunks;       // blocks of threads that a group's vectors take
  bool packed;      // tokens of the last axis follow each other without gaps, whole vectors of them
};

// Where one element of a group comes from, and how far its source moves from group to group.
template <class Word>
struct Source {
  const Word* address;
  int64_t step;
};

template <class Word>
__device__ Source<Word> source_of(const GridCopy& copy, const int64_t (&at)[kMaxAxes], int64_t batch, int token,
                                  int channel) {
  if (channel < copy.data_channels) {
    const Word* address = static_cast<const Word*>(copy.data) + batch * copy.data_batch + channel * copy.data_channel;
    for (int axis = 0; axis < kMaxAxes; ++axis) address += at[axis] * copy.data_strides[axis];
    const int64_t stride = copy.data_strides[kMaxAxes - 1];
    return {address + token * stride, copy.group * stride};
  }
  channel -= copy.data_channels;
  int first_column = 0;
  for (int section = 0; section < copy.section_count; ++section) {
    const int width = copy.sections[section], axes = kMaxAxes - copy.first_axis;
    if (channel < axes * width) {
      const int axis = copy.first_axis + channel / width;
      const bool last = axis == kMaxAxes - 1;
      const int64_t row = at[axis] + (last ? token : 0);
      const Word* table = static_cast<const Word*>(copy.tables[axis]);
      return {table + row * copy.columns + first_column + channel % width,
              last ? int64_t{copy.group} * copy.columns : 0};
    }
    channel -= axes * width;
    first_column += width;
  }
  return {nullptr, 0};
}

// Writes a span of tokens of the last axis at one position of the others, a group at a time. A thread has the same
// elements of every group, so that nothing is divided or chosen in the loop.
template <class Word, int vector>
__global__ void __launch_bounds__(kThreads) fourier_encode_grid_kernel(GridCopy copy) {
  struct alignas(sizeof(Word) * vector) Vector {
    Word words[vector];
  };
  int64_t place = blockIdx.x;
  const int chunk = static_cast<int>(place % copy.chunks);
  place /= copy.chunks;
  int64_t at[kMaxAxes];
  at[kMaxAxes - 1] = place % copy.strips * copy.span;
  place /= copy.strips;
  for (int axis = kMaxAxes - 2; axis >= 0; --axis) {
    at[axis] = place % copy.sizes[axis];
    place /= copy.sizes[axis];
  }
  const int64_t batch = place;
  const int element = (chunk * kThreads + static_cast<int>(threadIdx.x)) * vector;
  if (element >= copy.group * copy.channels) return;

  Source<Word> sources[vector];
  Vector value;
  for (int i = 0; i < vector; ++i) {
    const int token = (element + i) / copy.channels;
    sources[i] = source_of<Word>(copy, at, batch, token, (element + i) % copy.channels);
    // Past the grid's end there may be nothing to read.
    if (at[kMaxAxes - 1] + token < copy.sizes[kMaxAxes - 1]) value.words[i] = *sources[i].address;
  }
  Word* target = static_cast<Word*>(copy.out) + batch * copy.out_batch;
  for (int axis = 0; axis < kMaxAxes; ++axis) target += at[axis] * copy.out_strides[axis];
  const int64_t out_stride = copy.out_strides[kMaxAxes - 1];
  target += copy.packed ? element : element / copy.channels * out_stride + element % copy.channels;

  const int64_t left = copy.sizes[kMaxAxes - 1] - at[kMaxAxes - 1];
  const int64_t elements = (left < copy.span ? left : copy.span) * copy.channels;
  const int64_t group_elements = int64_t{copy.group} * copy.channels;
  for (int64_t first = element; first < elements; first += group_elements) {
    *reinterpret_cast<Vector*>(target) = value;
    target += copy.group * out_stride;
    if (first + group_elements >= elements) break;
    for (int i = 0; i < vector; ++i) {
      if (sources[i].step == 0) continue;
      sources[i].address += sources[i].step;
      value.words[i] = *sources[i].address;
    }
  }
}

template <class Word, int vector>
Status run_grid(const GridCopy& copy, int64_t batch, Stream stream) {
  int64_t blocks = batch * copy.strips * copy.chunks;
  for (int axis = 0; axis < kMaxAxes - 1; ++axis) blocks *= copy.sizes[axis];
  return launch(fourier_encode_grid_kernel<Word, vector>, blocks, kThreads, 0, stream, copy);
}

// How many times so many vectors fill blocks of threads best.
int fullest(int vectors) {
  int best = 1;
  double most = 0.0;
  for (int times = 1; times <= 4 || times * vectors <= kThreads; ++times) {
    const double filled = static_cast<double>(times * vectors) / static_cast<double>(ceil_div(times * vectors, kThreads));
    if (filled > most) best = times, most = filled;
  }
  return best;
}

}  // namespace

Status fourier_encode_grid(const FourierTables& features, const TensorView& data, const TensorView& out,
                           Stream stream) {
  GridCopy copy{};
  const int axes = static_cast<int>(features.tables.size());
  const int64_t word = element_size(out.dtype), vector = kVectorBytes / word;
  copy.out = out.data;
  copy.data = data.data;
  copy.first_axis = kMaxAxes - axes;
  copy.channels = static_cast<int>(out.size(-1));
  copy.section_count = static_cast<int>(features.sections.size());
  for (int i = 0; i < copy.section_count; ++i) copy.sections[i] = static_cast<int>(features.sections[i]);
  copy.columns = std::accumulate(copy.sections, copy.sections + copy.section_count, 0);
  copy.data_channels = copy.channels - axes * copy.columns;
  copy.out_batch = out.stride(0);
  if (data.defined()) copy.data_batch = data.stride(0), copy.data_channel = data.stride(-1);
  bool aligned = reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0;
  aligned &= out.size(0) == 1 || out.stride(0) % vector == 0;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const int own = axis - copy.first_axis;
    copy.sizes[axis] = own < 0 ? 1 : out.size(1 + own);
    if (own < 0) continue;
    copy.tables[axis] = features.tables[static_cast<size_t>(own)].data;
    copy.out_strides[axis] = out.stride(1 + own);
    if (data.defined()) copy.data_strides[axis] = data.stride(1 + own);
    if (own < axes - 1) aligned &= copy.sizes[axis] == 1 || copy.out_strides[axis] % vector == 0;
  }
  const int64_t last = copy.sizes[kMaxAxes - 1];
  const int whole = static_cast<int>(vector / std::gcd(int64_t{copy.channels}, vector));  // tokens that are whole vectors
  copy.packed = aligned && last % whole == 0 && copy.out_strides[kMaxAxes - 1] == copy.channels;
  const int least = copy.packed ? whole : 1, step = copy.packed ? static_cast<int>(vector) : 1;
  copy.group = least * fullest(least * copy.channels / step);
  copy.chunks = static_cast<int>(ceil_div(int64_t{copy.group} * copy.channels / step, kThreads));
  copy.span = copy.group * kGroupsPerBlock;
  copy.strips = ceil_div(last, copy.span);
  if (word == 4) return copy.packed ? run_grid<uint32_t, 4>(copy, out.size(0), stream)
                                    : run_grid<uint32_t, 1>(copy, out.size(0), stream);
  return copy.packed ? run_grid<uint16_t, 8>(copy, out.size(0), stream)
                     : run_grid<uint16_t, 1>(copy, out.size(0), stream);
}

}  // namespace cuda
}  // namespace pk
